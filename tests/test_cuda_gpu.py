"""The CUDA ops on a GPU: what the emulator of the same kernels and of the same binding cannot show."""

from __future__ import annotations

import naive_prefix
import naive_prompt
import pytest
import torch
from covering import case_id, covering_pairs
from numerics import assert_as_accurate

import lora_kernels as lk
from lora_kernels import philox
from lora_kernels.ops.lora_linear import SPEC

pytestmark = pytest.mark.skipif(
    not lk.backends()["cuda"].available,
    reason=f"{lk.backends()['cuda'].detail}; the emulator runs the same kernels",
)

DTYPES = (torch.bfloat16, torch.float16)


def operands(m, n, k, rank, dtype=torch.bfloat16, *, bias=True):
    x = torch.randn(m, k)
    weight, lora_A, lora_B = torch.randn(n, k) / k**0.5, torch.randn(rank, k) / k**0.5, torch.randn(n, rank) / rank**0.5
    tensors = (x, weight, lora_A, lora_B, torch.randn(n) if bias else None)
    return [None if t is None else t.to("cuda", dtype) for t in tensors]


def run(args, *, p=0.0, seed=None):
    """y of the CUDA kernel; raises where another backend would serve."""
    with lk.use_backend("cuda"), torch.no_grad():
        return lk.lora_linear(*args, scaling=1.7, dropout_p=p, training=p > 0, seed=seed)


def check(args, *, p=0.0):
    """Compare with float64 and with plain torch code."""
    seed = torch.tensor([77], device="cuda") if p > 0 else None
    unfused, _ = SPEC.reference(*args, seed, 1.7, p)
    exact, _ = SPEC.reference(*(None if t is None else t.double() for t in args), seed, 1.7, p)
    assert_as_accurate(run(args, p=p, seed=seed), unfused, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64, 256])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (16, 1024, 520), (77, 75, 263), (1000, 1032, 520), (4100, 4096, 1024)]
)
def test_forward_is_as_accurate_as_torch(m, n, k, rank, p, dtype):
    check(operands(m, n, k, rank, dtype), p=p)


def test_the_same_bits_at_every_run():
    args = operands(4096, 4096, 512, 64)
    first = run(args)
    assert all(torch.equal(run(args), first) for _ in range(20))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (3, 50), (2, 3, 11)], ids=str)
def test_leading_sizes(lead):
    _, *rest = operands(1, 72, 40, 8)
    check([torch.randn(*lead, 40, device="cuda").bfloat16(), *rest])


@pytest.mark.parametrize("layout", ["strided", "transposed", "off 16 bytes"])
def test_layouts(layout):
    def laid_out(t):
        if layout == "strided":
            return torch.nn.functional.pad(t, (8, 8), value=float("nan"))[:, 8:-8]
        if layout == "transposed":
            return t.t().contiguous().t()
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)

    *matrices, bias = operands(300, 264, 136, 24)
    check([*map(laid_out, matrices), bias])


def test_fp32_adapters():
    x, weight, lora_A, lora_B, bias = operands(300, 264, 136, 24)
    wide = lora_A.float() + 1e-4, lora_B.float() + 1e-4
    assert torch.equal(run((x, weight, *wide, bias)), run((x, weight, *(t.bfloat16() for t in wide), bias)))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("m", "rank"), [(3, 16), (300, 24)])
def test_tf32(m, rank, p, fp32_precision):
    fp32_precision("tf32")
    check(operands(m, 264, 136, rank, torch.float32), p=p)


def test_a_captured_launch_is_replayed():
    args = operands(2000, 1024, 512, 16)
    expected = run(args)
    x = torch.zeros_like(args[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = [run((x, *args[1:])) for _ in range(3)]
    x.copy_(args[0])
    for _ in range(5):
        for y in ys:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, expected) for y in ys)
        assert torch.equal(run(args), expected), "an eager launch between replays"


