"""``lora_linear`` of a layer whose weights are spread over processes: each computes with its own part, then they sum.

The two ways to split a layer are Megatron-LM's (Shoeybi et al., 2019). An adapter is split as PEFT splits it:

- by columns of y: a process has rows of W and of lora_B, all of x and of lora_A, and gets its columns of y. Backward,
  the gradients of x and of s = dropout(x) Aᵀ are sums over the processes.
- by rows of Wᵀ: a process has columns of W and of lora_A, those features of x, and all of lora_B. Forward, y and s are
  sums over the processes.

So what crosses is [tokens, in_features] or [tokens, out_features], and [tokens, rank]: as in PEFT, and no weight. A sum
that nobody needs is not formed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch
from . import eager, lora_linear
from .eager import not_a_view

_NO_BIAS = None


def _summed(t: Tensor, group: Any) -> Tensor:
    """The sum of the processes' t, in t's memory where that is contiguous."""
    t = t.contiguous()
    dist.all_reduce(t, group=group)
    return t


class ColumnParallelFunction(torch.autograd.Function):
    """``lora_linear`` by columns, with autograd.

    The arguments are ``lora_linear``'s, checked, and the processes' group. Saves what ``LoRALinearFunction`` saves.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        *args, ctx.group = args  # type: ignore[assignment]
        return not_a_view(eager.forward(ctx, lora_linear.SPEC, tuple(args), lora_linear.save)[0])

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:  # type: ignore[override]
        return *lora_linear.gradients(ctx, grad_y, functools.partial(_column_parallel_backward, ctx.group)), None


def _column_parallel_backward(
    group: Any, grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of s is on its way while the op forms the others. Each process's part of x's has its own part of
    the branch in it: all of them drop the same elements.
    """
    if need_A:
        grad_s = (grad_y @ lora_B.to(grad_y.dtype) * scaling).contiguous()
        sum_of_s = dist.all_reduce(grad_s, group=group, async_op=True)
    grad_x = grad_A = grad_B = x.new_empty(0)
    if need_x or need_B:
        grad_x, _, grad_B = lora_linear.run_backward(
            grad_y, x, s, weight, lora_A, lora_B, seed, scaling, dropout_p, need_x, False, need_B
        )
    if need_x:
        grad_x = _summed(grad_x, group)
    if need_A:
        sum_of_s.wait()
        # grad_sᵀ dropout(x): the gradient of lora_A in a layer that gives s itself.
        rank = lora_A.shape[0]
        itself = torch.eye(rank, dtype=lora_B.dtype, device=lora_B.device)
        not_read = weight.new_empty((rank, weight.shape[1]))
        _, grad_A, _ = lora_linear.run_backward(
            grad_s, x, s, not_read, lora_A, itself, seed, 1.0, dropout_p, False, True, False
        )
    return grad_x, grad_A, grad_B


class RowParallelFunction(torch.autograd.Function):
    """``lora_linear`` by rows, with autograd.

    The arguments are ``lora_linear``'s, checked, of which the bias is whole in every process, and their group. Saves
    what ``LoRALinearFunction`` saves.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        *args, group = args  # type: ignore[assignment]
        x, weight, lora_A, lora_B, bias, *dropout = args
        y, s = dispatch.run(lora_linear.SPEC, x, weight, lora_A, lora_B, _NO_BIAS, *dropout)
        is_B_trained = ctx.needs_input_grad[3]
        if is_B_trained:
            s = s.contiguous()
            sum_of_s = dist.all_reduce(s, group=group, async_op=True)
        y = _with_bias(_summed(y, group), bias)
        if is_B_trained:
            sum_of_s.wait()
        lora_linear.save(ctx, tuple(args), (y, s))
        eager.keep_what_was_asked(ctx)
        return not_a_view(y)

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:  # type: ignore[override]
        return *lora_linear.gradients(ctx, grad_y, lora_linear.run_backward), None


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias in y's memory: once, after the sum over the processes."""
    return y if bias is None else y.add_(bias)


def column_parallel(args: tuple, group: Any) -> Tensor:
    """This process's columns of y [..., out_features / processes]. ``args``: of the op ``lora_linear``, its shards."""
    if _has_gradients(args):
        return ColumnParallelFunction.apply(*args, group)
    return dispatch.run(lora_linear.INFERENCE, *args)[0]


def row_parallel(args: tuple, group: Any) -> Tensor:
    """y [..., out_features], in every process. ``args`` as in ``column_parallel``; the bias is whole."""
    if _has_gradients(args):
        return RowParallelFunction.apply(*args, group)
    x, weight, lora_A, lora_B, bias, *dropout = args
    y = dispatch.run(lora_linear.INFERENCE, x, weight, lora_A, lora_B, _NO_BIAS, *dropout)[0]
    return _with_bias(_summed(y, group), bias)


def _has_gradients(args: tuple) -> bool:
    differentiable = lora_linear.LoRALinearFunction.differentiable
    return torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in differentiable)
