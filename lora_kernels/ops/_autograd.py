"""What the autograd Functions share."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(t: Tensor) -> Tensor:
    """[..., columns] as [rows, columns]; torch's ``reshape(-1, columns)`` cannot tell the rows of no columns."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def not_a_view(y: Tensor) -> Tensor:
    """The same memory as a tensor of its own: autograd forbids in-place changes of a view that a Function returns."""
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y
