"""lora_pack on a GPU, by the CUDA and by the Triton kernels: values and gradients against float64, bits, graphs."""

from __future__ import annotations

import gpu
import packs
import pytest
import torch
from covering import case_id, covering_pairs
from gpu import BF16, DEVICE, FP16, FP32, SEED
from numerics import assert_as_accurate
from packs import FP64, Pack, apart, make_problem

import lora_kernels as lk

pytestmark = gpu.needed

AXES = {
    "pack": (
        Pack(700, 520, (1024, 264, 136), (16, 8, 24)), Pack(64, 1024, (136, 136), (64, 0)),
        Pack(9, 512, (512, 128, 128), (16, 16, 16)), Pack(1500, 136, (520,), (200,)),
    ),
    "dtypes": ((BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)),
    "p": (0.0, 0.3),
    "bias": (False, True),
}  # fmt: skip


def on_device(problem):
    return {k: [None if t is None else t.to(DEVICE) for t in v] if isinstance(v, list) else v.to(DEVICE)
            for k, v in problem.items()}  # fmt: skip


def fused(pack, p):
    def function(**tensors):
        rest = {"scalings": pack.scalings, "dropout_p": p, "training": True, "seed": SEED}
        return gpu.unless_triton_is_old(lambda: lk.lora_pack(**tensors, **rest))

    return function


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_values_and_gradients(backend, case):
    pack, dtypes, p = case["pack"], case["dtypes"], case["p"]
    problem = on_device(make_problem(pack, *dtypes, case["bias"]))

    def torch_code(**tensors):
        return apart(**tensors, scalings=pack.scalings, p=p, seed=SEED)

    exact = packs.run(problem, FP64, FP64, torch_code)
    unfused = packs.run(problem, dtypes[0], dtypes[0], torch_code)
    gpu.poison(list(unfused.values()))
    lk.reset_stats()
    found = packs.run(problem, *dtypes, fused(pack, p))
    served = lk.stats()["served"]
    assert served["lora_pack", backend] == served["lora_pack_backward", backend] == 1
    for name, value in found.items():
        assert value.dtype == dtypes["A" in name or "B" in name]
        assert_as_accurate(value.to(dtypes[0]), unfused[name], exact[name], name)


def test_the_same_bits_twice(backend):
    pack = AXES["pack"][0]
    problem = on_device(make_problem(pack, BF16, BF16, True))
    first, again = (packs.run(problem, BF16, BF16, fused(pack, 0.3)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value.view(torch.int16), again[name].view(torch.int16)), name


@gpu.only
def test_a_graph_replays(backend):
    pack = AXES["pack"][0]
    t = packs.cast(on_device(make_problem(pack, BF16, BF16, False)), BF16, BF16)
    grads = t.pop("grad_ys")
    leaves = packs.leaves(t)

    def step():
        ys = fused(pack, 0.0)(**t)
        return *ys, *torch.autograd.grad(ys, leaves, grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            t["x"].copy_(torch.randn_like(t["x"]))
        graph.replay()
        for a, b in zip(captured, step()):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
