"""Formats of quantised weights: one file each, which recognises, quantises, decodes and packs.

A *format* is what a user names ("nf4"). A *layout* is how its bytes lie, and so how they decode: ops and kernels know
layouts only. NF4 and FP4 are one layout, because their 16 codes are data.
"""

from __future__ import annotations

from torch import nn

from ..reasons import Reason
from . import codes4, float8, int8, mx, zero_points
from .weight import DECODED, LAYOUTS, Format, Layout, QuantizedWeight, rounded_to

FORMATS: dict[str, Format] = {fmt.name: fmt for module in (codes4, int8, float8, mx) for fmt in module.FORMATS}
"""By name; those that can be made. "gptq" and "awq" are read only."""

_READERS = (
    codes4.from_module, int8.from_bitsandbytes, int8.from_torchao, float8.from_torchao, float8.from_scale_inv,
    float8.from_compressed_tensors, mx.from_torchao, mx.from_compressed_tensors,
    zero_points.from_gptq, zero_points.from_awq,
)  # fmt: skip


def from_module(module: nn.Module) -> QuantizedWeight | Reason | None:
    """The quantised weight of a linear layer, by what the layer holds and not by its class; the reason where it has one
    that cannot be read; None where it has none.

    The result is [out_features, in_features] and decodes to the dtype that the layer computes in. It refers to the
    layer's tensors and is not to be kept: merging and moving replace them.
    """
    own = getattr(type(module), "quantized_weight", None)  # an instance takes eight times as long to say no
    if own is not None:
        return own(module)
    for read in _READERS:
        found = read(module)
        if found is not None:
            return found
    return None


__all__ = ["DECODED", "FORMATS", "LAYOUTS", "Format", "Layout", "QuantizedWeight", "from_module", "rounded_to"]
