"""What the CPU kernels of several ops agree on."""

from __future__ import annotations

import functools

import torch

from .. import _native
from ..reasons import Reason
from ..spec import Verdict

UPCAST_ABOVE_ROWS = 4
"""torch's own low-precision path is a matrix-vector loop that beats upcasting the whole weight up to this many rows."""

ONEDNN_FROM_ROWS = 128
"""oneDNN brings the weight into a layout of its own first, which pays from about this many rows on."""

ATEN = Verdict("aten", "vendor GEMM, low-rank branch accumulated into its output")
ONEDNN = Verdict("onednn", "oneDNN's GEMM, taken on AMD's processors; low-rank branch accumulated into its output")
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


@functools.cache
def prefers_onednn() -> bool:
    """True where torch multiplies fp32 by MKL and has oneDNN too, on AMD's processors: there oneDNN was faster."""
    module = _native.cpu
    return bool(module is not None and module.onednn and module.amd and torch.backends.mkl.is_available())


def reads_weight_once(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel for few rows multiplies ``x`` [..., K] by ``weight`` [N, K]."""
    # stride() and shape take half as long as stride(1) and size(-1).
    return x.dtype == torch.float32 and x.numel() <= FEW_ROWS * x.shape[-1] and weight.stride()[1] == 1


def matmul_verdict(x: torch.Tensor) -> Verdict:
    """How the CPU kernels multiply ``x`` [..., K] by a weight of its dtype."""
    dtype = x.dtype
    if dtype == torch.float32:
        large = x.numel() >= ONEDNN_FROM_ROWS * x.shape[-1] and x.numel() > 0
        return ONEDNN if large and prefers_onednn() and torch._C._get_mkldnn_enabled() else ATEN
    if dtype == torch.float64:
        return ATEN
    if dtype != torch.bfloat16 and dtype != torch.float16:
        return REFUSED_DTYPE
    if has_native_matmul(dtype) or x.numel() <= UPCAST_ABOVE_ROWS * x.shape[-1]:
        return ATEN
    return UPCAST
