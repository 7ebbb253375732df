"""Packed weights for tests: made by a plain quantiser, decoded by plain torch code, which is the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = torch.tensor([0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25])
CODES = {"nf4": NF4, "fp4": torch.cat([FP4, -FP4])}


@dataclass
class Packed:
    """A weight of layout codes4 as the ops take it."""

    parts: list[Tensor]
    n: int
    k: int
    block: int
    dtype: torch.dtype = torch.float32

    @property
    def args(self) -> tuple:
        return self.parts, "codes4", self.n, self.k, self.block, self.dtype

    def to(self, dtype: torch.dtype) -> Packed:
        return replace(self, dtype=dtype)

    def with_part(self, index: int, part: Tensor) -> Packed:
        return replace(self, parts=[*self.parts[:index], part, *self.parts[index + 1 :]])

    def scales(self) -> Tensor:
        scales = self.parts[1]
        if len(self.parts) == 3:
            return scales
        scales2, code2, offset = self.parts[3:]
        return code2[scales.int()] * scales2.repeat_interleave(256)[: scales.numel()] + offset

    def decoded(self) -> Tensor:
        """[n, k] of ``dtype``: one rounded product, then one rounding."""
        data = self.parts[0].view(-1).int()
        codes = self.parts[2][torch.stack([data >> 4, data & 15], dim=1).view(-1)]
        return (codes * self.scales().repeat_interleave(self.block)).view(self.n, self.k).to(self.dtype)


def random_packed(n: int, k: int, block: int = 64, nested: bool = False, code: str = "nf4") -> Packed:
    """Every byte can occur; the weights' magnitudes are those of a linear layer of k columns."""
    blocks, size = n * k // block, max(k, 1) ** -0.5
    data = torch.randint(256, (n * k // 2, 1), dtype=torch.uint8)
    if not nested:
        return Packed([data, (torch.rand(blocks) + 0.5) * 2 * size, CODES[code].clone()], n, k, block)
    code2 = torch.linspace(-0.9931, 1, 256)
    scales2 = (torch.rand(-(-blocks // 256)) + 0.5) * size
    indices = torch.randint(256, (blocks,), dtype=torch.uint8)
    return Packed([data, indices, CODES[code].clone(), scales2, code2, torch.tensor(1.5 * size)], n, k, block)
