"""Quantised weights of random bytes, for tests of what multiplies by them."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.formats import FORMATS, LAYOUTS, QuantizedWeight


def random_packed(
    n: int, k: int, block: int = 64, nested: bool = False, code: str = "nf4", layout: str = "codes4"
) -> QuantizedWeight:
    """Every byte can occur; the weights' magnitudes are those of a linear layer of k columns."""
    blocks, size = n * k // block, max(k, 1) ** -0.5
    data, codes = torch.randint(256, (n * k // 2, 1), dtype=torch.uint8), FORMATS[code].code.clone()
    if nested:
        indices = torch.randint(256, (blocks,), dtype=torch.uint8)
        scales2, code2 = (torch.rand(-(-blocks // 256)) + 0.5) * size, torch.linspace(-0.9931, 1, 256)
        parts: tuple[Tensor, ...] = (data, indices, codes, scales2, code2, torch.tensor(1.5 * size))
    else:
        parts = (data, (torch.rand(blocks) + 0.5) * 2 * size, codes)
    return QuantizedWeight(code, layout, parts, (n, k), block)


def random_scaled(
    n: int, k: int, layout: str = "int8", block: int | None = None, rows: str | int = "each", special: bool = False
) -> QuantizedWeight:
    """Layout "int8" or "e4m3": every byte can occur, but that numbers that are none only do where ``special``. Scales
    are for "each" row, for "squares" of ``block``, for "all" rows, or in so many rows.
    """
    block = block or max(1, k)
    data = torch.randint(256, (n, k), dtype=torch.uint8)
    if layout == "e4m3" and not special:
        data[data & 127 == 127] = 0
    largest = 128.0 if layout == "int8" else 448.0
    rows_of_scales = {"each": n, "squares": -(-n // block), "all": 1}.get(rows, rows)
    scales = torch.rand(rows_of_scales, -(-k // block)) + 0.5
    parts = data, scales * 2 * max(k, 1) ** -0.5 / largest
    return QuantizedWeight("int8" if layout == "int8" else "float8", layout, parts, (n, k), block)


def decoded(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """[n, k] by plain torch code, in ``dtype`` or the weight's own."""
    parts, layout, n, k, block, own = weight.args
    return LAYOUTS[layout].decode(parts, n, k, block, dtype or own)


def with_part(weight: QuantizedWeight, index: int, part: Tensor) -> QuantizedWeight:
    """The same with another part, which need not fit."""
    parts = (*weight.parts[:index], part, *weight.parts[index + 1 :])
    return QuantizedWeight.of_layer(weight.format, weight.layout, parts, weight.shape, weight.block, weight.dtype)
