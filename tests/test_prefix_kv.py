"""prefix_kv: values, gradients and the op against a naive definition, on the CPU kernels and the reference."""

import itertools

import naive_prefix
import pytest
import torch
from naive_prefix import BATCH, BF16, FP16, FP32, FP64, HEADS, LAYERS, TOKENS, grads_of, inside_longer, make
from poisoned import memory_of_nan  # noqa: F401

import lora_kernels as lk
from lora_kernels.ops.prefix_kv import BACKWARD, SPEC

OP = torch.ops.lora_kernels.prefix_kv.default
BACKENDS = ("cpu", "reference")


def flat(pairs):
    return [tensor for pair in pairs for tensor in pair]


def assert_equal(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [*itertools.product((FP32, BF16, FP16), repeat=2), (FP64, FP64), (FP64, FP32), (FP32, FP64)]
)
def test_values_and_gradients(dtype, out_dtype, copies, backend):
    prefix = make(dtype).requires_grad_()
    expected = naive_prefix.forward(prefix.detach(), LAYERS, HEADS, BATCH, out_dtype)
    grads = grads_of(expected)
    with lk.use_backend(backend):
        ours = flat(lk.prefix_kv(prefix, LAYERS, HEADS, batch_size=BATCH, dtype=out_dtype, copies=copies))
        assert_equal(ours, expected)
        assert ours[0].stride(0) == (ours[0][0].numel() if copies else 0)
        (gradient,) = torch.autograd.grad(ours, prefix, inside_longer(grads))
    exact = naive_prefix.backward(grads, dtype)
    if backend == "cpu":
        assert torch.equal(gradient, exact)
    else:  # torch adds in another order
        ulps = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, exact, rtol=ulps, atol=ulps)
    served = {("prefix_kv", backend): 1, ("prefix_kv_backward", backend): 1}
    assert lk.stats() == {"served": served, "fallback": {}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copies", [False, True])
def test_gradcheck(backend, copies):
    prefix = make(FP64, head_dim=2, layers=2, tokens=2).requires_grad_()
    with lk.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda p: flat(lk.prefix_kv(p, 2, HEADS, batch_size=2, copies=copies)), (prefix,)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_nobody_attends_to_have_no_gradient(backend):
    prefix = make().requires_grad_()
    with lk.use_backend(backend):
        pairs = lk.prefix_kv(prefix, LAYERS, HEADS, batch_size=BATCH)
        grad = torch.randn_like(pairs[1][0])
        (gradient,) = torch.autograd.grad(pairs[1][0], prefix, grad)
    used = [torch.zeros_like(grad) for _ in range(2 * LAYERS)]
    used[2] = grad
    torch.testing.assert_close(gradient, naive_prefix.backward(used, FP32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens", "head_dim"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("copies", [False, True])
def test_empty(backend, batch, tokens, head_dim, copies):
    prefix = make(tokens=tokens, head_dim=head_dim).requires_grad_()
    with lk.use_backend(backend):
        ours = flat(lk.prefix_kv(prefix, LAYERS, HEADS, batch_size=batch, copies=copies))
        assert [t.shape for t in ours] == [(batch, HEADS, tokens, head_dim)] * (2 * LAYERS)
        (gradient,) = torch.autograd.grad(ours, prefix, [torch.ones_like(t) for t in ours])
    assert torch.equal(gradient, torch.full_like(prefix, float(batch)))


def test_strided_prefix_and_gradients():
    whole = torch.randn(2 * TOKENS, 2 * LAYERS * HEADS * 3 + 4)
    expanded = torch.randn(3).expand(BATCH, HEADS, TOKENS, 3)
    for prefix in (whole[::2, 2:-2], whole[:TOKENS, 4:].t().contiguous().t()):
        leaf = prefix.detach().requires_grad_()
        ours = flat(lk.prefix_kv(leaf, LAYERS, HEADS, batch_size=BATCH))
        assert_equal(ours, naive_prefix.forward(prefix, LAYERS, HEADS, BATCH, FP32))
        grads = [
            *grads_of(ours[:2]),
            expanded,
            *(g.transpose(0, 3).contiguous().transpose(0, 3) for g in grads_of(ours[3:])),
        ]
        (gradient,) = torch.autograd.grad(ours, leaf, grads)
        assert torch.equal(gradient, naive_prefix.backward(grads, FP32))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients_do_not_depend_on_threads(dtype):
    # Large enough that the loops are split; more layers than one launch takes.
    prefix = make(FP32, head_dim=64, layers=20, heads=3, tokens=70).requires_grad_()
    grads = grads_of(naive_prefix.forward(prefix.detach(), 20, 3, 4, dtype))

    def run(threads):
        torch.set_num_threads(threads)
        ours = flat(lk.prefix_kv(prefix, 20, 3, batch_size=4, dtype=dtype, copies=True))
        return [*ours, *torch.autograd.grad(ours, prefix, grads)]

    before = torch.get_num_threads()
    try:
        first = run(1)
        assert torch.equal(first[-1], naive_prefix.backward(grads, FP32))
        for threads in (1, 2, 3):
            assert_equal(run(threads), first)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pairs = lk.prefix_kv(make().requires_grad_(), LAYERS, HEADS, batch_size=BATCH)
    assert pairs[0][0].requires_grad
    assert not saved


# ------------------------------------------------------------------------------------------------ as a torch op


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    with lk.use_backend(backend):
        for dtype, copies in ((FP32, False), (BF16, True)):
            torch.library.opcheck(OP, (make().requires_grad_(), LAYERS, HEADS, BATCH, copies, dtype))
        grads = grads_of(naive_prefix.forward(make(), LAYERS, HEADS, BATCH, BF16))
        torch.library.opcheck(torch.ops.lora_kernels.prefix_kv_backward.default, (grads, FP32))


@pytest.mark.parametrize("copies", [False, True])
def test_compiled_and_registered_equal_eager(copies):
    torch.compiler.reset()

    def step(prefix):
        pairs = lk.prefix_kv(prefix, LAYERS, HEADS, batch_size=BATCH, dtype=BF16, copies=copies)
        return [torch.cat([kv, kv * 2], dim=2).float() for kv in flat(pairs)]

    def run(function):
        prefix = torch.linspace(-1, 1, TOKENS * LAYERS * 2 * HEADS * 4).view(TOKENS, -1).requires_grad_()
        outputs = function(prefix)
        return [*outputs, *torch.autograd.grad([t.square().sum() for t in outputs], prefix)]

    expected = run(step)
    assert_equal(run(torch.compile(step, fullgraph=True, backend="aot_eager")), expected)
    registered = run(
        lambda p: [torch.cat([kv, kv * 2], 2).float() for kv in OP(p, LAYERS, HEADS, BATCH, copies, BF16).flatten(0, 1)]
    )
    assert_equal(registered, expected)


def test_transforms_and_double_backward_are_refused():
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(lambda p: lk.prefix_kv(p, LAYERS, HEADS)[0][0])(torch.stack([make(), make()]))
    prefix = make().requires_grad_()
    key = lk.prefix_kv(prefix, LAYERS, HEADS)[0][0]
    (gradient,) = torch.autograd.grad(key.square().sum(), prefix, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_backward_stays_on_the_backend_of_the_forward():
    prefix = make().requires_grad_()
    with lk.use_backend("reference"):
        pairs = lk.prefix_kv(prefix, LAYERS, HEADS)
    pairs[0][0].sum().backward()
    assert set(lk.stats()["served"]) == {("prefix_kv", "reference"), ("prefix_kv_backward", "reference")}


def test_why_and_costs():
    choice = lk.why("prefix_kv", make(), LAYERS, HEADS, batch_size=2)
    assert choice == ("cpu", "transpose", "heads written in one pass")
    numbers = make().numel()
    assert SPEC.bytes(make(), LAYERS, HEADS, 4, False, BF16) == numbers * (4 + 2)
    assert SPEC.bytes(make(), LAYERS, HEADS, 4, True, BF16) == numbers * (4 + 8)
    grads = grads_of(naive_prefix.forward(make(), LAYERS, HEADS, 4, BF16))
    assert BACKWARD.bytes(grads, FP32) == numbers * (8 + 4)
    assert BACKWARD.flops(grads, FP32) == 4 * numbers


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lk.prefix_kv([1.0], 1, 1), TypeError, "prefix must be a tensor, got list"),
        (lambda: lk.prefix_kv(make().long(), LAYERS, HEADS), TypeError, "prefix must be float32, .*, got torch.int64"),
        (lambda: lk.prefix_kv(make(), LAYERS, HEADS, dtype=torch.int8), TypeError, "dtype must be float32"),
        (lambda: lk.prefix_kv(make(), 2.0, HEADS), TypeError, r"layers must be an integer, got 2\.0"),
        (lambda: lk.prefix_kv(make(), LAYERS, 0), ValueError, "heads must be at least 1, got 0"),
        (lambda: lk.prefix_kv(make(), LAYERS, HEADS, batch_size=-1), ValueError, "batch_size must be at least 0"),
        (lambda: lk.prefix_kv(make(), 5, HEADS), ValueError, r"prefix must be \[tokens, 20 \* head_dim\] for 5 layers"),
        (lambda: lk.prefix_kv(make()[0], LAYERS, HEADS), ValueError, r"got shape \(36,\)"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
