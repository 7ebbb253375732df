"""The ops over packed weights as the CUDA backend serves them, emulated: what several test files of it share."""

from __future__ import annotations

import types

import emulator
import pytest
import torch
from pretended_gpu import pretend_gpu

from lora_kernels import _native, dispatch
from lora_kernels.ops import dequantize, linear_packed, lora_linear, lora_linear_packed

SCALING, SEED = 1.7, -987654321012345


@pytest.fixture(scope="module", autouse=True)
def library():
    """The emulated ops of this module's tests."""
    decoding = torch.library.Library("lora_kernels_emulated_dequantize", "DEF")
    arguments, returns = dequantize.SPEC.schema.split(" -> ")
    decoding.define(f"{dequantize.SPEC.name}{arguments[:-1]}, str schedule) -> {returns}")
    packed = torch.library.Library("lora_kernels_emulated_packed", "DEF")
    arguments, returns = lora_linear_packed.SPEC.schema.split(" -> ")
    packed.define(f"{lora_linear_packed.SPEC.name}{arguments[:-1]}, str schedule) -> {returns}")
    emulator.load_dequantize()
    emulator.load_lora_linear_packed()
    yield
    decoding._destroy()
    packed._destroy()


@pytest.fixture(autouse=True)
def cuda_on_the_cpu(monkeypatch):
    """Tensors on the CPU are served by the CUDA backend, emulated; memory that nobody wrote is NaN."""
    emulator.load_lora_linear()
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(_native, "cuda", types.SimpleNamespace())
    monkeypatch.setitem(dispatch._ORDER, "cpu", ("cuda", "reference"))
    emulated = {
        "dequantize": torch.ops.lora_kernels_emulated_dequantize.dequantize,
        "lora_linear_packed": torch.ops.lora_kernels_emulated_packed.lora_linear_packed,
        "lora_linear": torch.ops.lora_kernels_emulated.lora_linear,
        "lora_linear_backward": torch.ops.lora_kernels_emulated.lora_linear_backward,
    }
    for name, op in emulated.items():
        monkeypatch.setitem(dispatch._native_ops, name, op)
    for op, prefix in ((lora_linear_packed, "lora_linear"), (linear_packed, "linear")):
        for name in ("slabs", "slabs_backward"):
            monkeypatch.setattr(op, f"_{name}", getattr(torch.ops.lora_kernels_emulated, f"{prefix}_{name}"))
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms, which would import a compiler
    yield
    torch.set_deterministic_debug_mode("default")


def make(m, n, k, rank, dtype, adapter=None, bias=True):
    """(x, lora_A, lora_B, bias)."""
    adapter = adapter or dtype
    x, lora_A = torch.randn(2, m, k).to(dtype), (torch.randn(rank, k) / k**0.5).to(adapter)
    lora_B = (torch.randn(n, rank) / rank**0.5).to(adapter)
    return x, lora_A, lora_B, torch.randn(n).to(dtype) if bias else None


def results(function, weight, operands, grad_y, p):
    """[y, dX, dA, dB]."""
    x, lora_A, lora_B, bias = operands
    leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
    y = function(leaves[0], weight, *leaves[1:], bias, scaling=SCALING, dropout_p=p, training=True, seed=SEED)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def unfused(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p, training, seed):
    """By separate torch calls in the dtype of x."""
    given = torch.tensor([seed]) if dropout_p > 0 else None
    dropped = lora_linear.dropped(x, given, dropout_p)
    branch = torch.nn.functional.linear(torch.nn.functional.linear(dropped, lora_A), lora_B)
    return torch.nn.functional.linear(x, weight, bias) + branch * scaling
