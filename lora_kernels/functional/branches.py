"""Low-rank branches that are added to a result in place, where no op computes both at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..ops.eager import as_rows


def add_rows(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``y + scaling * s @ lora_B.T``, written into y.

    Args:
        y: [..., N], contiguous; no view, and nobody else's.
        s: [..., rank]. lora_B: [N, rank]. Both are cast to y's dtype.
        scaling: a number, or a tensor without dimensions.

    Returns:
        y. Saved for backward: s and lora_B.
    """
    B, alpha = _scaled(lora_B, scaling, y.dtype)
    s = s.to(y.dtype)
    if is_compiling():
        return torch.addmm(as_rows(y), as_rows(s), B.t(), alpha=alpha).view(y.shape)
    return _AddRows.apply(y, s, B, alpha)


def add_channels(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float | Tensor, groups: int) -> Tensor:
    """``y`` plus ``scaling`` times the convolution of s with the kernel of one element ``lora_B``, written into y.

    Args:
        y: [batch, N, ...], for which ``may_add_channels``, and nobody else's.
        s: [batch, rank, ...]. lora_B: [N, rank / groups, 1, ...]. Both are cast to y's dtype.
        scaling: as in ``add_rows``.

    Returns:
        y. Saved for backward: s and lora_B.
    """
    B, alpha = _scaled(lora_B.flatten(1), scaling, y.dtype)
    return _AddChannels.apply(y, s.to(y.dtype), B, alpha, groups)


def _scaled(lora_B: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    if isinstance(scaling, Tensor):
        return (lora_B * scaling).to(dtype), 1.0
    return lora_B.to(dtype), scaling


class _AddRows(torch.autograd.Function):
    """In place and in one product: a view of y that is changed in place would cost copies of its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, B: Tensor, alpha: float) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(y)
        ctx.save_for_backward(s, B)
        ctx.alpha = alpha
        as_rows(y).addmm_(as_rows(s), B.t(), alpha=alpha)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        s, B = ctx.saved_tensors
        rows, grad_s, grad_B = as_rows(grad), None, None
        if ctx.needs_input_grad[1]:
            grad_s = (rows @ B).mul_(ctx.alpha).view(s.shape)
        if ctx.needs_input_grad[2]:
            grad_B = (rows.t() @ as_rows(s)).mul_(ctx.alpha)
        return grad, grad_s, grad_B, None


class _AddChannels(torch.autograd.Function):
    """As ``_AddRows``: [N / groups, places] += B [rank / groups, places] per sample and group, or all places as rows
    where channels come last in memory.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, B: Tensor, alpha: float, groups: int) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(y)
        ctx.save_for_backward(s, B)
        ctx.alpha, ctx.groups, ctx.channels_last = alpha, groups, not y.is_contiguous()
        if ctx.channels_last:
            _places(y).addmm_(_places(s), B.t(), alpha=alpha)
        else:
            _matrices(y, groups).baddbmm_(_per_sample(B, len(s), groups), _matrices(s, groups), alpha=alpha)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        s, B = ctx.saved_tensors
        need_s, need_B = ctx.needs_input_grad[1:3]
        grad_s = grad_B = None
        if ctx.channels_last:
            rows = _places(grad)
            if need_s:
                grad_s = (rows @ B).mul_(ctx.alpha).view(s.movedim(1, -1).shape).movedim(-1, 1)
            if need_B:
                grad_B = (rows.t() @ _places(s)).mul_(ctx.alpha)
            return grad, grad_s, grad_B, None, None
        matrices = _matrices(grad, ctx.groups)
        if need_s:
            transposed = _per_sample(B, len(s), ctx.groups).transpose(1, 2)
            grad_s = torch.bmm(transposed, matrices).mul_(ctx.alpha).view(s.shape)
        if need_B:
            products = torch.bmm(matrices, _matrices(s, ctx.groups).transpose(1, 2))
            grad_B = products.view(len(s), *B.shape).sum(0).mul_(ctx.alpha)
        return grad, grad_s, grad_B, None, None


def may_add_channels(y: Tensor, groups: int) -> bool:
    """Whether ``add_channels`` can write into this result."""
    if y._is_view():
        return False
    return y.is_contiguous() or (groups == 1 and y.movedim(1, -1).is_contiguous())


def _places(t: Tensor) -> Tensor:
    """[batch, channels, ...] as [places, channels]."""
    return as_rows(t.movedim(1, -1))


def _matrices(t: Tensor, groups: int) -> Tensor:
    """[batch, channels, ...] as [batch * groups, channels / groups, places]."""
    batch, channels, *places = t.shape
    return t.reshape(batch * groups, channels // groups, math.prod(places))


def _per_sample(B: Tensor, batch: int, groups: int) -> Tensor:
    """[N, rank / groups] as [batch * groups, N / groups, rank / groups]."""
    n, rank = B.shape
    return B.view(1, groups, n // groups, rank).expand(batch, -1, -1, -1).reshape(batch * groups, n // groups, rank)
