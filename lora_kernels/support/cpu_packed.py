"""How the CPU kernels multiply by a quantised weight."""

from __future__ import annotations

import torch

from ..spec import Verdict
from . import cpu, cpu_product
from .packed import LAYOUTS, NO_KERNEL, TORCH_DECODED

DECODE = Verdict("decode", "few rows: weights are decoded in registers, and never written")
ROWS = Verdict("rows", "some rows: a few rows of the weight at a time are decoded into the nearest cache")
FEW_ROWS = 4
SOME_ROWS = 64
SOME_ROWS_16BIT = {torch.bfloat16: 24, torch.float16: 8}
"""Up to so many rows; where the CPU multiplies 16 bits itself, its GEMM is worth a decoded panel sooner. bf16 is
multiplied as it is, where there are instructions for it, but fp16 in fp32.
"""
_DECODE_ALL = Verdict("decode", "one pass over the packed weight")


def decode_verdict(layout: str) -> Verdict:
    """Whether the kernels decode this layout."""
    return _DECODE_ALL if layout in LAYOUTS else NO_KERNEL


def product_verdict(x: torch.Tensor, layout: str, n: int, k: int, is_gradient: bool = False) -> Verdict:
    """How ``x`` [..., K] is multiplied by a packed [N, K], or [..., N] by its transpose where ``is_gradient``."""
    if layout not in LAYOUTS:
        return TORCH_DECODED
    if x.dtype == torch.float64:
        return cpu.REFUSED_DTYPE
    rows = x.shape[:-1].numel()
    if rows <= FEW_ROWS and not is_gradient:
        return DECODE
    if not is_gradient and rows <= (SOME_ROWS_16BIT[x.dtype] if cpu.is_native_16bit(x.dtype) else SOME_ROWS):
        return ROWS
    return panels_verdict(x, n, k, is_gradient)


def panels_verdict(x: torch.Tensor, n: int, k: int, is_gradient: bool = False) -> Verdict:
    """How many rows are multiplied: panel by panel of the decoded weight."""
    if x.dtype == torch.float32:
        sides = (k, n) if is_gradient else (n, k)
        product = cpu_product.choose_for_decoded(x.shape[:-1].numel(), *sides, is_gradient)
        return Verdict(product.schedule, f"{_PANELS}; {product.reason}")
    if not cpu.has_native_matmul(x.dtype):
        return _UPCAST
    return _NATIVE_GRADIENT if is_gradient else _NATIVE


_PANELS = "a few megabytes of the weight at a time are decoded for a GEMM"
_NATIVE = Verdict("aten", f"{_PANELS} in 16 bits, which this CPU has instructions for")
_NATIVE_GRADIENT = Verdict(cpu.NATIVE.schedule, _NATIVE.reason)
"""The gradients of an adapter of the same dtype, too, without going through fp32."""
_UPCAST = Verdict("upcast", f"{_PANELS} in fp32: this CPU has no instructions for this dtype")
