"""The kernels of ``lora_linear`` and ``lora_linear_backward``.

Forward and the gradient of x are the same computation with other operands (``inner`` is kept, rounded to p's dtype)::

                                          forward                  gradient of x
    inner = p @ down                      s = dropout(x) Aᵀ        grad_s = grad_y B
    out = p @ q + scaling * inner @ up    y = x Wᵀ + scaling s Bᵀ  grad_x = grad_y W + scaling dropout(grad_s A)

Forward drops elements of p on the way to ``inner``; the gradient of x drops elements of ``inner @ up``. One kernel
computes both products in one launch. Its schedules:

* "ticketed": a program draws a ticket and computes one tile, of ``inner`` or of ``out``. In a group of row blocks the
  tiles of ``inner`` have the lower tickets. A tile of ``out`` multiplies p by q first and needs its rows of ``inner``
  only then; it waits for a flag, and only for lower tickets, which belong to programs that run or are done: no
  deadlock, whatever the order they start in.
* "split": the tiles of ``inner`` in one launch, those of ``out`` in a second.
* "dual": ``out`` has one tile column and ``inner`` too: a program accumulates both from one pass over p.

The gradients of A and B are sums over the rows, split among programs; the last one to finish adds the parts up in a
fixed order. No float atomics: results are the same bits on every run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels import philox
from lora_kernels.plain import float32_products

from . import autotune, configs
from .dropout_mask import keep_tile
from .launching import LAST_CONSTANT, Device, Launch, device_of, on_device, run_all

# ------------------------------------------------------------------------------------------------ device code


class Matrix(NamedTuple):
    """A matrix in global memory; strides in elements."""

    data: Any
    row_stride: Any
    column_stride: Any


class FusedTask(NamedTuple):
    """Operands of ``_fused``; the number of rows, the counters and the descriptors of p and q travel beside it."""

    p: Matrix  # [rows, depth]
    q: Matrix  # [depth, columns]
    down: Matrix  # [depth, rank], p's dtype or float32
    up: Matrix  # [rank, columns], down's dtype
    bias: Any  # [columns] or None
    out: Matrix  # [rows, columns]
    inner: Matrix  # [rows, rank]
    seed: Any  # int64 [1] or None
    threshold: Any
    keep_scale: Any
    scaling: Any
    depth: Any
    columns: Any
    rank: Any
    seed_step: Any = None  # as keep_tile has it
    end: None = LAST_CONSTANT


class ReduceTask(NamedTuple):
    """Operands of ``_reduce``: ``out = scale * dropout(big) inner``."""

    big: Matrix  # [columns, rows]
    inner: Matrix  # [rows, rank]
    out: Matrix  # [columns, rank], any float dtype
    seed: Any  # int64 [1] or None
    threshold: Any
    scale: Any
    columns: Any
    rank: Any
    seed_step: Any = None
    end: None = LAST_CONSTANT


# Counters of a ticketed launch; one flag per row block counts its finished tiles of ``inner``.
TICKET = tl.constexpr(0)
FIRST_FLAG = tl.constexpr(1)


@triton.jit
def pointers_to(matrix, row0, column0, rows, columns):
    """Pointers to the elements (row0 + rows, column0 + columns).

    Added up in this order, few of them are kept in registers: per row one pointer that a loop advances, to which the
    columns are constant offsets.
    """
    origin = tl.cast(row0, tl.int64) * matrix.row_stride + tl.cast(column0, tl.int64) * matrix.column_stride
    first = matrix.data + origin + rows.to(tl.int64) * matrix.row_stride
    return first[:, None] + columns.to(tl.int64)[None, :] * matrix.column_stride


@triton.jit
def load(pointers, rows_valid, columns_valid):
    """A tile, zero where a row or column is not valid; None means that all of them are."""
    if rows_valid is None and columns_valid is None:
        tile = tl.load(pointers)
    elif rows_valid is None:
        tile = tl.load(pointers, mask=columns_valid[None, :], other=0.0)
    elif columns_valid is None:
        tile = tl.load(pointers, mask=rows_valid[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=rows_valid[:, None] & columns_valid[None, :], other=0.0)
    return tile


@triton.jit
def _load_tile(descriptor, TRANSPOSED: tl.constexpr, row0, column0, pointers, rows_valid, columns_valid):
    """The tile at (row0, column0): by TMA, zero past the matrix's edges, or what ``load`` finds at ``pointers``.

    descriptor: of the matrix, or of its transpose if TRANSPOSED; None: not fetched that way.
    """
    if descriptor is None:
        tile = load(pointers, rows_valid, columns_valid)
    elif TRANSPOSED:
        tile = descriptor.load([column0, row0]).T
    else:
        tile = descriptor.load([row0, column0])
    return tile


@triton.jit
def _tf32(tile):
    """float32 rounded to tf32, to nearest and ties away from zero, because tensor cores cut the low 13 bits off."""
    rounded = (tile.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    # NaN as it is: of the largest, the addition carries into the sign and leaves zero.
    return tl.where(tile == tile, rounded.to(tl.float32, bitcast=True), tile)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b, in float32. PRECISION: of float32 factors, "tf32" or "ieee"; None for 16-bit ones."""
    if PRECISION == "tf32":
        a, b = _tf32(a), _tf32(b)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def work(ticket, row_blocks, columns, GROUP: tl.constexpr):
    """(row block, column) of a ticket.

    In a group of row blocks tickets go down the rows first: neighbours share a tile column of q, and the group's rows
    of p stay in the L2 cache.
    """
    per_group = GROUP * columns
    first = ticket // per_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    i = ticket % per_group
    return first + i % height, i // height


