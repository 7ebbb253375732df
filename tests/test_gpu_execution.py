"""lora_linear on a GPU: the same bits at every run, in graphs, under the compiler, in other pools, on many streams."""

from __future__ import annotations

import contextlib
import ctypes

import gpu
import pytest
import torch
from gpu import BF16, DEVICE, FP16, FP32, SCALING, SEED, problem
from numerics import assert_as_accurate

import lora_kernels as lk

pytestmark = gpu.only

PROBLEMS = {
    "decode": dict(m=1, n=1024, k=2048, rank=16),
    "few rows": dict(m=48, n=1024, k=4096, rank=64),
    "one launch": dict(m=1000, n=1032, k=520, rank=16),
    "ragged": dict(m=77, n=75, k=263, rank=4),
    "wide rank": dict(m=700, n=2048, k=1024, rank=64),
    "large": dict(m=4096, n=4096, k=4096, rank=16),
}


def of(name, **options):
    return problem(**PROBLEMS[name], **options)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_bits_at_every_run(backend, name, p):
    q = of(name, p=p)
    first = gpu.unless_triton_is_old(lambda: gpu.fused(q))
    gpu.note_schedules(q)
    for _ in range(20):
        gpu.poison(first)
        assert gpu.same(gpu.fused(q), first)


# ------------------------------------------------------------------------------------------------------- graphs


def step_into(q, seed):
    """Forward and backward over the operands' own memory, the seed's too: what a graph replays with other values."""
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (q.x, q.lora_A, q.lora_B))
    y = lk.lora_linear(x, q.weight, lora_A, lora_B, q.bias, scaling=SCALING, dropout_p=q.p, training=q.p > 0, seed=seed)
    return [y.detach(), *torch.autograd.grad(y, [x, lora_A, lora_B], q.grad_y)]


def warmed_up(step):
    """Kernels compiled, handles made, as a capture wants it: on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gpu.unless_triton_is_old(step)
    torch.cuda.current_stream().wait_stream(stream)


def captured(step):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_captured_step_is_replayed_with_other_values(backend, name, p):
    q, seed = of(name, p=p), torch.tensor([SEED], device=DEVICE)
    warmed_up(lambda: step_into(q, seed))
    graph, results = captured(lambda: step_into(q, seed) + step_into(q, seed))
    for other in range(3):
        q.x.normal_()
        q.grad_y.normal_()
        seed.fill_(other)
        expected = step_into(q, seed)  # an eager step between replays
        for t in results:
            t.fill_(float("nan"))
        graph.replay()
        assert gpu.same(results, expected + expected)


@pytest.mark.parametrize("rank", [24, 40])
def test_what_dispatch_chooses_in_a_capture_can_begin_there(rank):
    """It may choose otherwise than in the eager warm-up, and launch a kernel for the first time in its process."""
    q = problem(8208, 4112, 4112, rank)
    warmed_up(lambda: step_into(q, None))
    graph, results = captured(lambda: step_into(q, None))
    unfused, exact = gpu.by_torch(q), gpu.by_torch(q.double())
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    for name, value, bound, true in zip(gpu.RESULTS, results, unfused, exact):
        assert_as_accurate(value, bound, true, name)


def test_graphs_are_replayed_on_two_streams_beside_eager_calls(backend):
    problems = [of("one launch"), of("wide rank"), of("few rows")]
    expected = [gpu.fused(q) for q in problems]
    graphs = [captured(lambda q=q: step_into(q, None)) for q in problems[:2]]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for stream, (graph, _) in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = gpu.fused(problems[2])
        torch.cuda.synchronize()
        assert gpu.same(eager, expected[2])
        for (_, results), y in zip(graphs, expected):
            assert gpu.same(results, y)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_reduce_overhead_over_generations(backend, p):
    """Inductor's graph trees run a step eagerly in their own pool, record it, replay it; nothing may live on in there.

    Two compiled functions take turns on the device, as two layers' graphs do.
    """
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    first, second = of("one launch", p=p), of("few rows", dtype=FP16, p=p)
    gpu.unless_triton_is_old(lambda: gpu.fused(first))

    def layer(x, weight, lora_A, lora_B, bias, seed):
        y = lk.lora_linear(x, weight, lora_A, lora_B, bias, scaling=SCALING, dropout_p=p, training=p > 0, seed=seed)
        return y * 2

    def again(x, weight, lora_A, lora_B, bias, seed):
        return layer(x, weight, lora_A, lora_B, bias, seed) + 1

    def step(function, q, seed):
        x, lora_A, lora_B = (t.detach().clone().requires_grad_() for t in (q.x, q.lora_A, q.lora_B))
        y = function(x, q.weight, lora_A, lora_B, q.bias, seed)
        y.backward(q.grad_y)
        return [t.clone() for t in (y.detach(), x.grad, lora_A.grad, lora_B.grad)]

    compiled = [
        (torch.compile(f, mode="reduce-overhead", dynamic=False, fullgraph=True), f, q)
        for f, q in ((layer, first), (again, second))
    ]
    for generation in range(6):
        for function, eager, q in compiled:
            q.x.normal_()
            seed = torch.tensor([generation], device=DEVICE)
            expected = step(eager, q, seed)
            torch.compiler.cudagraph_mark_step_begin()
            found = step(function, q, seed)
            for name, a, b in zip(gpu.RESULTS, found, expected):
                # The compiler may round `* 2 + 1` once; what the kernels give is the same.
                assert (a - b).abs().max() <= 2 * torch.finfo(a.dtype).eps * b.abs().max(), (generation, name)
    assert counters["inductor"]["cudagraph_skips"] == 0, "no graph was taken, so nothing was tested"


# -------------------------------------------------------------------------------------------------------- pools


@contextlib.contextmanager
def new_stream():
    """A stream that CUDA makes and destroys; torch's own come from a small pool, and live for ever."""
    cudart, handle = torch.cuda.cudart(), ctypes.c_void_p(0)
    torch.cuda.check_error(cudart.cudaStreamCreate(ctypes.addressof(handle)))
    stream = torch.cuda.ExternalStream(handle.value)
    try:
        yield stream
    finally:
        stream.synchronize()
        torch.cuda.check_error(cudart.cudaStreamDestroy(handle.value))


