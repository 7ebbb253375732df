"""The kernels of ``multi_lora_linear`` and its backward: the branch of rows that have adapters in pools.

torch multiplies all rows by the weight; what these kernels do then leaves rows without an adapter alone.

* Few rows: a program has one row, and reads that row's own adapter.
* Many rows: each adapter's rows are looked up (``adapter_pools.py``). What follows has blocks of rows that share an
  adapter, numbered as those of groups are (``grouped_lora_linear.py``), and finds the rows through this order.

s is zero before where no adapter has ranks. No float atomics, and every sum has an order that depends on sizes alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import philox
from lora_kernels.plain import float32_products

from . import configs
from .adapter_pools import Order, Pools, order_launch, pools_of, rank_of, scaling_of
from .dropout_mask import keep_tile
from .grouped_lora_linear import reduce_by_group, rows_of_block
from .launching import LAST_CONSTANT, Device, Launch, device_of, on_device, run_all
from .lora_linear import (
    Matrix,
    add_parts,
    are_rows_aligned,
    dot,
    load,
    matrix_of,
    place,
    pointers_to,
    store_gradient,
)  # fmt: skip

_ROW_DEPTH, _ROW_COLUMNS = 512, 64  # of a program that has one row

# ------------------------------------------------------------------------------------------------ device code


class BranchTask(NamedTuple):
    """``inner = p @ down`` and ``out += scaling * inner @ up`` of every row's adapter."""

    p: Matrix  # [rows, depth]
    down: Matrix  # [depth, rank], p's dtype or float32
    up: Matrix  # [rank, columns], down's dtype
    out: Matrix  # [rows, columns]
    inner: Matrix  # [rows, rank]
    seed: Any  # int64 [1] or None
    threshold: Any
    keep_scale: Any
    scaling: Any
    depth: Any
    columns: Any
    rank: Any
    end: None = LAST_CONSTANT


@triton.jit
def _inner_of_row(task, pools, ids, BLOCK_DEPTH: tl.constexpr, BLOCK_RANK: tl.constexpr, DROPS_P: tl.constexpr):
    """A block of ranks of one row's ``inner``."""
    row = tl.program_id(0)
    number = tl.load(ids + row).to(tl.int64)
    if (number >= 0) & (number < pools.count):
        rank = rank_of(pools, number, task.rank)
        r = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        k = tl.arange(0, BLOCK_DEPTH)
        total = tl.zeros((BLOCK_RANK,), tl.float32)
        for k0 in range(0, task.depth, BLOCK_DEPTH):
            k_valid = k < task.depth - k0
            p = load(pointers_to(task.p, 0, k0, row + tl.arange(0, 1), k), None, k_valid)
            if DROPS_P:
                keep = keep_tile(task.seed, row + tl.arange(0, 1), k0, task.depth, task.threshold, BLOCK_DEPTH)
                p = tl.where(keep, p, 0.0)
            down = load(pointers_to(task.down, k0, 0, k, r) + number * pools.down_step, k_valid, r < rank)
            total += tl.sum(tl.trans(p).to(tl.float32) * down.to(p.dtype).to(tl.float32), 0)
        if DROPS_P:
            total *= task.keep_scale
        target = pointers_to(task.inner, row, 0, tl.arange(0, 1), r)
        tl.store(target, total[None, :].to(task.inner.data.dtype.element_ty), mask=(r < rank)[None, :])


