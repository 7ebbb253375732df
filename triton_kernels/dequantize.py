"""The kernels of ``dequantize``, one for each kind of layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.formats.scaled import rows_per_scale

from . import configs
from .launching import Launch, on_device

# ------------------------------------------------------------------------------------------------ device code


class Codes4(NamedTuple):
    """The parts of layouts "codes4" and "codes4_low"; the last three are None where scales are float32."""

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
def _codes4(
    weight, out, blocks,
    EVEN_IS_LOW: tl.constexpr, BLOCK_BYTES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program decodes some blocks, of which each has one scale. ``blocks`` are those of the weight, of BLOCK_BYTES
    packed bytes each; ``out`` has them one behind the other.
    """
    column_blocks = tl.cdiv(BLOCK_BYTES, BLOCK_COLUMNS)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column0 = tl.program_id(0) % column_blocks * BLOCK_COLUMNS
    column = column0 + tl.arange(0, BLOCK_COLUMNS)
    exists = (row < blocks)[:, None] & (column < BLOCK_BYTES)[None, :]
    packed = tl.load(weight.data + row[:, None] * BLOCK_BYTES + column[None, :], mask=exists, other=0)
    scale = block_scales(weight, row, row < blocks)[:, None]
    # The table is one line of the L1 cache: 16 selections would be more instructions than a load.
    high = tl.load(weight.code + (packed >> 4).to(tl.int32)) * scale
    low = tl.load(weight.code + (packed & 15).to(tl.int32)) * scale
    weights = (tl.interleave(low, high) if EVEN_IS_LOW else tl.interleave(high, low)).to(out.dtype.element_ty)
    column = 2 * column0 + tl.arange(0, 2 * BLOCK_COLUMNS)
    exists = (row < blocks)[:, None] & (column < 2 * BLOCK_BYTES)[None, :]
    tl.store(out + row[:, None] * (2 * BLOCK_BYTES) + column[None, :], weights, mask=exists)


class Scaled(NamedTuple):
    """The parts of layouts "int8" and "e4m3"."""

    data: Any
    scales: Any


@triton.jit
def int8_numbers(data):
    """float32 of bytes."""
    return data.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def e4m3_numbers(data):
    """float32 of bytes: exponent and fraction are moved to where float32 has them, which is a factor of 2^(127 - 7),
    also of subnormal numbers. Triton has the type, but not for GPUs before sm_89.
    """
    bits = data.to(tl.int32)
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    numbers = moved.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), numbers)


@triton.jit
def _scaled(
    weight, out, n, k, block_rows,
    numbers: tl.constexpr, SCALE_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program decodes a tile of [n, k]. ``block_rows`` rows share a scale, and SCALE_COLUMNS columns, or all of them
    where that is None.
    """
    tiles = tl.cdiv(k, BLOCK_COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column0 = tl.program_id(0) % tiles * BLOCK_COLUMNS
    column = column0 + tl.arange(0, BLOCK_COLUMNS)
    exists = (row < n)[:, None] & (column < k)[None, :]
    data = tl.load(weight.data + row[:, None] * k + column[None, :], mask=exists, other=0)
    if SCALE_COLUMNS is None:
        scale = tl.load(weight.scales + row // block_rows, mask=row < n, other=0.0)[:, None]
    else:
        scales = weight.scales + row // block_rows * tl.cdiv(k, SCALE_COLUMNS)
        if SCALE_COLUMNS % BLOCK_COLUMNS == 0:  # a tile lies within a block of columns
            scale = tl.load(scales + column0 // SCALE_COLUMNS, mask=row < n, other=0.0)[:, None]
        else:
            scale = tl.load(scales[:, None] + (column // SCALE_COLUMNS)[None, :], mask=exists, other=0.0)
    weights = (numbers(data) * scale).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * k + column[None, :], weights, mask=exists)


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
            dequantize_launch(out, weight, layout, block).run()
    return out


def dequantize_launch(out: Tensor, weight: list[Tensor], layout: str, block: int) -> Launch:
    """How ``out`` [n, k] is filled from the parts of a layout."""
    if layout in _NUMBERS:
        return _scaled_launch(out, Scaled(*weight), layout, block)
    return _codes4_launch(out, Codes4(*weight, *[None] * (6 - len(weight))), layout == "codes4_low", block)


_NUMBERS = {"int8": int8_numbers, "e4m3": e4m3_numbers}


def _codes4_launch(out: Tensor, parts: Codes4, even_is_low: bool, block: int) -> Launch:
    block_bytes, blocks = block // 2, out.numel() // block
    tile = configs.packed_tile(block_bytes)
    programs = configs.blocks(blocks, tile.rows) * configs.blocks(block_bytes, tile.columns)
    constants = {
        "EVEN_IS_LOW": even_is_low, "BLOCK_BYTES": block_bytes, "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns,
        **NO_FUSION,
    }  # fmt: skip
    return Launch(_codes4, (programs,), (parts, out, blocks), constants, tile.num_warps, num_stages=1)


def _scaled_launch(out: Tensor, parts: Scaled, layout: str, block: int) -> Launch:
    n, k = out.shape
    columns = block if block < k else None
    tile = configs.scaled_tile(k, columns)
    programs = configs.blocks(n, tile.rows) * configs.blocks(k, tile.columns)
    constants = {
        "numbers": _NUMBERS[layout], "SCALE_COLUMNS": columns, "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns,
    }  # fmt: skip
    args = (parts, out, n, k, rows_per_scale(parts.scales, n, block))
    return Launch(_scaled, (programs,), args, constants, tile.num_warps, num_stages=1)
