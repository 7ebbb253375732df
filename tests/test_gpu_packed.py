"""Packed weights on a GPU, by the CUDA and by the Triton kernels: decoded to the bit, and multiplied."""

from __future__ import annotations

import gpu
import pytest
import torch
from gpu import BF16, DEVICE, FP16, FP32
from numerics import assert_as_accurate
from packed import decoded, random_packed, random_scaled

import lora_kernels as lk
from lora_kernels.ops.lora_linear_packed import BACKWARD, SPEC
from lora_kernels.support import cuda as cuda_support
from lora_kernels.support import gpu_packed

pytestmark = gpu.needed


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [16, 64, 48, 4096])
@pytest.mark.parametrize("layout", ["codes4", "codes4_low"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_weights_are_decoded_to_the_bit(backend, dtype, layout, block, nested):
    packed = random_packed(37, 3 * block, block, nested, layout=layout).to(dtype=dtype)
    expected = decoded(packed)
    gpu.poison([expected.to(DEVICE)])
    weight = gpu.unless_triton_is_old(lambda: packed.to(DEVICE).dequantize())
    assert torch.equal(weight.cpu(), expected)
    assert lk.stats()["served"] == {("dequantize", backend): 1}


@pytest.mark.parametrize(("n", "k"), [(130, 1032), (37, 100)])
@pytest.mark.parametrize(("block", "rows"), [(None, "each"), (128, "squares"), (48, "all")])
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_weights_of_eight_bits_are_decoded_to_the_bit(backend, dtype, layout, block, rows, n, k):
    packed = random_scaled(n, k, layout, block, rows, special=True).to(dtype=dtype)
    expected = decoded(packed)
    gpu.poison([expected.to(DEVICE)])
    weight = gpu.unless_triton_is_old(lambda: packed.to(DEVICE).dequantize())
    assert torch.equal(weight.isnan().cpu(), expected.isnan())
    assert torch.equal(weight.cpu().nan_to_num(), expected.nan_to_num())
    assert lk.stats()["served"] == {("dequantize", backend): 1}


def assert_values_and_gradients(backend, packed, problem):
    """Of ``problem`` with this weight in place of its own, against the decoded one in float64."""
    q = problem._replace(weight=decoded(packed).to(DEVICE))
    unfused, exact = gpu.by_torch(q), gpu.by_torch(q.double())
    gpu.poison(unfused)
    lk.reset_stats()
    ours = gpu.unless_triton_is_old(lambda: gpu.fused(q._replace(weight=packed.to(DEVICE))))
    assert {served_by for _, served_by in lk.stats()["served"]} == {backend}
    for name, value, bound, true in zip(gpu.RESULTS, ours, unfused, exact):
        assert_as_accurate(value, bound, true, name)


@pytest.mark.parametrize("m", [8, 130])
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
def test_values_and_gradients_of_eight_bits(backend, layout, m):
    packed = random_scaled(257, 1152, layout, 128, "squares").to(dtype=BF16)
    assert_values_and_gradients(backend, packed, gpu.problem(m, 257, 1152, 16, BF16))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("m", [1, 8, 13, 16, 20, 64, 130])
@pytest.mark.parametrize(("n", "k", "rank"), [(1000, 4096, 16), (257, 1152, 40)])
def test_values_and_gradients(backend, m, n, k, rank, dtype):
    """Few rows are one launch of the CUDA backend, which computes s in its first blocks."""
    packed = random_packed(n, k, nested=True).to(dtype=dtype)
    assert_values_and_gradients(backend, packed, gpu.problem(m, n, k, rank, dtype))


@gpu.only
def test_few_rows_wait_for_nothing_and_are_captured(backend):
    """The counters of a launch are zeroed by a node of the graph: every replay gives the same bits."""
    packed = random_packed(4096, 4096, nested=True).to(DEVICE, BF16)
    q = gpu.problem(1, 4096, 4096, 16)._replace(weight=packed)
    expected = gpu.unless_triton_is_old(lambda: gpu.inferred(q))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu.inferred(q)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@gpu.only
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_many_rows_take_less_memory_than_the_weight(monkeypatch, p):
    """Slabs of 2048 rows or columns: half of the weight is never there, and nothing else is larger."""
    size, options = 4096, {"dropout_p": p, "training": True, "seed": 3}
    packed, q = random_packed(size, size, nested=True).to(DEVICE, BF16), gpu.problem(8192, size, size, 16, BF16)
    leaves = [t.detach().requires_grad_() for t in (q.x, q.lora_A, q.lora_B)]

    def run():
        """[y, dX, dA, dB], and the bytes that forward and backward have besides their results."""
        torch.cuda.reset_peak_memory_stats()
        y = lk.lora_linear(leaves[0], packed, *leaves[1:], q.bias, **options)
        forward = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(y, leaves, q.grad_y)
        backward = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        return [y.detach(), *grads], forward, backward

    with lk.use_backend("cuda"), cuda_support.use_schedule("cublas"):
        run()  # the vendor's workspace stays
        lk.reset_stats()
        results, *slabs = run()
        assert ("dequantize", "cuda") not in lk.stats()["served"]
        monkeypatch.setattr(gpu_packed, "is_slabs", lambda *_, **__: False)
        expected, *whole = run()
        assert lk.stats()["served"]["dequantize", "cuda"] == 2
    for with_slabs, without in zip(slabs, whole):
        assert without - with_slabs >= 0.9 * size * (size - 2048) * 2
    for value, other in zip(results, expected):
        torch.testing.assert_close(value, other, rtol=2e-2, atol=2e-2)


def test_the_registered_ops(backend):
    packed = random_packed(96, 192, nested=True).to(dtype=BF16)
    q = gpu.problem((2, 5), 96, 192, 8)
    weight = packed.to(DEVICE).args
    y, s = gpu.unless_triton_is_old(
        lambda: torch.ops.lora_kernels.lora_linear_packed(q.x, *weight, q.lora_A, q.lora_B, q.bias, None, 1.0, 0.0)
    )
    plain = SPEC.reference(q.x, *weight, q.lora_A, q.lora_B, q.bias, None, 1.0, 0.0)
    exact = SPEC.reference(q.x.double(), *weight, *(t.double() for t in (q.lora_A, q.lora_B, q.bias)), None, 1.0, 0.0)
    for ours, theirs, true in zip((y, s), plain, exact):
        assert_as_accurate(ours, theirs, true)
    given, factors = (q.grad_y, q.x, s, q.lora_A, q.lora_B), (None, 1.0, 0.0, True, True, True)

    def gradients(op, dtype=None):
        grad_y, x, s, A, B = given if dtype is None else (t.to(dtype) for t in given)
        return op(grad_y, x, s, *weight, A, B, *factors)

    ours = gradients(torch.ops.lora_kernels.lora_linear_packed_backward)
    plain, exact = gradients(BACKWARD.reference), gradients(BACKWARD.reference, torch.float64)
    for value, bound, true in zip(ours, plain, exact, strict=True):
        assert_as_accurate(value, bound, true)
