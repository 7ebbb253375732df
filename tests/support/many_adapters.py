"""Problems of ``multi_lora_linear``, and what it means: a loop over rows in plain torch code."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import philox

SCALINGS, SEED = (1.7, 0.5, -1.0, 2.0, 0.25), 2026


class Batch(NamedTuple):
    """The adapter of each row, the rank of each adapter, and the layer's sizes."""

    ids: tuple[int, ...]
    ranks: tuple[int, ...]
    k: int
    n: int

    @property
    def rank(self) -> int:
        return max(*self.ranks, 1)

    def ids_tensor(self, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(self.ids, dtype=dtype)


def scattered(rows: int, adapters: int, none_every: int = 5) -> tuple[int, ...]:
    """Ids in no order, with rows of none among them."""
    return tuple(-1 if row % none_every == 3 else (7 * row + row // 4) % adapters for row in range(rows))


# Mixed ranks, an adapter of no rank, adapters without rows, rows of none, one row, more rows than a panel has, none.
BATCHES = [
    Batch(scattered(23, 4), (4, 1, 0, 7), 40, 24),
    Batch((2, 0, 1, 3, 4, 2, -1, 0), (8, 8, 8, 8, 8), 24, 56),
    Batch((1,) * 300 + (0,) * 5 + (-1,) * 3 + (1,) * 220, (3, 16), 33, 65),
    Batch((-1,) * 9, (4, 4), 16, 20),
    Batch((1,), (4, 5), 48, 30),
    Batch((0, 2, 0), (33, 2, 20), 100, 17),
    Batch((), (4, 2), 16, 20),
]


def make_problem(batch: Batch, dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool) -> dict[str, Tensor | None]:
    """Inputs representable in their dtypes, as float64; what a pool holds beyond an adapter's rank is NaN."""
    m, adapters, rank = len(batch.ids), len(batch.ranks), batch.rank

    def random(*size: int, like: torch.dtype, over: int = 1) -> Tensor:
        return (torch.randn(size) / math.sqrt(over)).to(like).double()

    lora_A = random(adapters, rank, batch.k, like=adapter_dtype, over=batch.k)
    lora_B = random(adapters, batch.n, rank, like=adapter_dtype, over=rank)
    for slot, used in enumerate(batch.ranks):
        lora_A[slot, used:], lora_B[slot, :, used:] = torch.nan, torch.nan
    return {
        "x": random(m, batch.k, like=dtype),
        "weight": random(batch.n, batch.k, like=dtype, over=batch.k),
        "lora_A": lora_A,
        "lora_B": lora_B,
        "bias": random(batch.n, like=dtype) if bias else None,
        "grad_y": random(m, batch.n, like=dtype),
    }


def looped(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, batch: Batch, p: float = 0.0
) -> Tensor:
    """Every adapter's rows by themselves."""
    keep = philox.keep_mask(torch.tensor([SEED]), *x.shape, p) if p else None
    dropped = x if keep is None else torch.where(keep, x * philox.keep_scale(p), torch.zeros((), dtype=x.dtype))
    y, ids = F.linear(x, weight, bias), batch.ids_tensor()
    for slot, rank in enumerate(batch.ranks):
        rows = (ids == slot).nonzero().flatten()
        if rank and len(rows):
            s = F.linear(dropped[rows], lora_A[slot, :rank])
            y = y.index_add(0, rows, F.linear(s, lora_B[slot, :, :rank]) * SCALINGS[slot])
    return y


def small(batch: Batch = BATCHES[0], dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, Tensor | None]:
    """Arguments of the op, leaves that require grad; pools hold numbers everywhere."""
    problem = make_problem(batch, dtype, dtype, bias)
    t = {k: None if v is None else v.nan_to_num(0.5).to(dtype) for k, v in problem.items()}
    del t["grad_y"]
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    return {**t, "adapter_ids": batch.ids_tensor()}
