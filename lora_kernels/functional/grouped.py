"""``grouped_lora_linear``: arguments are checked here, then dispatched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..ops import eager
from ..ops import grouped_lora_linear as _op
from ..ops.grouped_lora_linear import GroupedLoRALinearFunction
from ..plain import FLOATS
from .checks import check_adapter_dtype, check_branch, check_dense
from .why import Zeros, explains

_NAME = "grouped_lora_linear"


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``lora_linear`` of rows that belong to groups: experts of a mixture, or adapters over one base (LoRA, Hu et al.,
    ICLR 2022; grouped products without dropped tokens as in MegaBlocks, Gale et al., MLSys 2023).

    Equivalent to, for each group g with ``rows = slice(offsets[g - 1], offsets[g])``::

        y[rows] = lora_linear(x[rows], weight[g], lora_A[g], lora_B[g], bias[g], scaling=scaling[g], ...)

    with zeros in the rows behind the last group, and one dropout mask over all of x. Nothing of the size of all
    weights is formed, nor of x's times G; for backward x, s = dropout(x) Aᵀ [M, rank] and the seed are saved.

    Args:
        x: [M, in_features], its rows sorted by group; float32, bfloat16, float16 or float64.
        weight: [out_features, in_features] for all groups, or [G, out_features, in_features]; dtype of x. Any strides:
            experts stored as [G, in_features, out_features] are passed as ``.transpose(1, 2)`` and read where they lie.
        lora_A: [G, rank, in_features], dtype of x, or float32 over a bfloat16/float16 x.
        lora_B: [G, out_features, rank], dtype of lora_A.
        offsets: int32 [G] on x's device: where each group ends, as ``F.grouped_mm`` takes them. They must not decrease,
            nor exceed M; on a GPU that is not looked at. Groups may be empty.
        bias: [out_features] or [G, out_features], dtype of x.
        scaling: factor of the update: a number, or a floating-point tensor of one element or [G] on x's device.
        dropout_p, training, seed: as ``lora_linear``; the mask is the one of ``dropout_mask(M, in_features)``.

    Returns:
        [M, out_features], dtype of x.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has a dtype that does not fit.
        ValueError: shapes, devices, offsets or numbers do not fit. The message names the argument.
    """
    args = _arguments(x, weight, lora_A, lora_B, offsets, bias, scaling, dropout_p, training, seed)
    return eager.call(_op.SPEC, GroupedLoRALinearFunction, args)


def _example(zeros: Zeros) -> tuple:
    return zeros(512, 576), zeros(8, 1536, 576), zeros(8, 16, 576), zeros(8, 1536, 16), zeros(8, dtype=torch.int32)


@explains(_NAME, _op.SPEC, example=_example)
def arguments(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, bias: Tensor | None = None, *,
    scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> tuple:  # fmt: skip
    """The op's positional arguments from those of ``grouped_lora_linear``, checked; no seed is drawn."""
    seed = 0 if seed is None else seed
    return _arguments(x, weight, lora_A, lora_B, offsets, bias, scaling, dropout_p, training, seed)


def _arguments(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, bias: Tensor | None,
    scaling: float | Tensor, dropout_p: float, training: bool, seed: int | Tensor | None,
) -> tuple:  # fmt: skip
    _check_tensors(x, weight, lora_A, lora_B, offsets, bias)
    check_offsets(offsets, x)
    check_groups(x, weight, lora_A, lora_B, len(offsets), bias)
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        lora_B, scaling = lora_B * _factors(scaling, lora_B), 1.0
    lora_B, bias, seed, scaling, dropout_p = check_branch(_NAME, x, lora_B, bias, scaling, dropout_p, training, seed)
    return x, weight, lora_A, lora_B, offsets, bias, seed, scaling, dropout_p


def _check_tensors(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, bias: Tensor | None
) -> None:
    """Each is a dense tensor on x's device, and the floating-point ones have dtypes that fit."""
    named = ("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("offsets", offsets), ("bias", bias)
    for name, t in named:
        if name == "bias" and t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(t).__name__}")
        check_dense(_NAME, name, t)
        if t.device != x.device:
            raise ValueError(f"{_NAME}: {name} must be on {x.device} like x, got {t.device}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{_NAME}: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not t.is_floating_point():
            raise TypeError(f"{_NAME}: {name} must be floating point, got {t.dtype}")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"{_NAME}: lora_B must be {lora_A.dtype} like lora_A, got {lora_B.dtype}")
    if dispatch.autocast_enabled(x.device.type):
        return
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{_NAME}: {name} must be {x.dtype} like x, got {t.dtype}")
    check_adapter_dtype(_NAME, "x", x.dtype, lora_A)


def check_offsets(offsets: Tensor, x: Tensor) -> None:
    """``TypeError`` or ``ValueError`` unless ``offsets`` are the ends of groups of x's rows."""
    if offsets.dtype != torch.int32:
        raise TypeError(f"{_NAME}: offsets must be int32, got {offsets.dtype}")
    if offsets.dim() != 1 or len(offsets) < 1:
        raise ValueError(f"{_NAME}: offsets must be [groups], got shape {tuple(offsets.shape)}")
    if x.dim() != 2:
        raise ValueError(f"{_NAME}: x must be [rows, in_features], got shape {tuple(x.shape)}")
    if not offsets.is_cpu or is_compiling() or type(offsets) is not Tensor:
        return  # a look would wait for the device, or there is nothing to see
    ends = offsets.tolist()
    if any(end < before for before, end in zip([0, *ends], ends)) or ends[-1] > len(x):
        raise ValueError(f"{_NAME}: offsets must not decrease, nor exceed x's {len(x)} rows, got {ends}")


def check_groups(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, groups: int, bias: Tensor | None) -> None:
    """``ValueError`` unless the shapes fit together."""
    if weight.dim() not in (2, 3) or (weight.dim() == 3 and len(weight) != groups):
        raise ValueError(
            f"{_NAME}: weight must be [out_features, in_features] or [{groups}, out_features, in_features] to fit "
            f"offsets, got shape {tuple(weight.shape)}"
        )
    n, k = weight.shape[-2:]
    if x.shape[1] != k:
        raise ValueError(
            f"{_NAME}: x must be [rows, {k}] to fit weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    rank = lora_A.shape[1] if lora_A.dim() == 3 else 0
    if rank < 1 or lora_A.shape != (groups, rank, k):
        raise ValueError(
            f"{_NAME}: lora_A must be [{groups}, rank, {k}] with rank >= 1, got shape {tuple(lora_A.shape)}"
        )
    if lora_B.shape != (groups, n, rank):
        raise ValueError(
            f"{_NAME}: lora_B must be [{groups}, {n}, {rank}] to fit weight and lora_A, got shape {tuple(lora_B.shape)}"
        )
    if bias is not None and bias.shape not in ((n,), (groups, n)):
        raise ValueError(f"{_NAME}: bias must be [{n}] or [{groups}, {n}], got shape {tuple(bias.shape)}")


def _factors(scaling: Tensor, lora_B: Tensor) -> Tensor:
    """A factor per group, [G, 1, 1]."""
    groups = len(lora_B)
    if scaling.shape != (groups,) or not scaling.is_floating_point():
        raise ValueError(
            f"{_NAME}: scaling must be a number, or a floating-point tensor of one element or [{groups}], got "
            f"{scaling.dtype} {tuple(scaling.shape)}"
        )
    if scaling.device != lora_B.device:
        raise ValueError(f"{_NAME}: scaling must be on {lora_B.device} like x, got {scaling.device}")
    return scaling.to(lora_B.dtype).view(groups, 1, 1)
