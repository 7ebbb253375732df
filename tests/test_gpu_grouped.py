"""grouped_lora_linear on a GPU, by the CUDA and by the Triton kernels: values and gradients against float64."""

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
from lora_kernels.ops.grouped_lora_linear import BACKWARD, SPEC

pytestmark = gpu.needed


class Problem(NamedTuple):
    """Operands of rows in groups, and the gradient of their result, on the device."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    offsets: Tensor
    bias: Tensor | None
    grad_y: Tensor
    p: float

    def double(self) -> Problem:
        return Problem(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self))


def problem(rows, n, k, rank, dtypes=(BF16, BF16), *, behind=0, shared=False, in_columns=False, bias=None, p=0.0):
    dtype, adapter_dtype = dtypes
    groups, m = len(rows), sum(rows) + behind

    def random(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype)

    weight = random(*(() if shared else (groups,)), n, k, scale=k**-0.5)
    return Problem(
        random(m, k), weight.mT.contiguous().mT if in_columns else weight,
        random(groups, rank, k, scale=k**-0.5, dtype=adapter_dtype),
        random(groups, n, rank, scale=rank**-0.5, dtype=adapter_dtype),
        torch.tensor(rows, device=DEVICE).cumsum(0).int(),
        None if bias is None else random(*(() if bias == "one" else (groups,)), n), random(m, n), p,
    )  # fmt: skip


def fused(q: Problem) -> list[Tensor]:
    """[y, dX, dA, dB]."""
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (q.x, q.lora_A, q.lora_B))
    options = dict(scaling=SCALING, dropout_p=q.p, training=q.p > 0, seed=SEED)
    y = lk.grouped_lora_linear(x, q.weight, lora_A, lora_B, q.offsets, q.bias, **options)
    return [y.detach(), *torch.autograd.grad(y, [x, lora_A, lora_B], q.grad_y, materialize_grads=True)]


def by_torch(q: Problem) -> list[Tensor]:
    """The same by the unfused code that defines the op, in the problem's dtypes."""
    seed = torch.tensor([SEED], device=DEVICE) if q.p > 0 else None
    factors = q.weight, q.lora_A, q.lora_B, q.offsets
    y, s = SPEC.reference(q.x, *factors, q.bias, seed, SCALING, q.p)
    return [y, *BACKWARD.reference(q.grad_y, q.x, s, *factors, seed, SCALING, q.p, True, True, True)]


def check(q: Problem, backend: str) -> list[Tensor]:
    """By ``backend`` alone, as close to float64 as the yardstick asks."""
    unfused, exact = by_torch(q), by_torch(q.double())
    gpu.poison(unfused)
    lk.reset_stats()
    ours = gpu.unless_triton_is_old(lambda: fused(q))
    served = lk.stats()["served"]
    assert served == {("grouped_lora_linear", backend): 1, ("grouped_lora_linear_backward", backend): 1}, served
    for name, value, bound, true in zip(RESULTS, ours, unfused, exact):
        assert value.dtype == bound.dtype
        assert_as_accurate(value.to(q.x.dtype), bound, true, name)
    return ours


ROWS = {
    "ragged": ((5, 0, 700, 1, 64), 9),
    "equal": ((256,) * 8, 0),
    "one of everything": ((0, 1500, 0), 0),
    "single rows": ((1,) * 40, 3),
    "many groups": ((3, 0, 0, 9) * 64, 0),
}
AXES = {
    "rows": tuple(ROWS),
    "sizes": ((1024, 520), (136, 2048)),
    "rank": (4, 16, 64, 200),
    "dtypes": ((BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)),
    "p": (0.0, 0.3),
    "shared": (False, True),
    "in_columns": (False, True),
    "bias": (None, "one", "each"),
}


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_values_and_gradients(backend, case):
    rows, behind = ROWS[case["rows"]]
    options = {name: case[name] for name in ("p", "shared", "in_columns", "bias")}
    check(problem(rows, *case["sizes"], case["rank"], case["dtypes"], behind=behind, **options), backend)


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_bits_twice(backend, shared):
    q = problem((900, 0, 300, 77), 1024, 520, 16, p=0.3, shared=shared)
    for a, b in zip(fused(q), fused(q)):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@gpu.only
@pytest.mark.parametrize("shared", [False, True])
def test_a_graph_follows_the_offsets(backend, shared):
    """Sizes of groups are never asked for on the host: a graph that was captured with some serves others."""
    q = problem((300, 200, 12), 1024, 520, 16, shared=shared)
    seed = torch.tensor([SEED], device=DEVICE)
    args = q.x, q.weight, q.lora_A, q.lora_B, q.offsets, None, seed, SCALING, 0.3

    def run():
        y, s = torch.ops.lora_kernels.grouped_lora_linear(*args)
        rest = q.weight, q.lora_A, q.lora_B, q.offsets, seed, SCALING, 0.3, True, True, True
        return y, *torch.ops.lora_kernels.grouped_lora_linear_backward(q.grad_y, q.x, s, *rest)

    gpu.unless_triton_is_old(run)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for ends in ((300, 500, 512), (0, 17, 400), (512, 512, 512)):
        q.offsets.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        for a, b in zip(captured, run()):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
