"""Problems of ``grouped_lora_linear``, and what it means: a loop over groups in plain torch code."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import philox

SCALING, SEED = 1.7, 2026


class Sizes(NamedTuple):
    """Rows per group, the rows behind the last group, and the layer's sizes."""

    rows: tuple[int, ...]
    k: int
    n: int
    r: int
    behind: int = 0

    @property
    def m(self) -> int:
        return sum(self.rows) + self.behind


# Empty groups at every place, single rows, a group of everything, rows of nobody, many tiny groups, ragged sizes.
SIZES = [
    Sizes((5, 7, 12), 40, 24, 4),
    Sizes((0, 9, 0, 1, 30, 0), 33, 65, 5),
    Sizes((64,), 48, 30, 16, behind=3),
    Sizes((0, 37, 0), 100, 17, 9, behind=70),
    Sizes((1,) * 19, 24, 56, 8),
    Sizes((150, 1, 90), 72, 136, 33),
    Sizes((0, 0), 16, 16, 2, behind=5),
    Sizes((0, 0), 16, 16, 2),
]


def make_problem(
    sizes: Sizes, dtype: torch.dtype, adapter_dtype: torch.dtype, *, shared: bool = False, bias: str | None = None
) -> dict[str, Tensor | None]:
    """Inputs representable in their dtypes, as float64; ``bias`` is None, "one" or "each"."""
    groups, m, k, n, r = len(sizes.rows), sizes.m, sizes.k, sizes.n, sizes.r

    def random(*size: int, like: torch.dtype, over: int = 1) -> Tensor:
        return (torch.randn(size) / math.sqrt(over)).to(like).double()

    lead = () if shared else (groups,)
    return {
        "x": random(m, k, like=dtype),
        "weight": random(*lead, n, k, like=dtype, over=k),
        "lora_A": random(groups, r, k, like=adapter_dtype, over=k),
        "lora_B": random(groups, n, r, like=adapter_dtype, over=r),
        "bias": None if bias is None else random(*(() if bias == "one" else (groups,)), n, like=dtype),
        "grad_y": random(m, n, like=dtype),
    }


def offsets_of(sizes: Sizes) -> Tensor:
    return torch.tensor(sizes.rows).cumsum(0).int()


def looped(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, sizes: Sizes, p: float = 0.0,
    scaling: float | list[float] = SCALING,
) -> Tensor:  # fmt: skip
    """Every group's rows by themselves."""
    keep = philox.keep_mask(torch.tensor([SEED]), *x.shape, p) if p else None
    dropped = x if keep is None else torch.where(keep, x * philox.keep_scale(p), torch.zeros((), dtype=x.dtype))
    parts, first = [], 0
    for g, count in enumerate(sizes.rows):
        rows = slice(first, first + count)
        first += count
        W, b = (t if t is None or t.dim() == d else t[g] for t, d in ((weight, 2), (bias, 1)))
        factor = scaling[g] if isinstance(scaling, list) else scaling
        parts.append(F.linear(x[rows], W, b) + F.linear(F.linear(dropped[rows], lora_A[g]), lora_B[g]) * factor)
    return torch.cat([*parts, x.new_zeros(sizes.behind, weight.shape[-2])])


def run(problem: dict, dtype: torch.dtype, adapter_dtype: torch.dtype, function) -> list[Tensor]:
    """[y, dx, dA, dB] of ``function`` in these dtypes; a gradient that nobody asks for is zero."""
    cast = {k: None if v is None else v.to(adapter_dtype if "lora" in k else dtype) for k, v in problem.items()}
    grad_y = cast.pop("grad_y")
    leaves = [cast[k].requires_grad_() for k in ("x", "lora_A", "lora_B")]
    y = function(**cast)
    grads = torch.autograd.grad(y, leaves, grad_y, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]
