"""The kernels of ``lora_pack`` and its backward: those of ``lora_linear``, with tile columns that enumerate members.

A member is a ``FusedTask`` with factors of its own. In the forward all read one p and each writes its ``out``; for the
gradient of x each has a p of its own, and a tile of the one ``out`` sums the products of all, and then their branches.
One launch does either: the tiles of every member's ``inner`` have the lower tickets, and a flag for each member.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import philox
from lora_kernels.plain import float32_products

from . import configs
from .launching import LAST_CONSTANT, Device, Launch, device_of, on_device, run_all
from .lora_linear import (
    FIRST_FLAG,
    PARTS,
    TICKET,
    FusedTask,
    add_low_rank,
    add_product,
    adds_in_place,
    await_inner,
    backward_task,
    forward_task,
    inner_tile,
    is_aligned,
    out_tile,
    reduce_launch,
    signal,
    store_out,
    work,
)

# ------------------------------------------------------------------------------------------------ device code


@triton.jit
def _sum_tile(tasks, rows, m0, column_block, flags, COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
              BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
              BRANCH_DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
              DROPS_BRANCH: tl.constexpr, IN_PLACE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of the ``out`` of all members; ``flags`` as out_tile's."""
    n0 = column_block * BLOCK_COLUMNS
    m = m0 + tl.arange(0, BLOCK_ROWS)
    clamped = tl.minimum(m, rows - 1)
    n = n0 + tl.arange(0, BLOCK_COLUMNS)
    n_valid = None if EVEN_COLUMNS else n < tasks[0].columns
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for i in tl.static_range(COUNT):
        accumulator = add_product(accumulator, tasks[i], None, None, m0, n0, clamped, n, n_valid, 0, False, False,
                                  BLOCK_DEPTH, EVEN_DEPTH, PRECISION)  # fmt: skip
    for i in tl.static_range(COUNT):
        if flags is not None:
            await_inner(flags + i, tasks[i], BLOCK_RANK)
        accumulator = add_low_rank(accumulator, tasks[i], n0, clamped, n, n_valid, 0, BLOCK_ROWS, BLOCK_COLUMNS,
                                   BRANCH_DEPTH, DROPS_BRANCH, IN_PLACE, PRECISION)  # fmt: skip
    store_out(tasks[0], accumulator, rows, m, n, 0)


