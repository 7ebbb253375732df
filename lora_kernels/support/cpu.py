"""What the CPU kernels of several ops agree on."""

from __future__ import annotations

import functools

import torch

from ..reasons import Reason
from ..spec import Verdict
from . import cpu_product

UPCAST_ABOVE_ROWS = 4
"""torch's own low-precision path is a matrix-vector loop that beats upcasting the whole weight up to this many rows."""

ATEN = cpu_product.MKL
FEW_ROWS = 4
"""Up to so many rows of x, most of the time goes into reading the weight."""
LARGE_WEIGHT = 1 << 20
"""From so many elements on, a few rows' product takes so long that the way to an op does not count."""
DECODE = Verdict("decode", "few rows: one kernel reads the weight once, and adds a low-rank branch on the way")
UPCAST = Verdict("upcast", "no native matmul for this dtype on this CPU: blocks go through fp32")
NATIVE = Verdict("native", "vendor GEMM in 16 bits, which this CPU has instructions for")
REFUSED_DTYPE = Verdict(None, Reason.DTYPE)


def has_native_matmul(dtype: torch.dtype) -> bool:
    """True where torch's matmul for ``dtype`` is a real kernel on this CPU now, not its slow portable loop.

    16-bit kernels are oneDNN's, which a program can switch off (``torch.backends.mkldnn.enabled``).
    """
    if dtype in (torch.float32, torch.float64):
        return True
    return torch._C._get_mkldnn_enabled() and _onednn_multiplies(dtype)


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, name)())


def is_native_16bit(dtype: torch.dtype) -> bool:
    """True for bf16 and fp16 where this CPU multiplies them itself."""
    return dtype in (torch.bfloat16, torch.float16) and has_native_matmul(dtype)


def reads_weight_once(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel for few rows multiplies ``x`` [..., K] by ``weight`` [N, K]."""
    # stride() and shape take half as long as stride(1) and size(-1).
    return x.dtype == torch.float32 and x.numel() <= FEW_ROWS * x.shape[-1] and weight.stride()[1] == 1


def matmul_verdict(x: torch.Tensor, weight: torch.Tensor, is_k_by_n: bool = False) -> Verdict:
    """How the CPU kernels multiply ``x`` [..., K] by a ``weight`` [N, K] of its dtype ([K, N] where ``is_k_by_n``)."""
    k = x.shape[-1]
    return product_verdict(x.dtype, x.numel() // k if k else 0, weight, is_k_by_n, x.stride()[-1] == 1)


def product_verdict(
    dtype: torch.dtype, rows: int, weight: torch.Tensor, is_k_by_n: bool = False, x_by_rows: bool = True
) -> Verdict:
    """``matmul_verdict`` for an x of so many rows, which lie in one piece each or not."""
    if dtype == torch.float32:
        return cpu_product.choose(rows, x_by_rows, weight, is_k_by_n)
    if dtype == torch.float64:
        return ATEN
    if dtype != torch.bfloat16 and dtype != torch.float16:
        return REFUSED_DTYPE
    if has_native_matmul(dtype) or rows <= UPCAST_ABOVE_ROWS:
        return ATEN
    return UPCAST
