"""Operands of gated_activation, and what plain torch makes of them."""

from __future__ import annotations

import torch
from numerics import assert_as_accurate
from torch import Tensor

from lora_kernels.ops.gated_activation import ACTIVATIONS

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(), (1,), (7,), (0, 5), (3, 129), (5, 4, 264)]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and the gradient of h; gate is wide enough for both of an activation's ends, and now and then zero,
    where relu has a corner.
    """
    gate = 4 * torch.randn(shape)
    gate.view(-1)[3::5] = 0
    return gate.to(dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def plain(gate: Tensor, up: Tensor, grad_h: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """h and the gradients of gate and up, by torch in ``dtype``."""
    gate, up, grad_h = (t.detach().cpu().to(dtype) for t in (gate, up, grad_h))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    h = ACTIVATIONS[activation](gate) * up
    return h.detach(), *torch.autograd.grad(h, (gate, up), grad_h)


def check(results: tuple[Tensor, ...], gate: Tensor, up: Tensor, grad_h: Tensor, activation: str) -> None:
    """``results``: h and the gradients of gate and up."""
    given = gate, up, grad_h, activation
    unfused, exact = plain(*given, gate.dtype), plain(*given, FP64)
    for name, ours, torchs, right in zip(("h", "dgate", "dup"), results, unfused, exact, strict=True):
        assert ours.dtype == gate.dtype
        assert_as_accurate(ours.cpu(), torchs, right, name)
