"""``linear_cross_entropy``: arguments are checked here, then dispatched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..formats import QuantizedWeight
from ..ops import eager
from ..ops import linear_cross_entropy as _op
from ..ops.linear_cross_entropy import LinearCrossEntropyEachFunction, LinearCrossEntropyFunction
from ..plain import are_indices
from .checks import check_adapter, check_adapter_dtype, check_base, check_dense, check_probability, check_scaling
from .why import explains

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    shift: bool = False,
) -> Tensor:
    """The head of a language model and its cross entropy, without the logits in memory (some rows at a time, with the
    gradients formed in forward, as in Liger Kernel, Hsu et al., 2024).

    Equivalent to::

        logits = logit_scale * lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling).float()
        logits = softcap * torch.tanh(logits / softcap)
        F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ...)

    but logits [M, V] exist some rows at a time, in float32, whatever x's dtype is; so do their gradients. For "mean"
    and "sum", forward forms the gradients as well where they are needed: it keeps dX [..., K] in x's dtype, and those
    of lora_A, lora_B, and of a weight and a bias that train, in float32, and backward multiplies them by a number and
    rounds them. For "none", backward computes the logits anew. On the CPU, rows whose label is ignored are not
    computed.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64. Any strides.
        weight: [classes, in_features], dtype of x.
        labels: [...], x's leading sizes; int64 or int32, classes or ``ignore_index``.
        lora_A: [rank, in_features], dtype of x, or float32 over a bfloat16/float16 x; None without an adapter.
        lora_B: [classes, rank], dtype of lora_A.
        bias: [classes], dtype of x.
        scaling: factor of the adapter's part.
        ignore_index: rows with this label count for nothing.
        reduction: "mean" over the rows that count (NaN without any, as torch), "sum" or "none".
        label_smoothing: share of the target that is spread over all classes, in [0, 1].
        softcap: bound of the logits, after logit_scale; None for none.
        logit_scale: factor of the logits; None for 1.
        shift: row t of a sequence has the label t + 1, and the last row none: labels[..., 1:] belong to x[..., :-1, :].

    Returns:
        A number, or for "none" the shape of labels, one shorter under ``shift``; float32 (float64 for float64).

    Raises:
        TypeError: an argument is not a tensor, is sparse, nested or quantised, or has a dtype that does not fit.
        ValueError: shapes, devices or numbers do not fit; the message names the argument. A label that is no class
            raises on the CPU; on a GPU, which nobody waits for, the loss is NaN.
    """
    _check_reduction(reduction)
    args = _arguments(
        x, weight, labels, lora_A, lora_B, bias, scaling, ignore_index, label_smoothing, softcap, logit_scale, shift
    )
    if reduction == "none":
        losses = eager.call(_op.EACH, LinearCrossEntropyEachFunction, args[:-5])
        return losses[..., :-1] if shift else losses
    total = eager.call(_op.SPEC, LinearCrossEntropyFunction, args)
    if reduction == "sum":
        return total
    count = (args[2] != ignore_index).sum()
    nothing = torch.where(count > 0, 0.0, math.nan).to(total.dtype)  # torch's gradients are zero then, not NaN
    return total / count.clamp(min=1) + nothing


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{_OP}: reduction must be "mean", "sum" or "none", got {reduction!r}')


def _arguments(
    x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None,
    scaling: float, ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float | None,
    shift: bool,
) -> tuple:  # fmt: skip
    """The op's positional arguments, checked. Under ``shift`` the labels move, and x does not."""
    if isinstance(weight, QuantizedWeight):
        raise TypeError(f"{_OP}: weight must be a tensor, got a quantised one ({weight.format})")
    check_base(_OP, x, weight, bias)
    if weight.shape[0] == 0:
        raise ValueError(f"{_OP}: weight must have a row for every class, got shape {tuple(weight.shape)}")
    _check_labels(x, labels, shift)
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"{_OP}: lora_A and lora_B must be given together")
    if lora_A is not None and lora_B is not None:
        check_adapter(_OP, weight, lora_A, lora_B)
        if lora_A.dtype != weight.dtype and not dispatch.autocast_enabled(x.device.type):
            check_adapter_dtype(_OP, "weight", weight.dtype, lora_A)
    check_scaling(_OP, scaling)
    check_probability(_OP, "label_smoothing", label_smoothing)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{_OP}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if softcap is not None and (not isinstance(softcap, (int, float)) or not 0.0 < softcap < math.inf):
        raise ValueError(f"{_OP}: softcap must be a positive number or None, got {softcap!r}")
    if logit_scale is not None and (not isinstance(logit_scale, (int, float)) or not math.isfinite(logit_scale)):
        raise ValueError(f"{_OP}: logit_scale must be a finite number or None, got {logit_scale!r}")
    labels = labels.to(torch.int64)
    if shift:
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    operands = x, weight, lora_A, lora_B, bias
    trains = torch.is_grad_enabled()
    needs = [trains and t is not None and t.requires_grad for t in operands]
    return (
        x, weight, labels, lora_A, lora_B, bias, float(scaling), ignore_index, float(label_smoothing),
        float(softcap or 0.0), 1.0 if logit_scale is None else float(logit_scale), *needs,
    )  # fmt: skip


def _check_labels(x: Tensor, labels: Any, shift: bool) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{_OP}: labels must be a tensor, got {type(labels).__name__}")
    check_dense(_OP, "labels", labels)
    if not are_indices(labels):
        raise TypeError(f"{_OP}: labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{_OP}: labels must be {list(x.shape[:-1])} to fit x {tuple(x.shape)}, got shape {tuple(labels.shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"{_OP}: labels must be on {x.device} like x, got {labels.device}")
    if shift and (labels.dim() == 0 or labels.shape[-1] == 0):
        raise ValueError(f"{_OP}: shift needs sequences of labels, got shape {tuple(labels.shape)}")


@explains(_OP, _op.SPEC, example=lambda zeros: (zeros(512, 576), zeros(1536, 576), zeros(512, dtype=torch.int64)))
def arguments(
    x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None,
    bias: Tensor | None = None, *, scaling: float = 1.0, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, softcap: float | None = None, logit_scale: float | None = None, shift: bool = False,
) -> tuple:  # fmt: skip
    """The op's positional arguments from those of ``linear_cross_entropy``, checked."""
    _check_reduction(reduction)
    return _arguments(
        x, weight, labels, lora_A, lora_B, bias, scaling, ignore_index, label_smoothing, softcap, logit_scale, shift
    )
