"""Quantised weights of random bytes, for tests of what multiplies by them."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.formats import FORMATS, LAYOUTS, QuantizedWeight


def random_packed(n: int, k: int, block: int = 64, nested: bool = False, code: str = "nf4") -> QuantizedWeight:
    """Every byte can occur; the weights' magnitudes are those of a linear layer of k columns."""
    blocks, size = n * k // block, max(k, 1) ** -0.5
    data, codes = torch.randint(256, (n * k // 2, 1), dtype=torch.uint8), FORMATS[code].code.clone()
    if nested:
        indices = torch.randint(256, (blocks,), dtype=torch.uint8)
        scales2, code2 = (torch.rand(-(-blocks // 256)) + 0.5) * size, torch.linspace(-0.9931, 1, 256)
        parts: tuple[Tensor, ...] = (data, indices, codes, scales2, code2, torch.tensor(1.5 * size))
    else:
        parts = (data, (torch.rand(blocks) + 0.5) * 2 * size, codes)
    return QuantizedWeight(code, "codes4", parts, (n, k), block)


def decoded(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """[n, k] by plain torch code, in ``dtype`` or the weight's own."""
    parts, layout, n, k, block, own = weight.args
    return LAYOUTS[layout].decode(parts, n, k, block, dtype or own)


def with_part(weight: QuantizedWeight, index: int, part: Tensor) -> QuantizedWeight:
    """The same with another part, which need not fit."""
    parts = (*weight.parts[:index], part, *weight.parts[index + 1 :])
    return QuantizedWeight.of_layer(weight.format, weight.layout, parts, weight.shape, weight.block, weight.dtype)
