"""The serving seam on a GPU, by the CUDA and by the Triton kernels: values against float64, and a captured step."""

from __future__ import annotations

import gpu
import pytest
import torch
from gpu import BF16, DEVICE
from numerics import assert_as_accurate

import lora_kernels as lk
from lora_kernels.integrations.serving import AdapterSlots, LoRAPool, ServingStep

pytestmark = gpu.needed

K, MOST = 1024, 24
WIDTHS = {"qkv": (512, 128, 128), "gate_up": (256, 256), "o": (520,)}
ADAPTERS = {"a": (16, 0.5), "b": (24, -2.0), "c": (3, 1.25)}
BATCHES = {
    "decode": (["a", None, "b", "c", "a"], None),
    "prefill": (["c", "a", None, "b", "a"], [70, 300, 21, 130, 1]),
}


def loaded():
    """The slots of three adapters, and each one's factors by pool."""
    slots = AdapterSlots(
        3, {name: LoRAPool(3, MOST, K, widths, dtype=BF16, device=DEVICE) for name, widths in WIDTHS.items()},
        device=DEVICE,
    )  # fmt: skip
    return slots, {name: load(slots, name, *how) for name, how in ADAPTERS.items()}


def load(slots, name, rank, scaling):
    def pair(n):
        return ((torch.randn(rank, K) / K**0.5).to(BF16), (torch.randn(n, rank) / rank**0.5).to(BF16))

    weights = {pool: [pair(n) for n in widths] for pool, widths in WIDTHS.items()}
    slots.load(name, weights, scaling=scaling)
    return weights


def by_torch(base, x, rows, pool, adapters, dtype):
    """Each adapter's rows by plain products."""
    y, x = base.to(dtype).clone(), x.to(dtype)
    for name, weights in adapters.items():
        mine, first = [m for m, who in enumerate(rows) if who == name], 0
        for n, (A, B) in zip(WIDTHS[pool], weights[pool]):
            s = x[mine] @ A.to(x.device, dtype).t()
            y[mine, first : first + n] += ADAPTERS[name][1] * (s @ B.to(x.device, dtype).t())
            first += n
    return y


def rows_of(names, lengths):
    return [who for who, n in zip(names, lengths or [1] * len(names)) for _ in range(n)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pool", WIDTHS)
def test_values(backend, pool, batch):
    slots, adapters = loaded()
    names, lengths = BATCHES[batch]
    rows = rows_of(names, lengths)
    step = ServingStep(600, slots)
    step.fill(names, lengths)
    x, base = (torch.randn(len(rows), size, device=DEVICE).to(BF16) for size in (K, sum(WIDTHS[pool])))
    y = base.clone()
    gpu.unless_triton_is_old(lambda: slots.pools[pool].add_(y, x, step))
    served = lk.stats()["served"]
    slices = slots.pools[pool].slices
    assert served == {("multi_lora_shrink", backend): 1, ("multi_lora_expand_", backend): slices}
    plain, exact = (by_torch(base, x, rows, pool, adapters, dtype) for dtype in (BF16, torch.float64))
    assert_as_accurate(y, plain, exact)
    none = [m for m, who in enumerate(rows) if who is None]
    assert torch.equal(y[none], base[none])


@gpu.only
@pytest.mark.parametrize("rows", [16, 512])
def test_a_captured_step_serves_the_next_ones(backend, rows):
    """Adapters that were loaded since, fewer rows, other ids, ranks and factors: the graph knows of nothing."""
    slots, _ = loaded()
    step = ServingStep(rows, slots)
    step.fill(["a"] * rows)
    inputs = {pool: torch.zeros(rows, K, device=DEVICE, dtype=BF16) for pool in WIDTHS}
    outputs = {pool: torch.zeros(rows, sum(widths), device=DEVICE, dtype=BF16) for pool, widths in WIDTHS.items()}

    def run():
        for pool, y in outputs.items():
            slots.pools[pool].add_(y, inputs[pool], step)

    gpu.unless_triton_is_old(run)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    slots.evict("b")
    load(slots, "d", 9, 3.0)
    for names in (["d", None, "c"], ["c", "a", "d"], [None] * 3):
        step.fill(names, [rows // 2, 3, rows // 4])
        bases = {pool: torch.randn_like(y) for pool, y in outputs.items()}
        for pool, x in inputs.items():
            x.normal_()
            outputs[pool].copy_(bases[pool])
        graph.replay()
        for pool, y in outputs.items():
            again = slots.pools[pool].add_(bases[pool].clone(), inputs[pool], step)
            assert torch.equal(y.view(torch.int16), again.view(torch.int16))
