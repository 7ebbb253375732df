"""Problems of ``lora_pack``, and what it means: each member by itself in plain torch code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import philox

SEED = 2026
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Pack(NamedTuple):
    """Rows, in_features, and of each member its out_features and its rank, 0 where it has no adapter."""

    m: int
    k: int
    ns: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def scalings(self) -> list[float]:
        return [(1.7, 0.5, -1.0, 2.0)[i % 4] for i in range(len(self.ns))]


# Ragged everywhere, one member, equal members, ranks from 1 to 256, members without adapters, more than one block of
# rows, no rows.
PACKS = [
    Pack(37, 100, (65, 24, 33), (17, 4, 1)),
    Pack(130, 576, (70, 24, 24), (16, 16, 16)),
    Pack(3, 48, (40, 16, 24), (8, 2, 5)),
    Pack(1, 33, (117, 20), (5, 3)),
    Pack(66, 40, (24, 30, 17, 9), (3, 0, 7, 0)),
    Pack(2, 40, (24, 30), (0, 7)),
    Pack(70, 64, (48,), (9,)),
    Pack(9, 64, (48, 8), (256, 2)),
    Pack(1100, 24, (20, 12), (4, 2)),
    Pack(0, 8, (8, 4), (1, 2)),
    Pack(5, 16, (8, 4), (0, 0)),
]

Problem = dict[str, Any]


def make_problem(pack: Pack, dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool) -> Problem:
    """Inputs representable in their dtypes, as float64; every other member has a bias, if any has."""

    def random(*size: int, like: torch.dtype = dtype, over: int = 1) -> Tensor:
        return (torch.randn(size) / math.sqrt(over)).to(like).double()

    m, k, ns, ranks = pack
    return {
        "x": random(m, k),
        "weights": [random(n, k, over=k) for n in ns],
        "lora_As": [random(r, k, like=adapter_dtype, over=k) if r else None for r in ranks],
        "lora_Bs": [random(n, r, like=adapter_dtype, over=r) if r else None for n, r in zip(ns, ranks)],
        "biases": [random(n) if bias and i % 2 == 0 else None for i, n in enumerate(ns)],
        "grad_ys": [random(m, n) for n in ns],
    }


def apart(
    x: Tensor, weights: list[Tensor], lora_As: list[Any], lora_Bs: list[Any], biases: list[Any],
    scalings: list[float], p: float = 0.0, seed: int = SEED,
) -> list[Tensor]:  # fmt: skip
    """Unfused torch code, with a mask for each member."""
    ys = []
    for i, (weight, A, B, bias, scaling) in enumerate(zip(weights, lora_As, lora_Bs, biases, scalings)):
        y = F.linear(x, weight, bias)
        if A is not None:
            dropped = x
            if p:
                keep = philox.keep_mask(philox.member_seed(torch.tensor([seed], device=x.device), i), *x.shape, p)
                dropped = torch.where(keep, x * philox.keep_scale(p), torch.zeros((), dtype=x.dtype))
            y = y + F.linear(F.linear(dropped, A), B) * scaling
        ys.append(y)
    return ys


def cast(problem: Problem, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Problem:
    """The problem in these dtypes: x and the adapters are leaves that require grad."""

    def of(name: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.to(adapter_dtype if "lora" in name else dtype)
        return t.requires_grad_() if name == "x" or "lora" in name else t

    return {
        name: [of(name, t) for t in given] if isinstance(given, list) else of(name, given)
        for name, given in problem.items()
    }


def leaves(t: Problem) -> list[Tensor]:
    return [t["x"], *(leaf for leaf in (*t["lora_As"], *t["lora_Bs"]) if leaf is not None)]


def run(problem: Problem, dtype: torch.dtype, adapter_dtype: torch.dtype, function: Callable[..., Any]) -> Problem:
    """Of ``function`` in these dtypes, by name: each y and the gradients of x, of all A and of all B."""
    t = cast(problem, dtype, adapter_dtype)
    grad_ys = t.pop("grad_ys")
    ys = function(**t)
    grads = torch.autograd.grad(ys, leaves(t), grad_ys, allow_unused=True, materialize_grads=True)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    members = [i for i, A in enumerate(t["lora_As"]) if A is not None]
    names = ["dx", *(f"dA{i}" for i in members), *(f"dB{i}" for i in members)]
    return {**found, **dict(zip(names, grads, strict=True))}


def small(pack: Pack = PACKS[0], dtype: torch.dtype = FP32, bias: bool = True) -> Problem:
    """Arguments of ``lk.lora_pack``; x and the adapters require grad."""
    t = cast(make_problem(pack, dtype, dtype, bias), dtype, dtype)
    del t["grad_ys"]
    return t


def op_arguments(pack: Pack, p: float, dtype: torch.dtype = FP32, bias: bool = True) -> tuple:
    """Arguments of the registered op."""
    t = small(pack, dtype, bias)
    As = [torch.empty(0, pack.k, dtype=dtype) if A is None else A for A in t["lora_As"]]
    Bs = [torch.empty(n, 0, dtype=dtype) if B is None else B for n, B in zip(pack.ns, t["lora_Bs"])]
    biases = [torch.empty(0, dtype=dtype) if b is None else b for b in t["biases"]] if bias else []
    seed = torch.tensor([SEED]) if p else None
    return t["x"], t["weights"], As, Bs, biases, seed, pack.scalings, [p] * len(pack.ns)
