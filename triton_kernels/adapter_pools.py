"""Adapters in pools, as the device finds them by number, and the rows of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import LAST_CONSTANT, Launch

_ORDER_BLOCK = 1024

# ------------------------------------------------------------------------------------------------ device code


class Pools(NamedTuple):
    """Adapters: those of a task's ``down`` and ``up`` are the first one's, the next has its own so many elements on."""

    ranks: Any  # [count] integers, or None: all ranks of the task
    scalings: Any  # [count], or None
    down_step: Any
    up_step: Any
    count: Any
    end: None = LAST_CONSTANT


@triton.jit
def rank_of(pools, number, most):
    rank = most
    if pools.ranks is not None:
        rank = tl.minimum(tl.maximum(tl.load(pools.ranks + number), 0), most).to(tl.int32)
    return rank


@triton.jit
def scaling_of(pools, number, scaling):
    if pools.scalings is not None:
        scaling = tl.load(pools.scalings + number).to(tl.float32) * scaling
    return scaling


@triton.jit(do_not_specialize=["rows"])
def _order(ids, rows, order, ends, BLOCK: tl.constexpr):
    """The rows of adapter ``program_id(0)``, behind those of lower ones, and where they end."""
    adapter = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    first = tl.zeros((), tl.int32)
    for row0 in range(0, rows, BLOCK):
        id = tl.load(ids + row0 + i, mask=i < rows - row0, other=-1)
        first += tl.sum(((id >= 0) & (id < adapter)).to(tl.int32), 0)
    for row0 in range(0, rows, BLOCK):
        id = tl.load(ids + row0 + i, mask=i < rows - row0, other=-1)
        own = (id == adapter).to(tl.int32)
        tl.store(order + first + tl.cumsum(own, 0) - 1, row0 + i, mask=own == 1)
        first += tl.sum(own, 0)
    tl.store(ends + adapter, first)


# -------------------------------------------------------------------------------------------------- host code


class Order(NamedTuple):
    """The rows of each adapter."""

    rows: Tensor  # int32 [rows]
    ends: Tensor  # int32 [adapters]


def pools_of(down: Tensor, up: Tensor, ranks: Tensor | None, scalings: Tensor | None) -> Pools:
    ranks, scalings = (None if t is None else t.contiguous() for t in (ranks, scalings))
    return Pools(ranks, scalings, down.stride(0), up.stride(0), len(down))


def order_launch(ids: Tensor, adapters: int) -> tuple[Order, Launch]:
    """Where each adapter's rows will stand, and how they are looked up."""
    rows = len(ids)
    order = Order(*(torch.empty(size, dtype=torch.int32, device=ids.device) for size in (rows, adapters)))
    return order, Launch(
        kernel=_order, grid=(adapters,), args=(ids, rows, *order), constants={"BLOCK": _ORDER_BLOCK}, num_warps=4,
        num_stages=1,
    )  # fmt: skip
