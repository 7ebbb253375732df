"""lora_mlp: values and gradients against float64, masks, what is kept for backward, compilers, refusals."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import philox
from lora_kernels.ops.gated_activation import ACTIVATIONS, BACKWARD_OUT
from lora_kernels.ops.lora_linear import dropped

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("y", "dx", "gate dA", "gate dB", "up dA", "up dB", "down dA", "down dB")
# leading sizes, in_features, intermediate, out_features, ranks
SHAPES = [((), 24, 40, 24, (4, 4, 4)), ((0,), 8, 9, 7, (1, 2, 3)), ((3,), 33, 47, 20, (5, 1, 8)),
          ((2, 41), 72, 130, 72, (16, 16, 16))]  # fmt: skip


def make(shape, dtype, adapter_dtype=None, bias=False, scalings=(1.5, 0.5, 2.0)):
    """x, gate, up, down and the gradient of y."""
    lead, k, inner, n, ranks = shape
    sizes = ((inner, k), (inner, k), (n, inner))
    layers = [
        lk.Projection(
            (torch.randn(rows, columns) / columns**0.5).to(dtype),
            (torch.randn(rank, columns) / columns**0.5).to(adapter_dtype or dtype),
            (torch.randn(rows, rank) / rank**0.5).to(adapter_dtype or dtype),
            torch.randn(rows).to(dtype) if bias else None,
            scaling,
        )
        for (rows, columns), rank, scaling in zip(sizes, ranks, scalings)
    ]
    return torch.randn(*lead, k).to(dtype), *layers, torch.randn(*lead, n).to(dtype)


def leaves_of(x: Tensor, *layers: lk.Projection) -> list[Tensor]:
    return [x, *(t for layer in layers for t in layer[1:3])]


def with_gradients(function, x, gate, up, down, grad_y):
    """The results by the names of ``NAMES``."""
    x = x.detach().requires_grad_()
    layers = [
        layer._replace(lora_A=layer.lora_A.detach().requires_grad_(), lora_B=layer.lora_B.detach().requires_grad_())
        for layer in (gate, up, down)
    ]
    y = function(x, *layers)
    y.backward(grad_y)
    return y.detach(), *(t.grad for t in leaves_of(x, *layers))


def unfused(activation, p=0.0, seed=0):
    """Plain torch, with the masks that lora_mlp draws."""
    masks = [None if p == 0.0 else torch.tensor([philox.member_seed(seed, i)]) for i in range(3)]

    def linear(x, layer, mask):
        weight, A, B, bias, scaling = layer
        branch = F.linear(F.linear(dropped(x, mask, p), A.to(x.dtype)), B.to(x.dtype))
        return F.linear(x, weight, bias) + scaling * branch

    def run(x, gate, up, down):
        h = ACTIVATIONS[activation](linear(x, gate, masks[0])) * linear(x, up, masks[1])
        return linear(h, down, masks[2])

    return run


def doubled(given):
    def cast(t):
        return t.double() if isinstance(t, Tensor) else t

    return tuple(lk.Projection(*map(cast, t)) if isinstance(t, tuple) else cast(t) for t in given)


def check(given, activation="silu", p=0.0, seed=0):
    def ours(x, gate, up, down):
        return lk.lora_mlp(x, gate, up, down, activation, dropout_p=p, training=True, seed=seed)

    plain = unfused(activation, p, seed)
    results = with_gradients(ours, *given), with_gradients(plain, *given), with_gradients(plain, *doubled(given))
    for name, mine, torchs, right in zip(NAMES, *results, strict=True):
        assert mine.dtype == torchs.dtype
        assert_as_accurate(mine, torchs, right, name)
    return results[0]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    check(make(shape, dtype))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(FP32, None), (BF16, FP32), (FP16, FP32)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_biases_dropout_and_wide_adapters(activation, dtypes, p):
    check(make(SHAPES[3], *dtypes, bias=True), activation, p, seed=-12345)


def test_each_layer_has_the_mask_of_its_member():
    """Bit for bit the masks of three lora_linears, by the rule of ``lora_pack``."""
    x, gate, up, down, _ = make(SHAPES[3], FP32)
    seed, p = 77, 0.5

    def layer(x, given, place):
        return lk.lora_linear(
            x, *given[:4], scaling=given.scaling, dropout_p=p, training=True, seed=philox.member_seed(seed, place)
        )

    expected = layer(F.silu(layer(x, gate, 0)) * layer(x, up, 1), down, 2)
    ours = lk.lora_mlp(x, gate, up, down, dropout_p=p, training=True, seed=seed)
    torch.testing.assert_close(ours, expected)
    for other in (seed + 1, 0):
        wrong = lk.lora_mlp(x, gate, up, down, dropout_p=p, training=True, seed=other)
        assert not torch.allclose(wrong, expected, rtol=1e-2)


def test_seeds_come_from_torchs_generator():
    x, gate, up, down, _ = make(SHAPES[3], FP32)

    def draw():
        torch.manual_seed(3)
        return lk.lora_mlp(x, gate, up, down, dropout_p=0.5, training=True)

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), lk.lora_mlp(x, gate, up, down, dropout_p=0.5, training=True))


@pytest.mark.parametrize("needed", range(7))
def test_one_gradient_alone(needed):
    x, *layers, grad_y = make(SHAPES[2], FP32)
    every = check((x, *layers, grad_y))[1:]
    leaf = leaves_of(x, *layers)[needed]
    leaf.requires_grad_()
    (alone,) = torch.autograd.grad(lk.lora_mlp(x, *layers), leaf, grad_y)
    torch.testing.assert_close(alone, every[needed])


def test_inference_has_the_same_bits():
    for shape in SHAPES:
        x, *layers, _ = make(shape, FP32)
        with_graph = lk.lora_mlp(x.requires_grad_(), *layers)
        with torch.no_grad():
            assert torch.equal(lk.lora_mlp(x, *layers), with_graph)


def saved_by(function):
    """Bytes of what autograd keeps, each storage once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return sum(kept.values()), y


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_kept(p):
    x, *layers, _ = make(SHAPES[3], FP32)
    factors = leaves_of(x, *layers)
    for t in factors:
        t.requires_grad_()
    rows, inner = 82, 130
    own = sum(t.nbytes for t in factors) + sum(layer.weight.nbytes for layer in layers)
    kept, _ = saved_by(lambda: lk.lora_mlp(x, *layers, dropout_p=p, training=True))
    assert kept <= own + 4 * rows * (2 * inner + 48) + 8
    layer_by_layer, _ = saved_by(lambda: unfused("silu", p)(x, *layers))
    assert kept < layer_by_layer