def test_two_streams_at_once():
    problems = [operands(3000, 1024, 512, 16), operands(1100, 2048, 256, 64)]
    expected = [run(args) for args in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found = [[], []]
    for _ in range(50):
        for stream, args, ys in zip(streams, problems, found):
            with torch.cuda.stream(stream):
                ys.append(run(args))
    torch.cuda.synchronize()
    for ys, y in zip(found, expected):
        assert all(torch.equal(other, y) for other in ys)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    args = operands(300, 264, 136, 24)
    assert torch.equal(run([t.to("cuda:1") for t in args]).cpu(), run(args).cpu())


@pytest.mark.parametrize("columns", [1, 40, 263])
def test_dropout_mask_equals_the_cpus(columns):
    seed = torch.tensor([-987654321012345])
    on_gpu = lk.dropout_mask(1000, columns, 0.3, seed.cuda())
    assert torch.equal(on_gpu.cpu(), philox.keep_mask(seed, 1000, columns, 0.3))


def test_training_step_takes_the_kernel_forward():
    x, weight, lora_A, lora_B, bias = operands(300, 264, 136, 24)
    lora_A.requires_grad_()
    lk.lora_linear(x, weight, lora_A, lora_B, bias, dropout_p=0.1, training=True).sum().backward()
    assert lora_A.grad is not None
    assert lk.stats()["served"][("lora_linear", "cuda")] == 1


# --------------------------------------------------------------------------------------------- prompt embedding

PROMPT_AXES = {
    "source": [torch.int64, torch.int32, "embeds"],
    "dtype": [torch.float32, *DTYPES],
    "mask": [None, torch.int64, torch.bool, torch.float32],
    "labels": [False, True],
    "tasks": [False, True],
    "ragged": [False, True],
    "side": ["right", "left"],
    "hidden": [11, 40, 1100],
}


@pytest.mark.parametrize("case", covering_pairs(**PROMPT_AXES), ids=case_id)
def test_prompt_embedding(case):
    case = dict(case)
    side = case.pop("side")
    problem = naive_prompt.make(**case)
    expected = naive_prompt.forward(problem, side)
    grad = torch.randn_like(expected[0])
    exact = naive_prompt.backward(problem, side, grad)
    on_gpu = type(problem)(*(None if t is None else t.cuda() for t in problem))
    live, leaves = naive_prompt.trainable(on_gpu)
    with lk.use_backend("cuda"):
        ours = naive_prompt.call(live, side)
        gradients = torch.autograd.grad(ours.inputs_embeds, list(leaves.values()), grad.cuda())
    for a, b in zip(ours, expected):
        assert (a is None and b is None) or torch.equal(a.cpu(), b)
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient.cpu(), exact[name]), name


def test_prompt_embedding_waits_for_nothing_and_is_captured():
    problem = naive_prompt.make(dtype=torch.bfloat16, mask=torch.int64, labels=True, ragged=True)
    on_gpu = type(problem)(*(None if t is None else t.cuda() for t in problem))
    expected = naive_prompt.forward(problem, "left")
    naive_prompt.call(on_gpu, "left")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = naive_prompt.call(on_gpu, "left")
    graph.replay()
    for a, b in zip(ours, expected):
        assert torch.equal(a.cpu(), b)


# --------------------------------------------------------------------------------------------------------- prefix


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("head_dim", [3, 64])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)], ids=str)
def test_prefix_kv(dtypes, head_dim, copies):
    prefix = naive_prefix.make(dtypes[0], head_dim, layers=20)
    expected = naive_prefix.forward(prefix, 20, 2, 3, dtypes[1])
    grads = naive_prefix.grads_of(expected)
    leaf = prefix.cuda().requires_grad_()
    with lk.use_backend("cuda"):
        pairs = lk.prefix_kv(leaf, 20, 2, batch_size=3, dtype=dtypes[1], copies=copies)
        ours = [t for pair in pairs for t in pair]
        (gradient,) = torch.autograd.grad(ours, leaf, [g.cuda() for g in naive_prefix.inside_longer(grads)])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(gradient.cpu(), naive_prefix.backward(grads, dtypes[0]))
