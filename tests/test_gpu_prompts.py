"""prompt_embedding and prefix_kv on a GPU, by the CUDA and by the Triton kernels: equal to their definitions."""

from __future__ import annotations

import gpu
import naive_prefix
import naive_prompt
import pytest
import torch
from covering import case_id, covering_pairs
from gpu import BF16, DEVICE, FP16, FP32

import lora_kernels as lk

pytestmark = gpu.needed

AXES = {
    "source": [torch.int64, torch.int32, "embeds"],
    "dtype": [FP32, BF16, FP16],
    "mask": [None, torch.int64, torch.bool, FP32],
    "labels": [False, True],
    "tasks": [False, True],
    "ragged": [False, True],
    "side": ["right", "left"],
    "hidden": [11, 40, 1100],
}


def moved(problem):
    return type(problem)(*(None if t is None else t.to(DEVICE) for t in problem))


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a.cpu(), b)


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_prompt_embedding(backend, case):
    case = dict(case)
    side = case.pop("side")
    problem = naive_prompt.make(**case)
    expected = naive_prompt.forward(problem, side)
    grad = torch.randn_like(expected[0])
    exact = naive_prompt.backward(problem, side, grad)
    live, leaves = naive_prompt.trainable(moved(problem))
    gpu.poison([t.to(DEVICE) for t in expected if t is not None and t.is_floating_point()])
    ours = gpu.unless_triton_is_old(lambda: naive_prompt.call(live, side))
    gradients = torch.autograd.grad(ours.inputs_embeds, list(leaves.values()), grad.to(DEVICE))
    assert_equal(ours, expected)
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient.cpu(), exact[name]), name
    assert {served_by for _, served_by in lk.stats()["served"]} == {backend}


@gpu.only
def test_prompt_embedding_waits_for_nothing_and_is_captured(backend):
    problem = naive_prompt.make(dtype=BF16, mask=torch.int64, labels=True, ragged=True)
    on_gpu = moved(problem)
    expected = naive_prompt.forward(problem, "left")
    gpu.unless_triton_is_old(lambda: naive_prompt.call(on_gpu, "left"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = naive_prompt.call(on_gpu, "left")
    graph.replay()
    assert_equal(ours, expected)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("head_dim", [3, 64])
@pytest.mark.parametrize("dtypes", [(FP32, BF16), (FP16, FP16)], ids=str)
def test_prefix_kv(backend, dtypes, head_dim, copies):
    prefix = naive_prefix.make(dtypes[0], head_dim, layers=20)
    expected = naive_prefix.forward(prefix, 20, 2, 3, dtypes[1])
    grads = naive_prefix.grads_of(expected)
    leaf = prefix.to(DEVICE).requires_grad_()
    gpu.poison([t.to(DEVICE) for t in expected])
    pairs = gpu.unless_triton_is_old(lambda: lk.prefix_kv(leaf, 20, 2, batch_size=3, dtype=dtypes[1], copies=copies))
    ours = [t for pair in pairs for t in pair]
    (gradient,) = torch.autograd.grad(ours, leaf, [g.to(DEVICE) for g in naive_prefix.inside_longer(grads)])
    assert_equal(ours, expected)
    assert torch.equal(gradient.cpu(), naive_prefix.backward(grads, dtypes[0]))
    assert {served_by for _, served_by in lk.stats()["served"]} == {backend}