def test_backward_twice():
    """The memory of gate(x) and up(x) is reused only where nobody comes back for them."""
    x, *layers, grad_y = make(SHAPES[3], FP32)
    for t in leaves_of(x, *layers):
        t.requires_grad_()
    y = lk.lora_mlp(x, *layers)
    first = torch.autograd.grad(y, leaves_of(x, *layers), grad_y, retain_graph=True)
    second = torch.autograd.grad(y, leaves_of(x, *layers), grad_y)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves_of(x, *layers), grad_y)


def ops_of_backward(monkeypatch, y, x, **options):
    """Which ops compute a backward: objects, since one that writes elsewhere has the same name."""
    ran, run = [], lk.dispatch.run
    monkeypatch.setattr(lk.dispatch, "run", lambda spec, *args: ran.append(spec) or run(spec, *args))
    torch.autograd.grad(y.sum(), x, **options)
    monkeypatch.undo()
    return ran


def test_whose_memory_takes_the_gradients(monkeypatch):
    """Kills: gradients in new memory although the graph is freed, and in memory that hooks have kept."""
    x, *layers, _ = make(SHAPES[3], FP32)
    x.requires_grad_()
    y = lk.lora_mlp(x, *layers)
    assert BACKWARD_OUT not in ops_of_backward(monkeypatch, y, x, retain_graph=True)
    assert BACKWARD_OUT in ops_of_backward(monkeypatch, y, x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t, t.clone())) or t, lambda t: t):
        y = lk.lora_mlp(x, *layers)
    assert BACKWARD_OUT not in ops_of_backward(monkeypatch, y, x)
    assert all(torch.equal(t, copy) for t, copy in kept)