@pytest.mark.parametrize("name", ["one launch", "few rows", "decode"])
def test_nothing_lives_on_in_a_pool_that_a_call_was_made_in(backend, name):
    """Pools are emptied, unmapped or given back behind the package: nothing that it keeps may lie in one."""
    q = of(name)
    expected = gpu.fused(q)
    with new_stream() as stream, torch.cuda.stream(stream):
        gpu.by_torch(q)  # cuBLAS keeps a workspace per stream and thread, which is torch's business
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            ours = gpu.fused(q)
        assert gpu.same(ours, expected)
        del ours
        torch.cuda.synchronize()
        blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
        assert blocks, "the call allocated nothing in the pool, so nothing was tested"
        assert [block for block in blocks if block["state"] == "active_allocated"] == []
        del pool
        gpu.poison(expected)
        assert gpu.same(gpu.fused(q), expected)


# ------------------------------------------------------------------------------------------------------ streams


def test_many_streams_at_once(backend):
    problems = [
        of("one launch"), of("wide rank"), of("few rows"), of("decode"), of("ragged"), of("one launch", dtype=FP16),
        of("wide rank", adapter_dtype=FP32), of("few rows", dtype=BF16, adapter_dtype=FP32),
    ]  # fmt: skip
    expected = [gpu.fused(q) for q in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2 * len(problems))]
    for _ in range(15):
        found = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(gpu.fused(problems[i % len(problems)]))
        torch.cuda.synchronize()
        for i, results in enumerate(found):
            assert gpu.same(results, expected[i % len(problems)])


def test_streams_that_come_and_go(backend):
    """CUDA gives a destroyed stream's handle to a new one: what is kept by handle must fit that one, too."""
    problems = [of("one launch"), of("wide rank"), of("few rows")]
    expected = [gpu.fused(q) for q in problems]
    torch.cuda.synchronize()
    for i in range(60):
        with new_stream() as stream:
            with torch.cuda.stream(stream):
                results = gpu.fused(problems[i % 3])
            stream.synchronize()
            assert gpu.same(results, expected[i % 3])
            del results
