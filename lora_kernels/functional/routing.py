"""Tokens on their way to the experts of a mixture, and back: rows sorted by expert, results weighted and summed.

Forward and backward only gather rows and sum them in the order of a token's choices, so their bits are the same on
every run; indexing by torch scatters in backward instead, with atomics on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which of ``tokens * top_k`` choices is in which row, once the rows are sorted by expert."""

    choices: Tensor
    """int64 [tokens * top_k]: the choice (token * top_k + place in its list) that each sorted row is."""
    rows: Tensor
    """int64 [tokens * top_k]: the sorted row of each choice."""
    offsets: Tensor
    """int32 [experts]: where each expert's rows end. Rows behind are of experts that are not here."""
    top_k: int


def route(expert_ids: Tensor, experts: int) -> Routing:
    """Sorts the choices of tokens by expert.

    Args:
        expert_ids: integer [tokens, top_k], from 0 on. Ids of ``experts`` and more are somebody else's (expert
            parallelism).
        experts: how many there are.

    Returns:
        The order; choices of one expert are in the order of tokens.
    """
    ids, choices = torch.sort(expert_ids.reshape(-1), stable=True)
    rows = torch.empty_like(choices)
    rows[choices] = torch.arange(len(choices), device=choices.device)
    each = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    return Routing(choices, rows, torch.searchsorted(ids, each, right=True, out_int32=True), expert_ids.shape[1])


def permute(x: Tensor, routing: Routing) -> Tensor:
    """x [tokens, features] as rows sorted by expert, [tokens * top_k, features]."""
    return _Permute.apply(x, *routing)


def combine(y: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """The results of each token's experts, weighted and summed.

    Args:
        y: [tokens * top_k, features], rows sorted by expert.
        weights: [tokens, top_k].

    Returns:
        [tokens, features], of the wider dtype. Saved for backward: weights, and y where the weights have a gradient.
    """
    return _Combine.apply(y, weights, *routing)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, choices: Tensor, rows: Tensor, offsets: Tensor, top_k: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        ctx.top_k = top_k
        return x.index_select(0, choices // top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return _of_tokens(grad, rows, ctx.top_k).sum(1), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, weights: Tensor, choices: Tensor, rows: Tensor, offsets: Tensor, top_k: int
    ) -> Tensor:
        ctx.y_dtype = y.dtype
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights, choices, rows)
        wide = torch.promote_types(y.dtype, weights.dtype)
        of_tokens = _of_tokens(y, rows, top_k).to(wide)
        return torch.bmm(weights.to(wide).unsqueeze(1), of_tokens).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        y, weights, choices, rows = ctx.saved_tensors
        top_k = weights.shape[1]
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            of_rows = weights.reshape(-1, 1).index_select(0, choices).to(grad.dtype)
            grad_y = grad.index_select(0, choices // top_k).mul_(of_rows).to(ctx.y_dtype)
        if ctx.needs_input_grad[1]:
            of_tokens = _of_tokens(y, rows, top_k).to(grad.dtype)
            grad_weights = torch.bmm(of_tokens, grad.unsqueeze(2)).squeeze(2).to(weights.dtype)
        return grad_y, grad_weights, None, None, None, None


def _of_tokens(sorted_rows: Tensor, rows: Tensor, top_k: int) -> Tensor:
    """[tokens * top_k, features], sorted by expert, as [tokens, top_k, features]."""
    return sorted_rows.index_select(0, rows).view(len(rows) // top_k, top_k, sorted_rows.shape[1])
