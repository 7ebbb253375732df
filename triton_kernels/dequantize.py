"""The kernel of ``dequantize``: a program decodes some blocks of packed weights, of which each has one scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launching import Launch, on_device

# ------------------------------------------------------------------------------------------------ device code


class Codes4(NamedTuple):
    """The parts of layout "codes4"; the last three are None where scales are float32."""

    data: Any
    scales: Any
    code: Any
    scales2: Any
    code2: Any
    offset: Any


@triton.jit
def block_scales(weight, block, exists):
    """float32: the scales of these blocks. Nothing may fuse the product and the sum: see ``NO_FUSION``."""
    scales = tl.load(weight.scales + block, mask=exists, other=0)
    if weight.scales2 is not None:
        scales2 = tl.load(weight.scales2 + block // 256, mask=exists, other=0.0)
        scales = tl.load(weight.code2 + scales.to(tl.int32)) * scales2 + tl.load(weight.offset)
    return scales


@triton.jit
def _dequantize(weight, out, blocks, BLOCK_BYTES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """``blocks`` are those of the weight, of BLOCK_BYTES packed bytes each; ``out`` has them one behind the other."""
    column_blocks = tl.cdiv(BLOCK_BYTES, BLOCK_COLUMNS)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column0 = tl.program_id(0) % column_blocks * BLOCK_COLUMNS
    column = column0 + tl.arange(0, BLOCK_COLUMNS)
    exists = (row < blocks)[:, None] & (column < BLOCK_BYTES)[None, :]
    packed = tl.load(weight.data + row[:, None] * BLOCK_BYTES + column[None, :], mask=exists, other=0)
    scale = block_scales(weight, row, row < blocks)[:, None]
    # The table is one line of the L1 cache: 16 selections would be more instructions than a load.
    first = tl.load(weight.code + (packed >> 4).to(tl.int32)) * scale
    second = tl.load(weight.code + (packed & 15).to(tl.int32)) * scale
    weights = tl.interleave(first, second).to(out.dtype.element_ty)
    column = 2 * column0 + tl.arange(0, 2 * BLOCK_COLUMNS)
    exists = (row < blocks)[:, None] & (column < 2 * BLOCK_BYTES)[None, :]
    tl.store(out + row[:, None] * (2 * BLOCK_BYTES) + column[None, :], weights, mask=exists)


# -------------------------------------------------------------------------------------------------- host code

NO_FUSION = {"enable_fp_fusion": False}
"""For the compiler: a scale's product and sum round each, as whoever quantised it computed them; one fused operation
differs in the last bit of some.
"""


def dequantize(weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype) -> Tensor:
    """The op ``dequantize``."""
    out = weight[0].new_empty((n, k), dtype=dtype)
    if out.numel():
        with on_device(out):
            dequantize_launch(out, weight, block).run()
    return out


def dequantize_launch(out: Tensor, weight: list[Tensor], block: int) -> Launch:
    """How ``out`` [n, k] is filled from the parts of layout "codes4"."""
    parts = Codes4(*weight, *[None] * (6 - len(weight)))
    block_bytes, blocks = block // 2, out.numel() // block
    tile = configs.packed_tile(block_bytes)
    programs = configs.blocks(blocks, tile.rows) * configs.blocks(block_bytes, tile.columns)
    constants = {"BLOCK_BYTES": block_bytes, "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, **NO_FUSION}
    return Launch(_dequantize, (programs,), (parts, out, blocks), constants, tile.num_warps, num_stages=1)
