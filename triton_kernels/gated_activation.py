"""The kernels of ``gated_activation`` and its gradients: a program has a block of elements, in float32 inside."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launching import Launch, on_device

# ------------------------------------------------------------------------------------------------ device code


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)), and what it lacks to 1: neither is the difference of numbers that nearly agree."""
    small = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + small)
    return tl.where(z < 0.0, small * larger, larger), tl.where(z < 0.0, larger, small * larger)


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """Of the activation at x. (1 + tanh(u)) / 2 is the sigmoid of 2 u."""
    if ACTIVATION == "silu":
        sigmoid, rest = _sigmoid(x)
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * rest)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        sigmoid, rest = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        value = x * sigmoid
        slope = sigmoid + value * rest * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        tl.static_assert(ACTIVATION == "relu")
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, x - x)
    return value, slope


@triton.jit
def _block(count, BLOCK: tl.constexpr):
    """Which elements this program has, and whether they exist."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < count


@triton.jit
def _forward(gate, up, h, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i, exists = _block(count, BLOCK)
    value, _ = _value_and_slope(tl.load(gate + i, mask=exists, other=0.0).to(tl.float32), ACTIVATION)
    value *= tl.load(up + i, mask=exists, other=0.0).to(tl.float32)
    tl.store(h + i, value.to(h.dtype.element_ty), mask=exists)


@triton.jit
def _backward(grad_h, gate, up, grad_gate, grad_up, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i, exists = _block(count, BLOCK)
    value, slope = _value_and_slope(tl.load(gate + i, mask=exists, other=0.0).to(tl.float32), ACTIVATION)
    grad = tl.load(grad_h + i, mask=exists, other=0.0).to(tl.float32)
    other = tl.load(up + i, mask=exists, other=0.0).to(tl.float32)
    tl.store(grad_gate + i, (grad * other * slope).to(grad_gate.dtype.element_ty), mask=exists)
    tl.store(grad_up + i, (grad * value).to(grad_up.dtype.element_ty), mask=exists)


# -------------------------------------------------------------------------------------------------- host code


def forward(gate: Tensor, up: Tensor, activation: str, h: Tensor) -> None:
    """``h`` is filled; all are contiguous, and h may be gate or up."""
    if h.numel():
        with on_device(gate):
            forward_launch(gate, up, activation, h).run()


def backward(grad_h: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor) -> None:
    """``grad_gate`` and ``grad_up`` are filled; all are contiguous, and these may be gate and up."""
    if grad_h.numel():
        with on_device(gate):
            backward_launch(grad_h, gate, up, activation, grad_gate, grad_up).run()


def forward_launch(gate: Tensor, up: Tensor, activation: str, h: Tensor) -> Launch:
    """How ``h`` is filled."""
    return _launch(_forward, (gate, up, h), activation)


def backward_launch(
    grad_h: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor
) -> Launch:
    """How the gradients are filled."""
    return _launch(_backward, (grad_h, gate, up, grad_gate, grad_up), activation)


def _launch(kernel: object, tensors: tuple[Tensor, ...], activation: str) -> Launch:
    count = tensors[0].numel()
    constants = {"ACTIVATION": activation, "BLOCK": configs.ELEMENTWISE_BLOCK}
    grid = (configs.blocks(count, configs.ELEMENTWISE_BLOCK),)
    return Launch(kernel, grid, (*tensors, count), constants, num_warps=4, num_stages=1)
