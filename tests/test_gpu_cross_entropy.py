"""linear_cross_entropy on a GPU, by the CUDA and by the Triton kernel: values, gradients, memory, graphs."""

from __future__ import annotations

import gpu
import pytest
import torch
from covering import case_id, covering_pairs
from gpu import BF16, DEVICE, FP16, FP32
from head_loss import assert_all_as_accurate, loss_and_gradients, make_problem

import lora_kernels as lk
from lora_kernels.ops import vocabulary_chunks

pytestmark = gpu.needed


def moved(problem):
    return {name: None if t is None else t.to(DEVICE) for name, t in problem.items()}


CASES = covering_pairs(
    dtypes=[(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)], columns=[61, 1000, 32001], rank=[0, 16],
    bias=[False, True], reduction=["mean", "none"], label_smoothing=[0.0, 0.1], softcap=[None, 3.0],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(backend, case, monkeypatch):
    monkeypatch.setattr(vocabulary_chunks, "GPU_AREA", 64 * case["columns"])
    how = {name: case[name] for name in ("reduction", "label_smoothing", "softcap")}
    problem = moved(make_problem((150,), case["columns"], 72, case["rank"], case["bias"]))
    grad = (torch.rand(150) if case["reduction"] == "none" else torch.tensor(0.7)).to(DEVICE)
    gpu.unless_triton_is_old(
        lambda: assert_all_as_accurate(lk.linear_cross_entropy, problem, *case["dtypes"], grad, scaling=0.5, **how)
    )
    assert {served_by for _, served_by in lk.stats()["served"]} == {backend}


def test_the_same_bits_on_every_run(backend):
    problem = moved(make_problem((300,), 5000, 64))
    first, *others = (loss_and_gradients(lk.linear_cross_entropy, problem, FP32) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@gpu.only
def test_a_label_that_is_no_class_makes_the_loss_nan(backend):
    problem = moved(make_problem(ignored=0.0))
    problem["labels"][3] = 61
    losses, grad_x, *_ = loss_and_gradients(lk.linear_cross_entropy, problem, BF16, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    assert grad_x.isnan().any(1).nonzero().flatten().tolist() == [3]


@gpu.only
def test_logits_never_exist_as_a_whole(backend):
    x = torch.randn(8192, 1024, dtype=BF16, device=DEVICE, requires_grad=True)
    weight = torch.randn(128256, 1024, dtype=BF16, device=DEVICE)
    labels = torch.randint(0, 128256, (8192,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lk.linear_cross_entropy(x, weight, labels).backward()
    # A chunk in fp32, and the gradient of x as it is formed, saved and multiplied.
    chunk, grad_x = 4 * vocabulary_chunks.GPU_AREA, x.nbytes
    assert torch.cuda.max_memory_allocated() - before <= chunk + 4 * grad_x + 2**25


@gpu.only
def test_it_waits_for_nothing_and_is_captured(backend):
    problem = moved(make_problem(dtype=BF16))
    expected = lk.linear_cross_entropy(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = lk.linear_cross_entropy(**problem)
    graph.replay()
    assert torch.equal(ours, expected)
