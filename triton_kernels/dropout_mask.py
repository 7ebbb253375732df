"""The dropout mask in Triton: as a tile in registers for other kernels, and as a tensor for the op ``dropout_mask``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import philox

from .launching import Launch

_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 256


@triton.jit
def keep_tile(seed, rows, first_column, columns, threshold, BLOCK_COLUMNS: tl.constexpr, seed_step=None):
    """The mask of some rows and of BLOCK_COLUMNS columns from ``first_column``, a multiple of 8, in a matrix that is
    ``columns`` wide: bool [rows, BLOCK_COLUMNS], True where an element is kept. ``philox.py`` defines it.

    seed_step: what a member's seed is more than the pack's; None: nothing.
    """
    key = tl.load(seed)
    if seed_step is not None:
        key += seed_step
    group = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    # In int64: randint4x then takes the counter's second word from the upper half.
    counter = rows.to(tl.int64)[:, None] * tl.cdiv(columns, 8) + group.to(tl.int64)[None, :]
    w0, w1, w2, w3 = tl.randint4x(key, counter)
    # Element 4a + 2b + c of a group is half c of word 2a + b. Each join appends a dimension, so c comes last.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(halves.to(tl.int32) >= threshold, (rows.shape[0], BLOCK_COLUMNS))


@triton.jit(do_not_specialize=["rows", "threshold"])
def _dropout_mask(seed, mask, rows, columns, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column0 = tl.program_id(1) * BLOCK_COLUMNS
    n = column0 + tl.arange(0, BLOCK_COLUMNS)
    keep = keep_tile(seed, m, column0, columns, threshold, BLOCK_COLUMNS)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(mask + m.to(tl.int64)[:, None] * columns + n[None, :], keep, mask=inside)


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """``philox.keep_mask(seed, rows, columns, p)``: bool [rows, columns]."""
    mask = torch.empty((rows, columns), dtype=torch.bool, device=seed.device)
    if mask.numel():
        dropout_mask_launch(seed, mask, p).run()
    return mask


def dropout_mask_launch(seed: Tensor, mask: Tensor, p: float) -> Launch:
    """How ``mask`` is filled."""
    rows, columns = mask.shape
    return Launch(
        kernel=_dropout_mask,
        grid=(triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(columns, _BLOCK_COLUMNS)),
        args=(seed, mask, rows, columns, philox.keep_threshold(p)),
        constants={"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_COLUMNS": _BLOCK_COLUMNS},
        num_warps=4,
        num_stages=1,
    )
