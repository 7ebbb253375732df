"""Cross entropy of rows of logits, and its gradient in their place: what ``linear_cross_entropy`` does with a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch


class Loss(NamedTuple):
    """What is lost where: of z = logit_scale · logits, then softcap · tanh(z / softcap), if softcap is not 0."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    logit_scale: float


Rows = Callable[[Tensor, Tensor, "Tensor | None", Loss, torch.dtype], "tuple[Tensor, Tensor]"]
"""(logits [rows, V], labels [rows], grad_losses [rows], loss, dtype) to losses [rows] and the gradient of the logits
[rows, V] in this dtype. The logits are overwritten. Without grad_losses the gradient means nothing. A label outside of
[0, V), other than ignore_index, makes its row NaN.
"""


def reference(
    logits: Tensor, labels: Tensor, grad_losses: Tensor | None, loss: Loss, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """In plain torch."""
    columns = logits.shape[1]
    z = logits.mul_(loss.logit_scale)
    if loss.softcap:
        z = z.div_(loss.softcap).tanh_().mul_(loss.softcap)
    counts, is_inside = labels != loss.ignore_index, (labels >= 0) & (labels < columns)
    chosen = torch.where(is_inside, labels, 0).unsqueeze(1)
    log_p = z.log_softmax(1)
    losses = log_p.gather(1, chosen).squeeze(1) * (loss.label_smoothing - 1.0)
    if loss.label_smoothing:
        losses -= loss.label_smoothing * log_p.mean(1)
    losses = torch.where(counts, losses.masked_fill(~is_inside, math.nan), 0.0)
    if grad_losses is None:
        return losses, z
    grad = log_p.exp_().sub_(loss.label_smoothing / columns)
    grad.scatter_add_(1, chosen, grad.new_full(chosen.shape, loss.label_smoothing - 1.0))
    grad *= (grad_losses * loss.logit_scale).unsqueeze(1)
    if loss.softcap:
        grad *= 1.0 - (z / loss.softcap).square_()
    grad.masked_fill_((counts & ~is_inside).unsqueeze(1), math.nan).masked_fill_(~counts.unsqueeze(1), 0.0)
    return losses, grad.to(dtype)


_native = dispatch.define_native(
    "cross_entropy_rows",
    "(Tensor(a!) logits, Tensor labels, Tensor? grad_losses, int ignore_index, float label_smoothing, float softcap, "
    "float logit_scale, ScalarType grad_dtype) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape[0]),
)


def native(
    logits: Tensor, labels: Tensor, grad_losses: Tensor | None, loss: Loss, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """By an extension, for float32 logits."""
    losses = _native(logits, labels, grad_losses, *loss, dtype)
    return losses, in_place_of(logits, dtype)


def in_place_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, V] in the first bytes of each row of float32 logits."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]