@triton.jit
def _out_of_row(task, pools, ids, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """A block of columns of one row's ``out``."""
    row = tl.program_id(0)
    number = tl.load(ids + row).to(tl.int64)
    if (number >= 0) & (number < pools.count):
        rank = rank_of(pools, number, task.rank)
        n = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        n_valid = n < task.columns
        branch = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        for r0 in range(0, rank, BLOCK_RANK):
            r = r0 + tl.arange(0, BLOCK_RANK)
            inner = load(pointers_to(task.inner, row, 0, tl.arange(0, 1), r), None, r < rank)
            up = load(pointers_to(task.up, 0, 0, r, n) + number * pools.up_step, r < rank, n_valid)
            branch += tl.sum(tl.trans(inner).to(tl.float32) * up.to(inner.dtype).to(tl.float32), 0)
        if rank > 0:
            target = pointers_to(task.out, row, 0, tl.arange(0, 1), n)
            y = load(target, None, n_valid).to(tl.float32) + branch[None, :] * scaling_of(pools, number, task.scaling)
            tl.store(target, y.to(task.out.data.dtype.element_ty), mask=n_valid[None, :])


@triton.jit(do_not_specialize=["rows"])
def _inner(task, pools, rows, order, ends, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
           BLOCK_RANK: tl.constexpr, EVEN_DEPTH: tl.constexpr, DROPS_P: tl.constexpr, PRECISION: tl.constexpr,
           MANY: tl.constexpr):  # fmt: skip
    """A tile of ``inner``, of rows that share an adapter."""
    rank_blocks = tl.cdiv(task.rank, BLOCK_RANK)
    block = tl.program_id(0) // rank_blocks
    number, _, m0, end = rows_of_block(ends, pools.count, pools.count + 1, rows, block, BLOCK_ROWS, MANY)
    if (m0 < end) & (number < pools.count):
        rank = rank_of(pools, number, task.rank)
        r = tl.program_id(0) % rank_blocks * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        m = m0 + tl.arange(0, BLOCK_ROWS)
        row = tl.load(order + tl.minimum(m, end - 1))
        k = tl.arange(0, BLOCK_DEPTH)
        down0 = number.to(tl.int64) * pools.down_step
        accumulator = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
        for k0 in range(0, task.depth, BLOCK_DEPTH):
            k_valid = None if EVEN_DEPTH else k < task.depth - k0
            p = load(pointers_to(task.p, 0, k0, row, k), None, k_valid)
            if DROPS_P:
                p = tl.where(keep_tile(task.seed, row, k0, task.depth, task.threshold, BLOCK_DEPTH), p, 0.0)
            down = load(pointers_to(task.down, k0, 0, k, r) + down0, k_valid, r < rank)
            accumulator = dot(p, down.to(p.dtype), accumulator, PRECISION)
        if DROPS_P:
            accumulator *= task.keep_scale
        inner = accumulator.to(task.inner.data.dtype.element_ty)
        tl.store(pointers_to(task.inner, 0, 0, row, r), inner, mask=(m < end)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _out(task, pools, rows, order, ends, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
         BLOCK_RANK: tl.constexpr, EVEN_COLUMNS: tl.constexpr, DROPS_BRANCH: tl.constexpr, PRECISION: tl.constexpr,
         MANY: tl.constexpr):  # fmt: skip
    """A tile of ``out``, of rows that share an adapter."""
    column_blocks = tl.cdiv(task.columns, BLOCK_COLUMNS)
    block = tl.program_id(0) // column_blocks
    number, _, m0, end = rows_of_block(ends, pools.count, pools.count + 1, rows, block, BLOCK_ROWS, MANY)
    if (m0 < end) & (number < pools.count):
        rank = rank_of(pools, number, task.rank)
        n0 = tl.program_id(0) % column_blocks * BLOCK_COLUMNS
        n = n0 + tl.arange(0, BLOCK_COLUMNS)
        n_valid = None if EVEN_COLUMNS else n < task.columns
        m = m0 + tl.arange(0, BLOCK_ROWS)
        row = tl.load(order + tl.minimum(m, end - 1))
        up0 = number.to(tl.int64) * pools.up_step
        branch = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for r0 in tl.range(0, rank, BLOCK_RANK, num_stages=1):
            r = r0 + tl.arange(0, BLOCK_RANK)
            inner = load(pointers_to(task.inner, 0, 0, row, r), None, r < rank)
            up = load(pointers_to(task.up, 0, 0, r, n) + up0, r < rank, n_valid)
            branch = dot(inner, up.to(inner.dtype), branch, PRECISION)
        if rank > 0:
            if DROPS_BRANCH:
                keep = keep_tile(task.seed, row, n0, task.columns, task.threshold, BLOCK_COLUMNS)
                branch = tl.where(keep, branch * task.keep_scale, 0.0)
            target = pointers_to(task.out, 0, 0, row, n)
            y = load(target, None, n_valid).to(tl.float32) + branch * scaling_of(pools, number, task.scaling)
            stored = (m < end)[:, None] & (n < task.columns)[None, :]
            tl.store(target, y.to(task.out.data.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows"])
def _reduce(task, pools, rows, order, ends, out_step, parts, slots,
            BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr, PER_SHARE: tl.constexpr,
            DROPS: tl.constexpr, PRECISION: tl.constexpr, MANY: tl.constexpr, counters=None):  # fmt: skip
    """As that of groups, of rows in an order."""
    tile = tl.program_id(0)
    number, own_first, first, end = rows_of_block(
        ends, pools.count, pools.count, rows, tl.program_id(1), PER_SHARE, MANY
    )
    shares = tl.maximum(tl.cdiv(end - own_first, PER_SHARE), 1)
    share = (first - own_first) // PER_SHARE
    if share < shares:
        at = number.to(tl.int64)
        column0, n, r = place(task, tile, BLOCK_COLUMNS, BLOCK_RANK)
        n_valid, r_valid = n < task.columns, r < rank_of(pools, at, task.rank)
        i = tl.arange(0, BLOCK_ROWS)
        last = tl.minimum(first + PER_SHARE, end)
        accumulator = tl.zeros((BLOCK_COLUMNS, BLOCK_RANK), tl.float32)
        for m0 in range(first, last, BLOCK_ROWS):
            m_valid = i < last - m0
            row = tl.load(order + m0 + i, mask=m_valid, other=0)
            big = load(pointers_to(task.big, 0, 0, n, row), n_valid, m_valid)
            if DROPS:
                keep = keep_tile(task.seed, row, column0, task.columns, task.threshold, BLOCK_COLUMNS)
                big = tl.where(tl.trans(keep), big, 0.0)
            inner = load(pointers_to(task.inner, 0, 0, row, r), m_valid, r_valid)
            accumulator = dot(big, inner, accumulator, PRECISION)
        accumulator *= scaling_of(pools, at, 1.0)
        if shares == 1:
            store_gradient(task, accumulator, n, r, at * out_step)
        elif parts is not None:
            slot = tile.to(tl.int64) * slots + own_first.to(tl.int64) * 2 // PER_SHARE
            first_part = parts + slot * (BLOCK_COLUMNS * BLOCK_RANK)
            add_parts(task, accumulator, n, r, first_part, share, shares, counters + slot, at * out_step, BLOCK_COLUMNS,
                      BLOCK_RANK)  # fmt: skip


# -------------------------------------------------------------------------------------------------- host code


def forward(
    schedule: str, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor,
    ranks: Tensor | None, scalings: Tensor | None, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op ``multi_lora_linear``: y [..., N] and s [..., rank], in x's dtype, contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.nn.functional.linear(rows, weight, bias)
    s = x.new_zeros((len(rows), lora_A.shape[1]))
    if len(rows) > 0:
        ids = adapter_ids.contiguous()
        task, pools = forward_operands(y, s, rows, weight, lora_A, lora_B, ranks, scalings, seed, scaling, dropout_p)
        device: Any = device_of(x.device)  # of a GPU that ``supports`` has seen
        with on_device(x):
            if schedule == "by row":
                launches = row_launches(task, pools, ids)
            else:
                order, look_up = order_launch(ids, len(lora_A))
                launches = [look_up, *branch_launches(device, task, pools, order, drops="p")]
            run_all(launches, x.device)
    return y.view(*x.shape[:-1], len(weight)), s.view(*x.shape[:-1], lora_A.shape[1])


def backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor,
    ranks: Tensor | None, scalings: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool,
    need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op ``multi_lora_linear_backward``: gradients of x, A and B in their dtypes; empty where not needed."""
    device: Any = device_of(x.device)
    grad_rows, rows, s_rows = (t.reshape(-1, t.shape[-1]) for t in (grad_y, x, s))
    grad_x = grad_rows @ weight if need_x else x.new_empty(0)
    grad_A = lora_A.new_empty(lora_A.shape if need_A else 0)
    grad_B = lora_B.new_empty(lora_B.shape if need_B else 0)
    with on_device(x):
        order, look_up = order_launch(adapter_ids.contiguous(), len(lora_A))
        launches = [look_up]
        if need_x or need_A:
            grad_s = torch.zeros_like(s_rows)  # without the scaling, which is applied in float32 where grad_s is used
            task, pools = backward_operands(
                grad_x, grad_s, grad_rows, weight, lora_A, lora_B, ranks, scalings, seed, scaling, dropout_p
            )
            launches += branch_launches(device, task, pools, order, drops="branch")[: 2 if need_x else 1]
        of_pools = lora_A, lora_B, ranks, scalings
        if need_A:
            launches.append(reduce_launch(device, grad_A.mT, rows, grad_s, order, *of_pools, seed, scaling, dropout_p))
        if need_B:
            launches.append(reduce_launch(device, grad_B, grad_rows, s_rows, order, *of_pools, None, scaling, 0.0))
        run_all(launches, x.device)
    return grad_x.view(x.shape) if need_x else grad_x, grad_A, grad_B


def forward_operands(
    y: Tensor, s: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, ranks: Tensor | None,
    scalings: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[BranchTask, Pools]:  # fmt: skip
    """The forward's branch; s is written, and the branch is added to y."""
    n, k = weight.shape
    task = BranchTask(
        p=matrix_of(x), down=matrix_of(lora_A[0].t()), up=matrix_of(lora_B[0].t()), out=matrix_of(y),
        inner=matrix_of(s), seed=seed, threshold=philox.keep_threshold(dropout_p),
        keep_scale=philox.keep_scale(dropout_p), scaling=scaling, depth=k, columns=n, rank=lora_A.shape[1],
    )  # fmt: skip
    return task, pools_of(lora_A, lora_B, ranks, scalings)


def backward_operands(
    grad_x: Tensor, grad_s: Tensor, grad_y: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
    ranks: Tensor | None, scalings: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[BranchTask, Pools]:  # fmt: skip
    """That of the gradient of x likewise."""
    n, k = weight.shape
    task = BranchTask(
        p=matrix_of(grad_y), down=matrix_of(lora_B[0]), up=matrix_of(lora_A[0]), out=matrix_of(grad_x.view(-1, k)),
        inner=matrix_of(grad_s), seed=seed, threshold=philox.keep_threshold(dropout_p),
        keep_scale=philox.keep_scale(dropout_p), scaling=scaling, depth=n, columns=k, rank=lora_A.shape[1],
    )  # fmt: skip
    return task, pools_of(lora_B, lora_A, ranks, scalings)


def row_launches(task: BranchTask, pools: Pools, ids: Tensor) -> list[Launch]:
    """``inner`` and ``out`` of few rows."""
    rows = len(ids)
    ranks = min(16, triton.next_power_of_2(task.rank))
    inner = {"BLOCK_DEPTH": _ROW_DEPTH, "BLOCK_RANK": ranks, "DROPS_P": task.seed is not None}
    out = {"BLOCK_COLUMNS": _ROW_COLUMNS, "BLOCK_RANK": ranks}
    return [
        Launch(kernel=kernel, grid=(rows, blocks), args=(task, pools, ids), constants=constants, num_warps=4,
               num_stages=2)
        for kernel, blocks, constants in (
            (_inner_of_row, configs.blocks(task.rank, ranks), inner),
            (_out_of_row, configs.blocks(task.columns, _ROW_COLUMNS), out),
        )
    ]  # fmt: skip


def branch_launches(device: Device, task: BranchTask, pools: Pools, order: Order, drops: str) -> list[Launch]:
    """``inner`` and ``out`` of many rows; ``drops``: what a seed applies to, "p" or "branch"."""
    rows, adapters, float32 = len(order.rows), len(order.ends), float32_products(task.p.data.dtype)
    if rows == 0:
        return []
    aligned = task.depth % 16 == task.columns % 16 == 0 and are_rows_aligned(task.p) and are_rows_aligned(task.out)
    config = configs.grouped(device.target, device.sms, rows, task.columns, task.rank, adapters, float32, aligned, True)
    tile = config.tile
    row_blocks = configs.grouped_blocks(rows, tile.rows, adapters)
    common = {
        "BLOCK_ROWS": tile.rows,
        "PRECISION": float32,
        "MANY": triton.next_power_of_2(adapters + 1),
    }
    inner = {
        "BLOCK_DEPTH": tile.depth,
        "BLOCK_RANK": config.block_rank,
        "EVEN_DEPTH": task.depth % tile.depth == 0,
        "DROPS_P": task.seed is not None and drops == "p",
    }
    out = {
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_RANK": config.branch_depth,
        "EVEN_COLUMNS": task.columns % tile.columns == 0,
        "DROPS_BRANCH": task.seed is not None and drops == "branch",
    }
    return [
        Launch(kernel=kernel, grid=(row_blocks * columns,), args=(task, pools, rows, *order),
               constants={**constants, **common}, num_warps=tile.num_warps, num_stages=tile.num_stages)
        for kernel, columns, constants in (
            (_inner, configs.blocks(task.rank, config.block_rank), inner),
            (_out, configs.blocks(task.columns, tile.columns), out),
        )
    ]  # fmt: skip


def reduce_launch(
    device: Device, out: Tensor, big: Tensor, inner: Tensor, order: Order, lora_A: Tensor, lora_B: Tensor,
    ranks: Tensor | None, scalings: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float,
) -> Launch:  # fmt: skip
    """How ``out = scaling * dropout(big)ᵀ inner`` of every adapter is computed: see ``reduce_by_group``."""
    pools = pools_of(lora_A, lora_B, ranks, scalings)
    return reduce_by_group(_reduce, device, out, big, inner, order, seed, scaling, dropout_p, (pools,))
