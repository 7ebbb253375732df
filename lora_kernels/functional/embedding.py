"""``lora_embedding``: arguments are checked here, then dispatched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import eager
from ..ops import lora_embedding as _op
from ..ops.lora_embedding import LoRAEmbeddingFunction
from ..plain import FLOATS, INDICES
from .checks import check_adapter, check_adapter_dtype, check_dense, check_scaling, scaling_tensor
from .why import explains


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding and its low-rank update in one op (LoRA, Hu et al., ICLR 2022).

    Equivalent to::

        F.embedding(ids, weight, padding_idx) + scaling * F.embedding(ids, lora_A.T, padding_idx) @ lora_B.T

    For backward only the ids and s = lora_A.T[ids] are saved. Gradients are bitwise reproducible.

    Args:
        ids: int64 or int32, any shape.
        weight: [vocabulary, features]; float32, bfloat16, float16 or float64.
        lora_A: [rank, vocabulary], dtype of weight, or float32 over a bfloat16/float16 weight.
        lora_B: [features, rank], dtype of lora_A.
        scaling: as in ``lora_linear``.
        padding_idx: the id, in [0, vocabulary), whose rows of weight and lora_A get no gradient.

    Returns:
        [*ids.shape, features], dtype of weight, under autocast, too.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has a dtype that does not fit.
        ValueError: shapes, devices or numbers do not fit. The message names the argument.
        IndexError: an id is out of range (on a GPU, a device-side assertion).
    """
    args = arguments(ids, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)
    return eager.call(_op.SPEC, LoRAEmbeddingFunction, args)


@explains(
    "lora_embedding",
    _op.SPEC,
    example=lambda zeros: (zeros(512, dtype=torch.int64), zeros(1536, 576), zeros(16, 1536), zeros(576, 16)),
)
def arguments(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
) -> tuple:  # fmt: skip
    """The op's positional arguments, checked."""
    op = "lora_embedding"
    for name, t in (("ids", ids), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if ids.dtype not in INDICES:
        raise TypeError(f"{op}: ids must be int64 or int32, got {ids.dtype}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{op}: weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    for name, t in (("ids", ids), ("weight", weight)):
        check_dense(op, name, t)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [vocabulary, features], got shape {tuple(weight.shape)}")
    if ids.device != weight.device:
        raise ValueError(f"{op}: ids must be on {weight.device} like weight, got {ids.device}")
    check_adapter(op, weight.t(), lora_A, lora_B)
    check_adapter_dtype(op, "weight", weight.dtype, lora_A)
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling_tensor(op, scaling, weight.device), 1.0
    check_scaling(op, scaling)
    if padding_idx is not None and not 0 <= padding_idx < weight.shape[0]:
        raise ValueError(f"{op}: padding_idx must be in [0, {weight.shape[0]}), got {padding_idx}")
    return ids, weight, lora_A, lora_B, float(scaling), -1 if padding_idx is None else padding_idx