@triton.jit(do_not_specialize=["rows"])
def _fused(tasks, rows, COUNT: tl.constexpr, IS_SUM: tl.constexpr, PART: tl.constexpr, DROPOUT: tl.constexpr,
           BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
           BRANCH_DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
           IN_PLACE: tl.constexpr, PRECISION: tl.constexpr, counters=None):  # fmt: skip
    """PART: "all" (ticketed), "inner" or "out" (the launches of "split"). IS_SUM: of one ``out``, not one each."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    inner_columns = 0
    out_columns = 0
    for i in tl.static_range(COUNT):
        inner_columns += tl.cdiv(tasks[i].rank, BLOCK_RANK)
        out_columns += tl.cdiv(tasks[i].columns, BLOCK_COLUMNS)
    if IS_SUM:
        out_columns = tl.cdiv(tasks[0].columns, BLOCK_COLUMNS)
    if PART == "inner":
        row, column = work(tl.program_id(0), row_blocks, inner_columns, GROUP)
        flags = None
    elif PART == "out":
        row, column = work(tl.program_id(0), row_blocks, out_columns, GROUP)
        column += inner_columns
        flags = None
    else:
        ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed", scope="gpu")
        row, column = work(ticket, row_blocks, inner_columns + out_columns, GROUP)
        flags = counters + FIRST_FLAG + row * COUNT
    m0 = row * BLOCK_ROWS

    first = 0
    if PART != "out":
        for i in tl.static_range(COUNT):
            end = first + tl.cdiv(tasks[i].rank, BLOCK_RANK)
            if (column >= first) & (column < end):
                inner_tile(tasks[i], rows, None, m0, column - first, 0, False, BLOCK_ROWS, BLOCK_DEPTH, BLOCK_RANK,
                           EVEN_DEPTH, DROPOUT == "p", PRECISION)  # fmt: skip
                if PART == "all":
                    signal(flags + i)
            first = end
    if PART != "inner":
        first = inner_columns
        if IS_SUM:
            if column >= first:
                _sum_tile(tasks, rows, m0, column - first, flags, COUNT, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
                          BLOCK_RANK, BRANCH_DEPTH, EVEN_DEPTH, EVEN_COLUMNS, DROPOUT == "branch", IN_PLACE,
                          PRECISION)  # fmt: skip
        else:
            for i in tl.static_range(COUNT):
                end = first + tl.cdiv(tasks[i].columns, BLOCK_COLUMNS)
                flag = None if flags is None else flags + i
                if (column >= first) & (column < end):
                    out_tile(tasks[i], rows, None, None, m0, column - first, flag, 0, 0, 0, False, False, BLOCK_ROWS,
                             BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_RANK, BRANCH_DEPTH, EVEN_DEPTH, EVEN_COLUMNS, False,
                             IN_PLACE, PRECISION)  # fmt: skip
                first = end


# -------------------------------------------------------------------------------------------------- host code

Tensors = list[Tensor]


def forward(
    schedule: str, x: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, biases: Tensors,
    seed: Tensor | None, scalings: list[float], dropout_p: list[float],
) -> tuple[Tensors, Tensor]:  # fmt: skip
    """The op ``lora_pack``: y of each member [..., N_i] and s, in x's dtype, contiguous."""
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    s = x.new_empty(x.shape[:-1].numel() * sum(A.shape[0] for A in lora_As))
    tasks = forward_tasks(ys, s, x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_p)
    device: Any = device_of(x.device)  # of a GPU that ``supports`` has seen
    with on_device(x):
        run_all(fused_launches(device, schedule, tasks, is_sum=False), x.device)
    return ys, s


def backward(
    schedule: str, grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors,
    seed: Tensor | None, scalings: list[float], dropout_p: list[float], need_x: bool, need_A: list[bool],
    need_B: list[bool],
) -> tuple[Tensor, Tensors, Tensors]:  # fmt: skip
    """The op ``lora_pack_backward``: gradients of x, each A and each B in their dtypes; empty where not needed."""
    device: Any = device_of(x.device)
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_As = [A.new_empty(A.shape if need else 0) for A, need in zip(lora_As, need_A)]
    grad_Bs = [B.new_empty(B.shape if need else 0) for B, need in zip(lora_Bs, need_B)]
    with on_device(x):
        launches = []
        grad_s = torch.empty_like(s)  # without the scaling, which is applied in float32 where grad_s is used
        if need_x or any(need_A):
            tasks = backward_tasks(grad_x, grad_s, grad_ys, weights, lora_As, lora_Bs, seed, scalings, dropout_p)
            launches += fused_launches(device, schedule if need_x else "inner", tasks, is_sum=True)
        rows = x.shape[:-1].numel()
        for i, (grad_of, s_of) in enumerate(zip(_parts(grad_s, rows, lora_As), _parts(s, rows, lora_As))):
            if need_A[i] and grad_As[i].numel():
                launches.append(
                    reduce_launch(device, grad_As[i].t(), x, grad_of, seed, scalings[i], dropout_p[i], _seed_step(i))
                )
            if need_B[i] and grad_Bs[i].numel():
                launches.append(reduce_launch(device, grad_Bs[i], grad_ys[i], s_of, None, scalings[i], 0.0))
        run_all(launches, x.device)
    return grad_x, grad_As, grad_Bs


def forward_tasks(
    ys: Tensors, s: Tensor, x: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, biases: Tensors,
    seed: Tensor | None, scalings: list[float], dropout_p: list[float],
) -> list[FusedTask]:  # fmt: skip
    """Operands of each member's forward; ys and s are written."""
    x, tasks = x.reshape(-1, x.shape[-1]), []
    members = zip(ys, _parts(s, len(x), lora_As), weights, lora_As, lora_Bs, scalings, dropout_p, strict=True)
    for i, (y, s_of, weight, A, B, scaling, p) in enumerate(members):
        bias = biases[i] if biases and biases[i].numel() else None
        tasks.append(_of_member(i, forward_task(y, s_of, x, weight, A, B, bias, seed, scaling, p)))
    return tasks


