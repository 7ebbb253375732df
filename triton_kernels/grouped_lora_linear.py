"""The kernels of ``grouped_lora_linear`` and its backward: those of ``lora_linear``, with tiles that have the rows of
one group and read its factors.

Where groups end is known on the device alone. Blocks of rows are numbered by shapes: a group that begins in row
``first`` has the numbers from ``first // BLOCK_ROWS`` + its own number on. They are enough, and rise with the groups; a
number too many has no rows, and its programs nothing to do. Rows behind the last end are a group of nobody.
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
from .launching import Device, Launch, device_of, on_device, run_all
from .lora_linear import (
    FIRST_FLAG,
    PARTS,
    TICKET,
    FusedTask,
    ReduceTask,
    add_parts,
    adds_in_place,
    are_rows_aligned,
    inner_tile,
    is_aligned,
    matrix_of,
    out_tile,
    place,
    pointers_to,
    signal,
    store_gradient,
    sum_of_rows,
    work,
)

# ------------------------------------------------------------------------------------------------ device code


class Steps(NamedTuple):
    """Elements from a group's factors to the next one's; 0: all share them."""

    q: Any
    down: Any
    up: Any
    bias: Any


@triton.jit
def _first_row(ends, group, rows):
    """Where a group begins; whatever the ends are, within the rows that there are."""
    end = tl.load(ends + group - 1, mask=group > 0, other=0)
    return tl.minimum(tl.maximum(end, 0), rows)


@triton.jit
def rows_of_block(ends, groups, count, rows, block, BLOCK: tl.constexpr, MANY: tl.constexpr):
    """(group, its first row, the block's first row, the group's end) of BLOCK rows with this number; none where the
    first is past the end. Of ``count`` groups, the last of which may be nobody's, out of MANY.
    """
    g = tl.arange(0, MANY)
    end = tl.load(ends + g - 1, mask=(g > 0) & (g < count), other=0)
    begins = tl.minimum(tl.maximum(end, 0), rows) // BLOCK + g <= block
    group = tl.sum((begins & (g < count)).to(tl.int32), 0) - 1
    group_first = _first_row(ends, group, rows)
    end_row = rows
    if group < groups:
        end_row = _first_row(ends, group + 1, rows)
    return group, group_first, group_first + (block - group_first // BLOCK - group) * BLOCK, end_row


@triton.jit
def _store_zeros(matrix, m0, column0, end, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    m, n = m0 + tl.arange(0, BLOCK_ROWS), column0 + tl.arange(0, BLOCK_COLUMNS)
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), matrix.data.dtype.element_ty)
    tl.store(pointers_to(matrix, 0, 0, m, n), zeros, mask=(m < end)[:, None] & (n < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "row_blocks"])
def _fused(task, rows, row_blocks, ends, groups, steps,
           PART: tl.constexpr, DROPOUT: tl.constexpr,
           BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
           BRANCH_DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
           IN_PLACE: tl.constexpr, PRECISION: tl.constexpr, MANY: tl.constexpr, counters=None):  # fmt: skip
    """PART: "all" (ticketed), "inner" or "out" (the launches of "split")."""
    inner_columns = tl.cdiv(task.rank, BLOCK_RANK)
    out_columns = tl.cdiv(task.columns, BLOCK_COLUMNS)
    if PART == "inner":
        row, column = work(tl.program_id(0), row_blocks, inner_columns, GROUP)
        flag = None
    elif PART == "out":
        row, column = work(tl.program_id(0), row_blocks, out_columns, GROUP)
        column += inner_columns
        flag = None
    else:
        ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed", scope="gpu")
        row, column = work(ticket, row_blocks, inner_columns + out_columns, GROUP)
        flag = counters + FIRST_FLAG + row
    group, _, m0, end = rows_of_block(ends, groups, groups + 1, rows, row, BLOCK_ROWS, MANY)
    at = group.to(tl.int64)
    is_nobodys = group == groups
    if m0 < end:
        if column < inner_columns:
            if is_nobodys:
                _store_zeros(task.inner, m0, column * BLOCK_RANK, end, task.rank, BLOCK_ROWS, BLOCK_RANK)
            else:
                inner_tile(task, end, None, m0, column, at * steps.down, False, BLOCK_ROWS, BLOCK_DEPTH, BLOCK_RANK,
                           EVEN_DEPTH, DROPOUT == "p", PRECISION)  # fmt: skip
                if PART == "all":
                    signal(flag)
        else:
            column -= inner_columns
            if is_nobodys:
                _store_zeros(task.out, m0, column * BLOCK_COLUMNS, end, task.columns, BLOCK_ROWS, BLOCK_COLUMNS)
            else:
                out_tile(task, end, None, None, m0, column, flag, at * steps.q, at * steps.up, at * steps.bias, False,
                         False, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_RANK, BRANCH_DEPTH, EVEN_DEPTH,
                         EVEN_COLUMNS, DROPOUT == "branch", IN_PLACE, PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _reduce(task, rows, ends, groups, out_step, parts, slots,
            BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr, PER_SHARE: tl.constexpr,
            DROPS: tl.constexpr, PRECISION: tl.constexpr, MANY: tl.constexpr, counters=None):  # fmt: skip
    """A tile of a group's ``out`` over PER_SHARE of its rows; a group without rows has a share, too, of zeros.

    parts: float32 [tiles, slots, BLOCK_COLUMNS, BLOCK_RANK], None where no group can have two shares. A group of more
    begins in the slot 2 / PER_SHARE of its first row: it has no more shares than slots. counters: one per slot.
    """
    tile = tl.program_id(0)
    group, group_first, first, end = rows_of_block(ends, groups, groups, rows, tl.program_id(1), PER_SHARE, MANY)
    shares = tl.maximum(tl.cdiv(end - group_first, PER_SHARE), 1)
    share = (first - group_first) // PER_SHARE
    if share < shares:
        out0 = group.to(tl.int64) * out_step
        column0, n, r = place(task, tile, BLOCK_COLUMNS, BLOCK_RANK)
        accumulator = sum_of_rows(task, column0, n, r, first, tl.minimum(first + PER_SHARE, end), BLOCK_ROWS,
                                  BLOCK_COLUMNS, BLOCK_RANK, DROPS, PRECISION)  # fmt: skip
        if shares == 1:
            store_gradient(task, accumulator, n, r, out0)
        elif parts is not None:
            slot = tile.to(tl.int64) * slots + group_first.to(tl.int64) * 2 // PER_SHARE
            first_part = parts + slot * (BLOCK_COLUMNS * BLOCK_RANK)
            add_parts(task, accumulator, n, r, first_part, share, shares, counters + slot, out0, BLOCK_COLUMNS,
                      BLOCK_RANK)  # fmt: skip


# -------------------------------------------------------------------------------------------------- host code


def forward(
    schedule: str, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, bias: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op ``grouped_lora_linear``: y [M, N] and s [M, rank], in x's dtype, contiguous."""
    y, s = x.new_empty((x.shape[0], weight.shape[-2])), x.new_empty((x.shape[0], lora_A.shape[1]))
    operands = forward_operands(y, s, x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)
    device: Any = device_of(x.device)  # of a GPU that ``supports`` has seen
    with on_device(x):
        run_all(fused_launches(device, schedule, *operands, offsets.contiguous(), drops="p"), x.device)
    return y, s


