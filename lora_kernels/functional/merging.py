"""``merge_`` and ``unmerge_``: an adapter added to a weight, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..plain import FLOATS
from .checks import check_adapter, check_dense, check_scaling

_MERGE_BLOCK = 1 << 20
"""Elements of weight that a merge holds beside it at a time."""


def merge_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """Adds an adapter to its weight, in place (LoRA, Hu et al., ICLR 2022).

    Equivalent to ``weight += scaling * lora_B @ lora_A``, but the sum is formed in float32 (float64 for float64) and
    rounded once.

    Args:
        weight: [out_features, in_features]; float32, bfloat16, float16 or float64.
        lora_A: [rank, in_features], floating point.
        lora_B: [out_features, rank], dtype of lora_A.
        scaling: factor of the update.

    Returns:
        weight.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, or the merged weight is not finite (weight is then unchanged).
    """
    return _add("merge_", weight, lora_A, lora_B, scaling, 1)


@torch.no_grad()
def _add(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, sign: int) -> Tensor:
    """``weight += sign * scaling * lora_B @ lora_A`` for ``op``, checked."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOATS:  # the update would be cut off, or rounded to what another part scales
        raise TypeError(f"{op}: weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    check_dense(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    check_adapter(op, weight, lora_A, lora_B)
    check_scaling(op, scaling)
    factor = sign * scaling
    if not stays_finite(weight, lora_A, lora_B, factor):
        raise ValueError(
            f"{op}: lora_A, lora_B and the {op[:-1]}d weight must be finite; the weight was left unchanged"
        )
    for rows, merged in _merged_blocks(weight, lora_A, lora_B, factor):
        rows.copy_(merged)
    return weight


@torch.no_grad()
def stays_finite(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> bool:
    """Whether ``merge_`` would give finite elements only, in the weight's dtype."""
    finite = [torch.isfinite(merged).all() for _, merged in _merged_blocks(weight, lora_A, lora_B, scaling)]
    return not finite or bool(torch.stack(finite).all())


def _merged_blocks(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of weight, a few at a time, and what they become: an update as large as weight is never formed."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    rows = max(1, _MERGE_BLOCK // max(1, weight.shape[1]))
    for w, b in zip(weight.split(rows), B.split(rows)):
        yield w, torch.addmm(w.to(wide), b, A, alpha=scaling).to(weight.dtype)


def unmerge_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """Subtracts what ``merge_`` added, in place (LoRA, Hu et al., ICLR 2022).

    Equivalent to ``weight -= scaling * lora_B @ lora_A``. Not bitwise the weight before: each of the two roundings is
    at most half an ulp of the weight's dtype. Keep a copy of the weight (``LoRALinear.merge(keep_base=True)``) where it
    must be restored exactly.

    Args:
        weight, lora_A, lora_B, scaling: as ``merge_``, [out_features, in_features], [rank, in_features] and
            [out_features, rank], of the same dtypes.

    Returns:
        weight.

    Raises:
        TypeError, ValueError: as ``merge_``.
    """
    return _add("unmerge_", weight, lora_A, lora_B, scaling, -1)
