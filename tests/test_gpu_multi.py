"""multi_lora_linear on a GPU, by the CUDA and by the Triton kernels: values and gradients against float64."""

from __future__ import annotations

from typing import NamedTuple

import gpu
import pytest
import torch
from covering import case_id, covering_pairs
from gpu import BF16, DEVICE, FP16, FP32, RESULTS, SCALING, SEED
from numerics import assert_as_accurate
from torch import Tensor

import lora_kernels as lk
from lora_kernels.ops.multi_lora_linear import BACKWARD, SPEC

pytestmark = gpu.needed


class Problem(NamedTuple):
    """Operands of rows that have adapters in pools, and the gradient of their result, on the device."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    adapter_ids: Tensor
    ranks: Tensor | None
    scalings: Tensor | None
    bias: Tensor | None
    grad_y: Tensor
    p: float

    def double(self) -> Problem:
        return Problem(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self))


def problem(ids, ranks, n, k, dtypes=(BF16, BF16), *, scalings=True, bias=False, p=0.0):
    """``ids`` of rows, -1: none; what pools hold beyond an adapter's rank is NaN."""
    dtype, adapter_dtype = dtypes
    adapters, most = len(ranks), max(ranks)

    def random(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype)

    lora_A = random(adapters, most, k, scale=k**-0.5, dtype=adapter_dtype)
    lora_B = random(adapters, n, most, scale=most**-0.5, dtype=adapter_dtype)
    for slot, rank in enumerate(ranks):
        lora_A[slot, rank:], lora_B[slot, :, rank:] = torch.nan, torch.nan
    return Problem(
        random(len(ids), k), random(n, k, scale=k**-0.5), lora_A, lora_B, torch.tensor(ids, device=DEVICE),
        torch.tensor(ranks, device=DEVICE), torch.linspace(-1.0, 2.0, adapters, device=DEVICE) if scalings else None,
        random(n) if bias else None, random(len(ids), n), p,
    )  # fmt: skip


def fused(q: Problem) -> list[Tensor]:
    """[y, dX, dA, dB]."""
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (q.x, q.lora_A, q.lora_B))
    scaling = SCALING if q.scalings is None else q.scalings * SCALING
    options = dict(scaling=scaling, ranks=q.ranks, dropout_p=q.p, training=q.p > 0, seed=SEED)
    y = lk.multi_lora_linear(x, q.weight, lora_A, lora_B, q.adapter_ids, q.bias, **options)
    return [y.detach(), *torch.autograd.grad(y, [x, lora_A, lora_B], q.grad_y, materialize_grads=True)]


def by_torch(q: Problem) -> list[Tensor]:
    """The same by the unfused code that defines the op, in the problem's dtypes."""
    seed = torch.tensor([SEED], device=DEVICE) if q.p > 0 else None
    rest = q.adapter_ids, q.ranks, q.scalings
    y, s = SPEC.reference(q.x, q.weight, q.lora_A, q.lora_B, *rest, q.bias, seed, SCALING, q.p)
    factors = q.weight, q.lora_A, q.lora_B, *rest, seed
    return [y, *BACKWARD.reference(q.grad_y, q.x, s, *factors, SCALING, q.p, True, True, True)]


def check(q: Problem, backend: str) -> list[Tensor]:
    """By ``backend`` alone, as close to float64 as the yardstick asks."""
    unfused, exact = by_torch(q), by_torch(q.double())
    gpu.poison(unfused)
    lk.reset_stats()
    ours = gpu.unless_triton_is_old(lambda: fused(q))
    served = lk.stats()["served"]
    assert served == {("multi_lora_linear", backend): 1, ("multi_lora_linear_backward", backend): 1}, served
    for name, value, bound, true in zip(RESULTS, ours, unfused, exact):
        assert value.dtype == bound.dtype
        assert_as_accurate(value.to(q.x.dtype), bound, true, name)
    return ours


def scattered(rows: int, adapters: int) -> list[int]:
    return [-1 if row % 5 == 3 else (7 * row + row // 4) % adapters for row in range(rows)]


ROWS = {"one": 1, "few": 16, "tens": 50, "hundreds": 300, "thousands": 3000}
RANKS = {"mixed": (16, 4, 0, 64, 9), "equal": (16,) * 8, "many": (8,) * 200, "wide": (200, 130)}
AXES = {
    "rows": tuple(ROWS),
    "sizes": ((1024, 520), (136, 2048)),
    "ranks": tuple(RANKS),
    "dtypes": ((BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)),
    "p": (0.0, 0.3),
    "scalings": (False, True),
    "bias": (False, True),
}


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_values_and_gradients(backend, case):
    ranks = RANKS[case["ranks"]]
    options = {name: case[name] for name in ("p", "scalings", "bias")}
    check(problem(scattered(ROWS[case["rows"]], len(ranks)), ranks, *case["sizes"], case["dtypes"], **options), backend)


@pytest.mark.parametrize("rows", [16, 900])
def test_the_same_bits_twice_and_whatever_others_have(backend, rows):
    q = problem(scattered(rows, 4), (16, 8, 24, 16), 1024, 520)
    first, again = fused(q), fused(q)
    for a, b in zip(first, again):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    base = fused(q._replace(adapter_ids=torch.full_like(q.adapter_ids, -1)))
    none = q.adapter_ids < 0
    for a, b in zip(first[:2], base[:2]):
        assert torch.equal(a[none].view(torch.int16), b[none].view(torch.int16))
    mine = q.adapter_ids == 2
    other = fused(q._replace(adapter_ids=torch.where(mine, 2, 1)))
    for a, b in zip(first[:2], other[:2]):
        assert torch.equal(a[mine].view(torch.int16), b[mine].view(torch.int16))


def test_an_adapter_that_holds_nan_spoils_its_own_rows(backend):
    for rows in (16, 300):
        q = problem(scattered(rows, 4), (16, 8, 24, 16), 136, 520)
        clean = fused(q)
        q.lora_A[2] = q.lora_B[2] = torch.nan
        mine = q.adapter_ids == 2
        for a, b in zip(fused(q)[:2], clean[:2]):
            assert a[mine].isnan().all()
            assert torch.equal(a[~mine], b[~mine])


@gpu.only
@pytest.mark.parametrize("rows", [16, 512])
def test_a_graph_follows_the_ids(backend, rows):
    """Ids and ranks are never asked for on the host: a graph that was captured with some serves others."""
    q = problem(scattered(rows, 3), (16, 8, 24), 1024, 520)
    q = q._replace(lora_A=q.lora_A.nan_to_num(), lora_B=q.lora_B.nan_to_num())
    rest = q.adapter_ids, q.ranks, q.scalings

    def run():
        y, s = torch.ops.lora_kernels.multi_lora_linear(
            q.x, q.weight, q.lora_A, q.lora_B, *rest, None, None, SCALING, 0.0
        )
        factors = q.weight, q.lora_A, q.lora_B, *rest, None, SCALING, 0.0, True, True, True
        return y, *torch.ops.lora_kernels.multi_lora_linear_backward(q.grad_y, q.x, s, *factors)

    gpu.unless_triton_is_old(run)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for ids in ([-1] * rows, [2] * rows, scattered(rows, 2)):
        q.adapter_ids.copy_(torch.tensor(ids))
        q.ranks.copy_(torch.tensor([3, 24, 17]))
        graph.replay()
        for a, b in zip(captured, run()):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