def backward_tasks(
    grad_x: Tensor, grad_s: Tensor, grad_ys: Tensors, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors,
    seed: Tensor | None, scalings: list[float], dropout_p: list[float],
) -> list[FusedTask]:  # fmt: skip
    """Operands of each member's part of the gradient of x; grad_x and grad_s are written."""
    parts = _parts(grad_s, grad_ys[0].shape[:-1].numel(), lora_As)
    members = zip(parts, grad_ys, weights, lora_As, lora_Bs, scalings, dropout_p, strict=True)
    return [
        _of_member(i, backward_task(grad_x, s_of, grad_y, weight, A, B, seed, scaling, p))
        for i, (s_of, grad_y, weight, A, B, scaling, p) in enumerate(members)
    ]


def _parts(s: Tensor, rows: int, lora_As: Tensors) -> list[Tensor]:
    """Each member's s, [rows, rank]."""
    ranks = [A.shape[0] for A in lora_As]
    return [part.view(rows, rank) for part, rank in zip(s.split([rows * rank for rank in ranks]), ranks)]


def _seed_step(member: int) -> int | None:
    return philox.member_seed(0, member) if member else None


def _of_member(member: int, task: FusedTask) -> FusedTask:
    """With the member's mask; where there is no branch, nothing is multiplied by its scaling."""
    scaling = task.scaling if task.rank else 1.0
    return task._replace(seed_step=None if task.seed is None else _seed_step(member), scaling=scaling)


def fused_launches(device: Device, schedule: str, tasks: list[FusedTask], *, is_sum: bool) -> list[Launch]:
    """How each ``out`` and ``inner`` of tasks are computed; schedule "inner" leaves ``out`` alone.

    is_sum: the tasks share one ``out``, and a seed applies to their branches; else they share p, which it applies to.
    """
    first = tasks[0]
    rows, float32 = first.p.data.shape[0], float32_products(first.p.data.dtype)
    masks_branch = is_sum and first.seed is not None
    in_place = all(adds_in_place(task.scaling, masks_branch) for task in tasks)
    columns = first.columns if is_sum else sum(task.columns for task in tasks)
    rank, aligned = max(task.rank for task in tasks), all(map(is_aligned, tasks))
    # Tiles of several matrices q, as those of groups, do without descriptors.
    config = configs.grouped(device.target, device.sms, rows, columns, rank, 1, float32, aligned, not in_place)
    branch_depth = config.branch_depth if all(task.rank % 16 == 0 for task in tasks) else 16
    tile = config.tile
    row_blocks = configs.blocks(rows, tile.rows)
    inner_columns = sum(configs.blocks(task.rank, config.block_rank) for task in tasks)
    out_columns = sum(configs.blocks(task.columns, tile.columns) for task in (tasks[:1] if is_sum else tasks))
    columns_of = {"all": inner_columns + out_columns, "inner": inner_columns, "out": out_columns}
    constants = {
        "COUNT": len(tasks),
        "IS_SUM": is_sum,
        "DROPOUT": "none" if first.seed is None else ("branch" if is_sum else "p"),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "BLOCK_RANK": config.block_rank,
        "BRANCH_DEPTH": branch_depth,
        "EVEN_DEPTH": all(task.depth % tile.depth == 0 for task in tasks),
        "EVEN_COLUMNS": all(task.columns % tile.columns == 0 for task in tasks),
        "GROUP": config.group,
        "IN_PLACE": in_place,
        "PRECISION": float32,
    }
    return [
        Launch(
            kernel=_fused,
            grid=(row_blocks * columns_of[part],),
            args=((*tasks, LAST_CONSTANT), rows),
            constants={"PART": part, **constants},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            counters=1 + row_blocks * len(tasks) if part == "all" else 0,
        )
        for part in PARTS.get(schedule, (schedule,))
        if row_blocks * columns_of[part] > 0
    ]