@triton.jit
def inner_tile(task, rows, p_tiles, m0, rank_block, down0,
               P_TRANSPOSED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
               BLOCK_RANK: tl.constexpr, EVEN_DEPTH: tl.constexpr, DROPS_P: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """One tile of ``inner``, of rows from m0 on; down0: what is added to addresses of ``down``."""
    m = m0 + tl.arange(0, BLOCK_ROWS)
    # Rows beyond the end repeat the last one: cheaper than a mask in the loop, and they are not stored.
    clamped = tl.minimum(m, rows - 1)
    k = tl.arange(0, BLOCK_DEPTH)
    r = rank_block * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    for k0 in range(0, task.depth, BLOCK_DEPTH):
        k_valid = None if EVEN_DEPTH else k < task.depth - k0
        p = _load_tile(p_tiles, P_TRANSPOSED, m0, k0, pointers_to(task.p, 0, k0, clamped, k), None, k_valid)
        if DROPS_P:
            keep = keep_tile(task.seed, clamped, k0, task.depth, task.threshold, BLOCK_DEPTH, task.seed_step)
            p = tl.where(keep, p, 0.0)
        down = load(pointers_to(task.down, k0, 0, k, r) + down0, k_valid, r < task.rank)
        accumulator = dot(p, down.to(p.dtype), accumulator, PRECISION)
    if DROPS_P:
        accumulator *= task.keep_scale
    inner = accumulator.to(task.inner.data.dtype.element_ty)
    tl.store(pointers_to(task.inner, 0, 0, m, r), inner, mask=(m < rows)[:, None] & (r < task.rank)[None, :])


@triton.jit
def _add_branch(accumulator, branch, task, rows, columns, DROPS_BRANCH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """accumulator + scaling * dropout(branch), in float32: neither factor of the branch is rounded again."""
    if DROPS_BRANCH:
        keep = keep_tile(task.seed, rows, columns, task.columns, task.threshold, BLOCK_COLUMNS, task.seed_step)
        branch = tl.where(keep, branch * task.keep_scale, 0.0)
    return accumulator + branch * task.scaling


@triton.jit
def store_out(task, accumulator, rows, m, n, bias0):
    if task.bias is not None:
        accumulator += tl.load(task.bias + bias0 + n, mask=n < task.columns, other=0.0).to(tl.float32)[None, :]
    out = accumulator.to(task.out.data.dtype.element_ty)
    tl.store(pointers_to(task.out, 0, 0, m, n), out, mask=(m < rows)[:, None] & (n < task.columns)[None, :])


@triton.jit
def add_product(accumulator, task, p_tiles, q_tiles, m0, n0, clamped, n, n_valid, q0,
                P_TRANSPOSED: tl.constexpr, Q_TRANSPOSED: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
                EVEN_DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """accumulator + p @ q, of rows ``clamped`` and columns n."""
    k = tl.arange(0, BLOCK_DEPTH)
    for k0 in range(0, task.depth, BLOCK_DEPTH):
        k_valid = None if EVEN_DEPTH else k < task.depth - k0
        p = _load_tile(p_tiles, P_TRANSPOSED, m0, k0, pointers_to(task.p, 0, k0, clamped, k), None, k_valid)
        q = _load_tile(q_tiles, Q_TRANSPOSED, k0, n0, pointers_to(task.q, k0, 0, k, n) + q0, k_valid, n_valid)
        accumulator = dot(p, q, accumulator, PRECISION)
    return accumulator


@triton.jit
def signal(flag):
    """That a tile of ``inner`` is written."""
    # The atomic is one thread's: the barrier puts every thread's stores before it.
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release", scope="gpu")


@triton.jit
def await_inner(flag, task, BLOCK_RANK: tl.constexpr):
    """Waits for all tiles of the flag's rows."""
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < tl.cdiv(task.rank, BLOCK_RANK):
        pass


@triton.jit
def add_low_rank(accumulator, task, n0, clamped, n, n_valid, up0, BLOCK_ROWS: tl.constexpr,
                 BLOCK_COLUMNS: tl.constexpr, BRANCH_DEPTH: tl.constexpr, DROPS_BRANCH: tl.constexpr,
                 IN_PLACE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """accumulator + scaling * dropout(inner @ up), of rows ``clamped`` and columns n."""
    branch = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if IN_PLACE:
        branch = accumulator * (1.0 / task.scaling)
    # Mostly one step: stages would only cost shared memory.
    for r0 in tl.range(0, task.rank, BRANCH_DEPTH, num_stages=1):
        r = r0 + tl.arange(0, BRANCH_DEPTH)
        # Past the L1 cache, which is not coherent with the program that wrote it.
        inner = tl.load(pointers_to(task.inner, 0, 0, clamped, r), mask=(r < task.rank)[None, :], other=0.0,
                        cache_modifier=".cg")  # fmt: skip
        up = load(pointers_to(task.up, 0, 0, r, n) + up0, r < task.rank, n_valid)
        branch = dot(inner, up.to(inner.dtype), branch, PRECISION)
    if IN_PLACE:
        accumulator = branch * task.scaling
    else:
        accumulator = _add_branch(accumulator, branch, task, clamped, n0, DROPS_BRANCH, BLOCK_COLUMNS)
    return accumulator


@triton.jit
def out_tile(task, rows, p_tiles, q_tiles, m0, column_block, flag, q0, up0, bias0,
             P_TRANSPOSED: tl.constexpr, Q_TRANSPOSED: tl.constexpr,
             BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
             BLOCK_RANK: tl.constexpr, BRANCH_DEPTH: tl.constexpr,
             EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, DROPS_BRANCH: tl.constexpr,
             IN_PLACE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of ``out``, of rows from m0 on; q0, up0, bias0: what is added to addresses of these.

    Waits for ``flag`` before it reads ``inner``, None where no other program writes that.
    """
    n0 = column_block * BLOCK_COLUMNS
    m = m0 + tl.arange(0, BLOCK_ROWS)
    clamped = tl.minimum(m, rows - 1)
    n = n0 + tl.arange(0, BLOCK_COLUMNS)
    n_valid = None if EVEN_COLUMNS else n < task.columns
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    accumulator = add_product(accumulator, task, p_tiles, q_tiles, m0, n0, clamped, n, n_valid, q0, P_TRANSPOSED,
                              Q_TRANSPOSED, BLOCK_DEPTH, EVEN_DEPTH, PRECISION)  # fmt: skip
    if flag is not None:
        await_inner(flag, task, BLOCK_RANK)
    accumulator = add_low_rank(accumulator, task, n0, clamped, n, n_valid, up0, BLOCK_ROWS, BLOCK_COLUMNS, BRANCH_DEPTH,
                               DROPS_BRANCH, IN_PLACE, PRECISION)  # fmt: skip
    store_out(task, accumulator, rows, m, n, bias0)


@triton.jit
def _dual_tile(task, rows, row_block,
               BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
               BLOCK_RANK: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
               DROPS_P: tl.constexpr, DROPS_BRANCH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A whole block of rows, of ``inner`` and of ``out``."""
    m = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    clamped = tl.minimum(m, rows - 1)
    n = tl.arange(0, BLOCK_COLUMNS)
    n_valid = None if EVEN_COLUMNS else n < task.columns
    r = tl.arange(0, BLOCK_RANK)
    k = tl.arange(0, BLOCK_DEPTH)
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    inner = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    for k0 in range(0, task.depth, BLOCK_DEPTH):
        k_valid = None if EVEN_DEPTH else k < task.depth - k0
        p = load(pointers_to(task.p, 0, k0, clamped, k), None, k_valid)
        q = load(pointers_to(task.q, k0, 0, k, n), k_valid, n_valid)
        down = load(pointers_to(task.down, k0, 0, k, r), k_valid, r < task.rank)
        accumulator = dot(p, q, accumulator, PRECISION)
        if DROPS_P:
            keep = keep_tile(task.seed, clamped, k0, task.depth, task.threshold, BLOCK_DEPTH, task.seed_step)
            p = tl.where(keep, p, 0.0)
        inner = dot(p, down.to(p.dtype), inner, PRECISION)
    if DROPS_P:
        inner *= task.keep_scale
    rounded = inner.to(task.inner.data.dtype.element_ty)
    tl.store(pointers_to(task.inner, 0, 0, m, r), rounded, mask=(m < rows)[:, None] & (r < task.rank)[None, :])
    up = load(pointers_to(task.up, 0, 0, r, n), r < task.rank, n_valid)
    branch = dot(rounded, up.to(rounded.dtype), None, PRECISION)
    accumulator = _add_branch(accumulator, branch, task, clamped, 0, DROPS_BRANCH, BLOCK_COLUMNS)
    store_out(task, accumulator, rows, m, n, 0)


@triton.jit(do_not_specialize=["rows"])
def _fused(task, rows, p_tiles, q_tiles,
           PART: tl.constexpr, DROPOUT: tl.constexpr, P_TRANSPOSED: tl.constexpr, Q_TRANSPOSED: tl.constexpr,
           BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
           BRANCH_DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
           IN_PLACE: tl.constexpr, PRECISION: tl.constexpr, counters=None):  # fmt: skip
    """PART: "all" (ticketed), "inner" or "out" (the launches of "split"), "dual". DROPOUT: "none", "p", "branch".

    p_tiles, q_tiles: descriptors of p and q or, if TRANSPOSED, of their transposes; None: not fetched that way.
    """
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    inner_columns = tl.cdiv(task.rank, BLOCK_RANK)
    out_columns = tl.cdiv(task.columns, BLOCK_COLUMNS)
    if PART == "dual":
        _dual_tile(task, rows, tl.program_id(0), BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_RANK, EVEN_DEPTH,
                   EVEN_COLUMNS, DROPOUT == "p", DROPOUT == "branch", PRECISION)  # fmt: skip
    elif PART == "inner":
        row, column = work(tl.program_id(0), row_blocks, inner_columns, GROUP)
        inner_tile(task, rows, p_tiles, row * BLOCK_ROWS, column, 0, P_TRANSPOSED, BLOCK_ROWS, BLOCK_DEPTH, BLOCK_RANK,
                   EVEN_DEPTH, DROPOUT == "p", PRECISION)  # fmt: skip
    elif PART == "out":
        row, column = work(tl.program_id(0), row_blocks, out_columns, GROUP)
        out_tile(task, rows, p_tiles, q_tiles, row * BLOCK_ROWS, column, None, 0, 0, 0, P_TRANSPOSED, Q_TRANSPOSED,
                 BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_RANK, BRANCH_DEPTH, EVEN_DEPTH, EVEN_COLUMNS,
                 DROPOUT == "branch", IN_PLACE, PRECISION)  # fmt: skip
    else:
        ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed", scope="gpu")
        row, column = work(ticket, row_blocks, inner_columns + out_columns, GROUP)
        flag = counters + FIRST_FLAG + row
        if column < inner_columns:
            inner_tile(task, rows, p_tiles, row * BLOCK_ROWS, column, 0, P_TRANSPOSED, BLOCK_ROWS, BLOCK_DEPTH,
                       BLOCK_RANK, EVEN_DEPTH, DROPOUT == "p", PRECISION)  # fmt: skip
            signal(flag)
        else:
            out_tile(task, rows, p_tiles, q_tiles, row * BLOCK_ROWS, column - inner_columns, flag, 0, 0, 0,
                     P_TRANSPOSED, Q_TRANSPOSED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_RANK, BRANCH_DEPTH,
                     EVEN_DEPTH, EVEN_COLUMNS, DROPOUT == "branch", IN_PLACE, PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _reduce(task, rows, parts,
            BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr, DROPS: tl.constexpr,
            PRECISION: tl.constexpr, counters=None):  # fmt: skip
    """A tile of ``out`` over one of ``num_programs(1)`` shares of the rows; ``parts`` is None where there is one share.

    parts: float32 [tiles, shares, BLOCK_COLUMNS, BLOCK_RANK]. counters: one per tile.
    """
    tile, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    per_share = tl.cdiv(tl.cdiv(rows, BLOCK_ROWS), shares) * BLOCK_ROWS
    column0, n, r = place(task, tile, BLOCK_COLUMNS, BLOCK_RANK)
    accumulator = sum_of_rows(task, column0, n, r, share * per_share, tl.minimum((share + 1) * per_share, rows),
                              BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANK, DROPS, PRECISION)  # fmt: skip
    if parts is not None:
        size = BLOCK_COLUMNS * BLOCK_RANK
        first_part = parts + tile.to(tl.int64) * shares * size
        add_parts(task, accumulator, n, r, first_part, share, shares, counters + tile, 0, BLOCK_COLUMNS, BLOCK_RANK)
    else:
        store_gradient(task, accumulator, n, r, 0)


@triton.jit
def place(task, tile, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """The first column of a tile of ``out``, and its columns and ranks."""
    column_blocks = tl.cdiv(task.columns, BLOCK_COLUMNS)
    column0 = tile % column_blocks * BLOCK_COLUMNS
    r = tile // column_blocks * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    return column0, column0 + tl.arange(0, BLOCK_COLUMNS), r


@triton.jit
def sum_of_rows(task, column0, n, r, first_row, end_row, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
                BLOCK_RANK: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    n_valid, r_valid = n < task.columns, r < task.rank
    m = tl.arange(0, BLOCK_ROWS)
    accumulator = tl.zeros((BLOCK_COLUMNS, BLOCK_RANK), tl.float32)
    for m0 in range(first_row, end_row, BLOCK_ROWS):
        m_valid = m < end_row - m0
        big = load(pointers_to(task.big, 0, m0, n, m), n_valid, m_valid)
        if DROPS:
            keep = keep_tile(task.seed, m0 + m, column0, task.columns, task.threshold, BLOCK_COLUMNS, task.seed_step)
            big = tl.where(tl.trans(keep), big, 0.0)
        inner = load(pointers_to(task.inner, m0, 0, m, r), m_valid, r_valid)
        accumulator = dot(big, inner, accumulator, PRECISION)
    return accumulator


@triton.jit
def add_parts(task, accumulator, n, r, first_part, share, shares, counter, out0, BLOCK_COLUMNS: tl.constexpr,
              BLOCK_RANK: tl.constexpr):  # fmt: skip
    """The last of a tile's programs to come adds up what all have left, in their order."""
    i = tl.arange(0, BLOCK_COLUMNS)[:, None] * BLOCK_RANK + tl.arange(0, BLOCK_RANK)[None, :]
    tl.store(first_part + share * (BLOCK_COLUMNS * BLOCK_RANK) + i, accumulator)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == shares - 1:
        accumulator = tl.zeros((BLOCK_COLUMNS, BLOCK_RANK), tl.float32)
        for other in range(0, shares):
            accumulator += tl.load(first_part + other * (BLOCK_COLUMNS * BLOCK_RANK) + i, cache_modifier=".cg")
        store_gradient(task, accumulator, n, r, out0)


@triton.jit
def store_gradient(task, accumulator, n, r, out0):
    gradient = (accumulator * task.scale).to(task.out.data.dtype.element_ty)
    valid = (n < task.columns)[:, None] & (r < task.rank)[None, :]
    tl.store(pointers_to(task.out, 0, 0, n, r) + out0, gradient, mask=valid)


# -------------------------------------------------------------------------------------------------- host code

PARTS = {"ticketed": ("all",), "split": ("inner", "out"), "dual": ("dual",)}
"""The launches of a schedule, by the PART that ``_fused`` computes."""


def forward(
    schedule: str, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None,
    scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op ``lora_linear``: y [..., N] and s [..., rank], in x's dtype, contiguous."""
    n, rank = lora_B.shape
    y, s = x.new_empty((*x.shape[:-1], n)), x.new_empty((*x.shape[:-1], rank))
    task = forward_task(y, s, x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)
    device: Any = device_of(x.device)  # of a GPU that ``supports`` has seen
    with on_device(x):
        run_all(fused_launches(device, schedule, task, drops="p"), x.device)
    return y, s


def backward(
    schedule: str, grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op ``lora_linear_backward``: gradients of x, A and B in the dtypes of these; empty where not needed."""
    device: Any = device_of(x.device)
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_A = lora_A.new_empty(lora_A.shape if need_A else 0)
    grad_B = lora_B.new_empty(lora_B.shape if need_B else 0)
    with on_device(x):
        launches = []
        if need_x or need_A:
            grad_s = torch.empty_like(s)  # without the scaling, which is applied in float32 where grad_s is used
            task = backward_task(grad_x, grad_s, grad_y, weight, lora_A, lora_B, seed, scaling, dropout_p)
            launches += fused_launches(device, schedule if need_x else "inner", task, drops="branch")
        if need_A:
            launches.append(reduce_launch(device, grad_A.t(), x, grad_s, seed, scaling, dropout_p))
        if need_B:
            launches.append(reduce_launch(device, grad_B, grad_y, s, None, scaling, 0.0))
        run_all(launches, x.device)
    return grad_x, grad_A, grad_B


def forward_task(
    y: Tensor, s: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> FusedTask:  # fmt: skip
    """Operands of the forward; y and s are written."""
    n, k = weight.shape
    rank = lora_A.shape[0]
    return FusedTask(
        p=matrix_of(x.reshape(-1, k)), q=matrix_of(weight.t()), down=matrix_of(lora_A.t()), up=matrix_of(lora_B.t()),
        bias=None if bias is None else bias.contiguous(), out=matrix_of(y.view(-1, n)),
        inner=_rows_of(s), seed=seed, threshold=philox.keep_threshold(dropout_p),
        keep_scale=philox.keep_scale(dropout_p),
        scaling=scaling, depth=k, columns=n, rank=rank,
    )  # fmt: skip


def backward_task(
    grad_x: Tensor, grad_s: Tensor, grad_y: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> FusedTask:  # fmt: skip
    """Operands of the gradient of x; grad_x and grad_s are written."""
    n, k = weight.shape
    rank = lora_A.shape[0]
    return FusedTask(
        p=matrix_of(grad_y.reshape(-1, n)), q=matrix_of(weight), down=matrix_of(lora_B), up=matrix_of(lora_A),
        bias=None, out=matrix_of(grad_x.view(-1, k)), inner=_rows_of(grad_s),
        seed=seed, threshold=philox.keep_threshold(dropout_p), keep_scale=philox.keep_scale(dropout_p),
        scaling=scaling, depth=n, columns=k, rank=rank,
    )  # fmt: skip


def fused_launches(device: Device, schedule: str, task: FusedTask, drops: str) -> list[Launch]:
    """How ``out`` and ``inner`` of a task are computed; schedule "inner" leaves ``out`` alone.

    drops: what a seed applies to, "p" or "branch".
    """
    rows, float32 = task.p.data.shape[0], float32_products(task.p.data.dtype)
    masks_branch = drops == "branch" and task.seed is not None
    in_place = adds_in_place(task.scaling, masks_branch)
    candidates = configs.fused_candidates(
        device.target, device.sms, schedule, rows, task.columns, task.rank, float32, is_aligned(task), not in_place
    )

    def launches(i: int) -> list[Launch]:
        return _fused_launches(candidates[i], schedule, task, drops, in_place)

    gpu = task.p.data.device
    if rows == 0 or len(candidates) == 1 or not autotune.is_enabled(gpu):
        return launches(0)
    problem = (
        f"{schedule} {device.target} {task.p.data.dtype}: rows <= {triton.next_power_of_2(rows)}, "
        f"columns {task.columns}, depth {task.depth}, rank {task.rank}, dropout {task.seed is not None}, "
        f"{'forward' if drops == 'p' else 'backward'}, in place {in_place}"
    )
    tiles = [config.tile.shape for config in candidates]
    return launches(autotune.fastest(problem, tiles, lambda i: functools.partial(run_all, launches(i), gpu), gpu))


def _fused_launches(
    config: configs.FusedConfig, schedule: str, task: FusedTask, drops: str, in_place: bool
) -> list[Launch]:
    """The same with a given configuration."""
    rows = task.p.data.shape[0]
    tile = config.tile
    row_blocks = configs.blocks(rows, tile.rows)
    inner_columns = configs.blocks(task.rank, config.block_rank)
    out_columns = configs.blocks(task.columns, tile.columns)
    if schedule == "dual" and max(inner_columns, out_columns) > 1:
        raise ValueError(f"schedule 'dual' is for one tile column, not {inner_columns} and {out_columns}")
    columns_of = {"all": inner_columns + out_columns, "inner": inner_columns, "out": out_columns, "dual": 1}
    p_tiles = q_tiles = None
    if config.descriptors:
        p_tiles = _descriptor(task.p, (tile.rows, tile.depth))
        q_tiles = _descriptor(task.q, (tile.depth, tile.columns))
    constants = {
        "DROPOUT": "none" if task.seed is None else drops,
        "P_TRANSPOSED": task.p.column_stride != 1,
        "Q_TRANSPOSED": task.q.column_stride != 1,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "BLOCK_RANK": config.block_rank,
        "BRANCH_DEPTH": config.branch_depth,
        "EVEN_DEPTH": task.depth % tile.depth == 0,
        "EVEN_COLUMNS": task.columns % tile.columns == 0,
        "GROUP": config.group,
        "IN_PLACE": in_place,
        "PRECISION": float32_products(task.p.data.dtype),
    }
    return [
        Launch(
            kernel=_fused,
            grid=(row_blocks * columns_of[part],),
            # Descriptors on their own: Triton 3.6 launches none that is part of a tuple.
            args=(task, rows, p_tiles, q_tiles),
            constants={"PART": part, **constants},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            counters=1 + row_blocks if part == "all" else 0,
        )
        for part in PARTS.get(schedule, (schedule,))
    ]


def reduce_launch(
    device: Device, out: Tensor, big: Tensor, inner: Tensor, seed: Tensor | None, scaling: float, dropout_p: float,
    seed_step: int | None = None,
) -> Launch:  # fmt: skip
    """How ``out = scaling * dropout(big)ᵀ inner`` is computed.

    Args:
        out: [columns, rank], any float dtype and strides.
        big: [..., columns].
        inner: [..., rank], dtype of big.
    """
    columns, rank = out.shape
    big, inner = big.reshape(-1, columns), inner.reshape(-1, rank)
    rows = big.shape[0]
    float32, aligned = float32_products(big.dtype), columns % 16 == 0 and are_rows_aligned(matrix_of(big))
    config = configs.reduce(device.target, device.sms, rows, columns, rank, float32, aligned)
    tile = config.tile
    tiles = configs.blocks(columns, tile.columns) * configs.blocks(rank, config.block_rank)
    parts = None
    if config.shares > 1:
        shape = (tiles, config.shares, tile.columns, config.block_rank)
        parts = torch.empty(shape, dtype=torch.float32, device=big.device)
    task = ReduceTask(
        big=matrix_of(big.t()), inner=matrix_of(inner), out=matrix_of(out), seed=seed,
        threshold=philox.keep_threshold(dropout_p),
        scale=scaling if seed is None else scaling * philox.keep_scale(dropout_p),
        columns=columns, rank=rank, seed_step=seed_step,
    )  # fmt: skip
    return Launch(
        kernel=_reduce,
        grid=(tiles, config.shares),
        args=(task, rows, parts),
        constants={
            "BLOCK_ROWS": tile.rows,
            "BLOCK_COLUMNS": tile.columns,
            "BLOCK_RANK": config.block_rank,
            "DROPS": seed is not None,
            "PRECISION": float32,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        counters=0 if parts is None else tiles,
    )


def adds_in_place(scaling: float, masks_branch: bool) -> bool:
    """Whether ``inner @ up`` is accumulated onto ``p @ q / scaling``, which saves a second accumulator.

    Two roundings in float32 more. Not where the branch is masked first, nor where the quotient could leave float32.
    """
    return not masks_branch and 2**-10 < abs(scaling) < 2**10


def is_aligned(task: FusedTask) -> bool:
    """Whether Triton will find that 16-byte loads are possible, also at the edges."""
    sizes_fit = task.depth % 16 == 0 and task.columns % 16 == 0
    return sizes_fit and all(are_rows_aligned(t) for t in (task.p, task.q, task.out))


def are_rows_aligned(matrix: Matrix) -> bool:
    """Whether rows, or columns, are contiguous and begin at multiples of 16 elements."""
    strides = (matrix.row_stride, matrix.column_stride)
    return min(strides) == 1 and max(strides) % 16 == 0 and matrix.data.data_ptr() % 16 == 0


def _descriptor(matrix: Matrix, block: tuple[int, int]) -> TensorDescriptor:
    """For such blocks of the matrix, or of its transpose where that has the contiguous rows; these are aligned
    (``are_rows_aligned``).
    """
    if matrix.column_stride == 1:
        return TensorDescriptor.from_tensor(matrix.data, list(block))
    return TensorDescriptor.from_tensor(matrix.data.t(), list(reversed(block)))


def _rows_of(t: Tensor) -> Matrix:
    """[..., columns] as a matrix, also of no columns."""
    return matrix_of(t.view(t.shape[:-1].numel(), t.shape[-1]))


def matrix_of(t: Tensor) -> Matrix:
    return Matrix(t, *t.stride())