def backward(
    schedule: str, grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
    offsets: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op ``grouped_lora_linear_backward``: gradients of x, A and B in their dtypes; empty where not needed."""
    device: Any = device_of(x.device)
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_A = lora_A.new_empty(lora_A.shape if need_A else 0)
    grad_B = lora_B.new_empty(lora_B.shape if need_B else 0)
    ends = offsets.contiguous()
    with on_device(x):
        launches = []
        if need_x or need_A:
            grad_s = torch.empty_like(s)  # without the scaling, which is applied in float32 where grad_s is used
            operands = backward_operands(grad_x, grad_s, grad_y, weight, lora_A, lora_B, seed, scaling, dropout_p)
            launches += fused_launches(device, schedule if need_x else "inner", *operands, ends, drops="branch")
        if need_A:
            launches.append(reduce_launch(device, grad_A.mT, x, grad_s, ends, seed, scaling, dropout_p))
        if need_B:
            launches.append(reduce_launch(device, grad_B, grad_y, s, ends, None, scaling, 0.0))
        run_all(launches, x.device)
    return grad_x, grad_A, grad_B


def forward_operands(
    y: Tensor, s: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[FusedTask, Steps]:  # fmt: skip
    """The forward of all rows, with the first group's factors; y and s are written."""
    n, k = weight.shape[-2:]
    bias = None if bias is None else bias.contiguous()
    task = FusedTask(
        p=matrix_of(x), q=matrix_of(_first(weight, 2).t()), down=matrix_of(lora_A[0].t()), up=matrix_of(lora_B[0].t()),
        bias=bias, out=matrix_of(y), inner=matrix_of(s), seed=seed, threshold=philox.keep_threshold(dropout_p),
        keep_scale=philox.keep_scale(dropout_p), scaling=scaling, depth=k, columns=n, rank=lora_A.shape[1],
    )  # fmt: skip
    steps = Steps(_step(weight, 2), _step(lora_A, 2), _step(lora_B, 2), 0 if bias is None else _step(bias, 1))
    return task, steps


def backward_operands(
    grad_x: Tensor, grad_s: Tensor, grad_y: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[FusedTask, Steps]:  # fmt: skip
    """The gradient of x likewise; grad_x, where it is wanted, and grad_s are written."""
    n, k = weight.shape[-2:]
    task = FusedTask(
        p=matrix_of(grad_y), q=matrix_of(_first(weight, 2)), down=matrix_of(lora_B[0]), up=matrix_of(lora_A[0]),
        bias=None, out=matrix_of(grad_x.view(-1, k)), inner=matrix_of(grad_s), seed=seed,
        threshold=philox.keep_threshold(dropout_p), keep_scale=philox.keep_scale(dropout_p), scaling=scaling, depth=n,
        columns=k, rank=lora_A.shape[1],
    )  # fmt: skip
    return task, Steps(_step(weight, 2), _step(lora_B, 2), _step(lora_A, 2), 0)


def fused_launches(
    device: Device, schedule: str, task: FusedTask, steps: Steps, ends: Tensor, drops: str
) -> list[Launch]:
    """How ``out`` and ``inner`` of a task are computed; schedule "inner" leaves ``out`` alone.

    drops: what a seed applies to, "p" or "branch".
    """
    rows, groups = task.p.data.shape[0], ends.shape[0]
    masks_branch = drops == "branch" and task.seed is not None
    in_place = adds_in_place(task.scaling, masks_branch)
    float32 = float32_products(task.p.data.dtype)
    config = configs.grouped(
        device.target, device.sms, rows, task.columns, task.rank, groups, float32, is_aligned(task), not in_place
    )
    tile = config.tile
    row_blocks = configs.grouped_blocks(rows, tile.rows, groups) if rows > 0 else 0
    inner_columns = configs.blocks(task.rank, config.block_rank)
    out_columns = configs.blocks(task.columns, tile.columns)
    columns_of = {"all": inner_columns + out_columns, "inner": inner_columns, "out": out_columns}
    constants = {
        "DROPOUT": "none" if task.seed is None else drops,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "BLOCK_RANK": config.block_rank,
        "BRANCH_DEPTH": config.branch_depth,
        "EVEN_DEPTH": task.depth % tile.depth == 0,
        "EVEN_COLUMNS": task.columns % tile.columns == 0,
        "GROUP": config.group,
        "IN_PLACE": in_place,
        "PRECISION": float32,
        "MANY": triton.next_power_of_2(groups + 1),
    }
    return [
        Launch(
            kernel=_fused,
            grid=(row_blocks * columns_of[part],),
            args=(task, rows, row_blocks, ends, groups, steps),
            constants={"PART": part, **constants},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            counters=1 + row_blocks if part == "all" else 0,
        )
        for part in PARTS.get(schedule, (schedule,))
        if row_blocks > 0
    ]


def reduce_launch(
    device: Device, out: Tensor, big: Tensor, inner: Tensor, ends: Tensor, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> Launch:  # fmt: skip
    """How ``out = scaling * dropout(big)ᵀ inner`` of every group is computed: see ``reduce_by_group``."""
    return reduce_by_group(_reduce, device, out, big, inner, (ends, len(out)), seed, scaling, dropout_p)


def reduce_by_group(
    kernel: Any, device: Device, out: Tensor, big: Tensor, inner: Tensor, where: tuple, seed: Tensor | None,
    scaling: float, dropout_p: float, operands: tuple = (),
) -> Launch:  # fmt: skip
    """How a kernel computes ``out = scaling * dropout(big)ᵀ inner`` of every group.

    Args:
        out: [groups, columns, rank], any float dtype and strides.
        big: [rows, columns].
        inner: [rows, rank], dtype of big.
        where: which rows are whose, as the kernel takes it.
        operands: what it takes besides.
    """
    groups, columns, rank = out.shape
    rows = big.shape[0]
    float32, aligned = float32_products(big.dtype), columns % 16 == 0 and are_rows_aligned(matrix_of(big))
    config = configs.grouped_reduce(device.target, device.sms, rows, columns, rank, float32, aligned)
    tile = config.tile
    tiles = configs.blocks(columns, tile.columns) * configs.blocks(rank, config.block_rank)
    slots, parts = 2 * rows // config.rows, None
    if slots > 0:
        shape = (tiles, slots, tile.columns, config.block_rank)
        parts = torch.empty(shape, dtype=torch.float32, device=big.device)
    task = ReduceTask(
        big=matrix_of(big.t()), inner=matrix_of(inner), out=matrix_of(out[0]), seed=seed,
        threshold=philox.keep_threshold(dropout_p),
        scale=scaling if seed is None else scaling * philox.keep_scale(dropout_p),
        columns=columns, rank=rank,
    )  # fmt: skip
    return Launch(
        kernel=kernel,
        grid=(tiles, rows // config.rows + groups),
        args=(task, *operands, rows, *where, out.stride(0), parts, slots),
        constants={
            "BLOCK_ROWS": tile.rows,
            "BLOCK_COLUMNS": tile.columns,
            "BLOCK_RANK": config.block_rank,
            "PER_SHARE": config.rows,
            "DROPS": seed is not None,
            "PRECISION": float32,
            "MANY": triton.next_power_of_2(groups),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        counters=tiles * slots,
    )


def _first(t: Tensor, shared_dim: int) -> Tensor:
    """The first group's, of a weight that may be one for all."""
    return t if t.dim() == shared_dim else t[0]


def _step(t: Tensor, shared_dim: int) -> int:
    return 0 if t.dim() == shared_dim else t.stride(0)
