"""How the CPU kernels multiply by a quantised weight."""

from __future__ import annotations

import torch

from ..reasons import Reason
from ..spec import Verdict
from . import cpu

LAYOUTS = ("codes4",)
"""That the kernels decode."""
DECODE = Verdict("decode", "few rows: weights are decoded in registers, and never written")
ROWS = Verdict("rows", "some rows: a few rows of the weight at a time are decoded into the nearest cache")
FEW_ROWS = 4
SOME_ROWS = 64
_DECODE_ALL = Verdict("decode", "one pass over the packed weight")
_NO_LAYOUT = Verdict(None, Reason.FORMAT)


def decode_verdict(layout: str) -> Verdict:
    """Whether the kernels decode this layout."""
    return _DECODE_ALL if layout in LAYOUTS else _NO_LAYOUT


def product_verdict(x: torch.Tensor, layout: str, n: int, k: int, is_gradient: bool = False) -> Verdict:
    """How ``x`` [..., K] is multiplied by a packed [N, K], or [..., N] by its transpose where ``is_gradient``."""
    if layout not in LAYOUTS:
        return _NO_LAYOUT
    if x.dtype == torch.float64:
        return cpu.REFUSED_DTYPE
    rows = x.shape[:-1].numel()
    if rows <= FEW_ROWS and not is_gradient:
        return DECODE
    if rows <= SOME_ROWS and not is_gradient:
        return ROWS
    return panels_verdict(x)


def panels_verdict(x: torch.Tensor) -> Verdict:
    """How many rows are multiplied."""
    return _PANELS[cpu.has_native_matmul(x.dtype)]


_PANELS = {
    True: Verdict("aten", "a few megabytes of the weight at a time are decoded for the vendor's GEMM"),
    False: Verdict("upcast", "no native matmul for this dtype on this CPU: panels of the weight go through fp32"),
}