def test_saved_tensors_that_come_back_with_other_strides():
    x, *layers, grad_y = make(SHAPES[3], FP32)
    expected = with_gradients(lk.lora_mlp, x, *layers, grad_y)

    def moved(t):
        return t.movedim(-1, 0).contiguous().movedim(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(moved, lambda t: t):
        ours = with_gradients(lk.lora_mlp, x, *layers, grad_y)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b)


def test_not_differentiable_twice():
    x, *layers, _ = make(SHAPES[2], FP32)
    y = lk.lora_mlp(x.requires_grad_(), *layers)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    given = make(SHAPES[3], FP32)

    def ours(x, *layers):
        return lk.lora_mlp(x, *layers, dropout_p=0.2, training=True)

    torch.manual_seed(5)
    plain = with_gradients(ours, *given)
    torch.manual_seed(5)
    again = with_gradients(lambda *args: checkpoint(ours, *args, use_reentrant=reentrant), *given)
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b)


def test_opcheck():
    x, *layers, _ = make(SHAPES[2], FP32, bias=True)
    factors = [t for layer in layers for t in (layer.weight, layer.lora_A.requires_grad_(), layer.lora_B)]
    biases = [layer.bias for layer in layers]
    for p, seed in ((0.0, None), (0.3, torch.tensor([3]))):
        args = x.requires_grad_(), *factors, *biases, seed, 1.5, 0.5, 2.0, p, "silu"
        torch.library.opcheck(torch.ops.lora_kernels.lora_mlp.default, args)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_compiled(p):
    given = make(SHAPES[3], FP32)

    def ours(x, *layers):
        return lk.lora_mlp(x, *layers, dropout_p=p, training=True, seed=9)

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, *given), with_gradients(ours, *given)):
        torch.testing.assert_close(a, b)


def test_autocast():
    x, *layers, grad_y = make(SHAPES[3], FP32)

    def ours(x, *layers):
        with torch.autocast("cpu", torch.bfloat16):
            return lk.lora_mlp(x, *layers)

    low = x.to(BF16), *(layer._replace(weight=layer.weight.to(BF16)) for layer in layers), grad_y.to(BF16)
    for a, b in zip(with_gradients(ours, x, *layers, grad_y.to(BF16)), with_gradients(lk.lora_mlp, *low)):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "lora_mlp: activation must be one of"),
        ({"x": torch.ones(3, 9)}, ValueError, "lora_mlp: gate: x must be"),
        ({"up": (torch.ones(8, 5), torch.ones(2, 5), torch.ones(8, 2))}, ValueError, "up must have 6 out_features"),
        ({"down": (torch.ones(4, 7), torch.ones(2, 7), torch.ones(4, 2))}, ValueError, "lora_mlp: down: x must be"),
        ({"down": (torch.ones(4, 6), torch.ones(2, 5), torch.ones(4, 2))}, ValueError, "down: lora_A must be"),
        ({"gate": (torch.ones(6, 5, requires_grad=True), torch.ones(2, 5), torch.ones(6, 2))}, ValueError,
         "gate: weight must be frozen"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be a number"),
        ({"gate": (torch.ones(6, 5), torch.ones(2, 5), torch.ones(6, 2), None, "1")}, TypeError, "scaling must be"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, error, message):
    layer = torch.ones(6, 5), torch.ones(2, 5), torch.ones(6, 2)
    down = torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 2)
    arguments = {"x": torch.ones(3, 5), "gate": layer, "up": layer, "down": down} | changes
    with pytest.raises(error, match=message):
        lk.lora_mlp(**arguments)


def test_why():
    x, *layers, _ = make(SHAPES[2], FP32)
    assert lk.why("lora_mlp", x, *layers)[:2] == ("cpu", "composed")
