"""Layouts "int8" and "e4m3": a number of eight bits per weight, and a scale per rectangle of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .weight import Layout, register


class Scaled(Layout):
    """Parts, for a weight [N, K]:

    0. data: uint8 [N, K], the bytes of the numbers.
    1. scales: float32 [N, K/block], one per row, or [N/block, K/block], or [1, 1]; divisions are rounded up.

    ``block`` columns share a scale. A weight is ``number * scale`` in float32, rounded once to the dtype asked for.
    """

    def __init__(self, name: str, number: torch.dtype) -> None:
        self.name = name  # type: ignore[misc]
        self.number = number

    def check(self, parts: Sequence[Tensor], n: int, k: int, block: int) -> None:
        if len(parts) != 2:
            raise ValueError(f"{self.name}: 2 parts are expected, got {len(parts)}")
        data, scales = parts
        if data.dtype != torch.uint8 or data.numel() != n * k:
            raise ValueError(
                f"{self.name}: data must be torch.uint8 of {n * k} elements for a weight of {n}x{k}, "
                f"got {data.dtype} of {data.numel()}"
            )
        if block < 1:
            raise ValueError(f"{self.name}: block must be at least 1, got {block}")
        columns = -(-k // block)
        shapes = [(n, columns), (-(-n // block), columns), (1, columns)]
        if scales.dtype != torch.float32 or tuple(scales.shape) not in shapes:
            shown = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ValueError(
                f"{self.name}: scales must be torch.float32 {shown} for a weight of {n}x{k} in blocks of {block}, got "
                f"{scales.dtype} {tuple(scales.shape)}"
            )

    def rows(self, parts: Sequence[Tensor], n: int, k: int, block: int, begin: int, end: int) -> tuple[Tensor, ...]:
        data, scales = parts
        per_scale = rows_per_scale(scales, n, block)
        if 1 < per_scale < n:  # a block of rows need not begin where a scale does
            scales = scales.repeat_interleave(per_scale, dim=0)[begin:end]
        elif per_scale == 1:
            scales = scales[begin:end]
        return data.view(n, k)[begin:end], scales.contiguous()

    def decode(self, parts: Sequence[Tensor], n: int, k: int, block: int, dtype: torch.dtype) -> Tensor:
        data, scales = parts
        weights = data.view(self.number).view(n, k).to(torch.float32)
        for dim, (per_scale, size) in enumerate(((rows_per_scale(scales, n, block), n), (block, k))):
            if scales.shape[dim] not in (1, size):
                scales = scales.repeat_interleave(per_scale, dim=dim).narrow(dim, 0, size)
        return (weights * scales).to(dtype)


def rows_per_scale(scales: Tensor, n: int, block: int) -> int:
    """How many rows of an [n, k] weight share one row of scales."""
    return {n: 1, 1: n}.get(scales.shape[0], block)


INT8 = register(Scaled("int8", torch.int8))
E4M3 = register(Scaled("e4m3", torch.float8_e4m3fn))
