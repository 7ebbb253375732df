"""Under dropout, fused: several adapters, each with a mask of its own, and DoRA, whose base sees the mask, too."""

import contextlib
import copy
import functools

import pytest
import torch
from numerics import ResultSizes, assert_as_accurate
from peft import LoraConfig, get_peft_model
from peft_layers import BF16, FP16, FP32, K, N, Net, lin, make, randomise, run
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels import philox

M = 60


class Masked(nn.Module):
    """Dropout with a given mask. No ``nn.Identity``: PEFT's DoRA asks whether there is dropout at all."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor.to(x.dtype)


def with_masks(model, factors):
    """A copy of the model whose adapters drop with these."""
    twin = copy.deepcopy(model)
    for name, factor in factors.items():
        lin(twin).lora_dropout[name] = Masked(factor)
    return twin


def assert_accurate(ours, bound, exact):
    assert ours.keys() == bound.keys() == exact.keys()
    for name, value in ours.items():
        assert_as_accurate(value.to(bound[name].dtype), bound[name], exact[name], name)


def bf16_autocast():
    return torch.autocast("cpu", BF16)


# --------------------------------------------------------------------------------------------- several adapters


def several(dtype=FP32, p=(0.25, 0.5), bias=True, **options):
    """One adapter per p, all active."""
    model = make(dtype, net=Net(bias=bias), lora_dropout=p[0], **options)
    for i, other in enumerate(p[1:]):
        config = LoraConfig(r=3 + i, lora_alpha=7, target_modules=["lin"], lora_dropout=other, **options)
        model.add_adapter(f"other{i}", config)
    randomise(model)
    model.base_model.set_adapter(["default", *(f"other{i}" for i in range(len(p) - 1))])
    return model


def drawn_masks(x, p):
    """What the layer draws now: a seed for the first adapter, torch's dropout for each of the others."""
    factors = {}
    for name, q in zip(["default", "other0", "other1"], p):
        if q == 0.0:
            factors[name] = torch.ones(x.shape)
        elif name == "default":
            seed = torch.randint(-(2**63), 2**63 - 1, (1,))
            factors[name] = lk.dropout_mask(*x.shape, q, seed) * philox.keep_scale(q)
        else:
            factors[name] = (F.dropout(torch.ones_like(x), q, True) != 0) / (1 - q)
    return factors


@pytest.mark.parametrize("needs_grad", [True, False], ids=["x trains", "first layer"])
@pytest.mark.parametrize(
    ("p", "options"),
    [
        ((0.25, 0.5), {}),
        ((0.25, 0.5), {"bias": False}),
        ((0.25, 0.5), {"lora_bias": True, "use_rslora": True}),
        ((0.25, 0.0), {}),
        ((0.0, 0.5), {}),
        ((0.1, 0.2, 0.3), {}),
        ((0.25, 0.5), {"dtype": BF16}),
        ((0.25, 0.5), {"dtype": FP16}),
    ],
    ids=str,
)
def test_each_adapter_has_a_mask_of_its_own(p, options, needs_grad):
    stock, dtype = several(p=p, **options), options.get("dtype", FP32)
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).fused == [("base_model.model.lin", "lora_linear")]
    x = torch.randn(M, K, dtype=dtype, requires_grad=needs_grad)
    torch.manual_seed(7)
    ours = run(lin(patched), x)
    torch.manual_seed(7)
    masked = with_masks(stock, drawn_masks(x.detach(), p))
    exact = run(lin(copy.deepcopy(masked).double()), x.detach().double().requires_grad_(needs_grad))
    assert_accurate(ours, run(lin(masked.to(dtype)), x), exact)
    served = {key: n for key, n in lk.stats()["served"].items() if key[0] == "lora_linear"}
    assert served == {("lora_linear", "cpu"): 1}, "the base product is computed once"
    assert lk.stats()["fallback"] == {}


def test_several_adapters_in_three_dimensions_under_autocast_and_with_tensor_scaling():
    stock = several()
    lin(stock).scaling["other0"] = torch.tensor(0.3)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(6, 10, K, requires_grad=True)
    with bf16_autocast():
        torch.manual_seed(7)
        ours = run(lin(patched), x)
        torch.manual_seed(7)
        factors = drawn_masks(x.detach().view(M, K), (0.25, 0.5))
        masked = with_masks(stock, {name: factor.view(x.shape) for name, factor in factors.items()})
        bound = run(lin(masked), x)
    assert_accurate(ours, bound, run(lin(masked.double()), x.detach().double().requires_grad_()))
    assert ours["y"].dtype == BF16
    assert lk.stats()["fallback"] == {}


def test_a_frozen_first_adapter():
    """Then lora_linear's result, into which the second is accumulated, has no gradient yet."""
    stock = several()
    for part in (lin(stock).lora_A, lin(stock).lora_B):
        part["default"].requires_grad_(False)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(M, K)
    torch.manual_seed(7)
    ours = run(lin(patched), x)
    torch.manual_seed(7)
    masked = with_masks(stock, drawn_masks(x, (0.25, 0.5)))
    assert_accurate(ours, run(lin(masked), x), run(lin(copy.deepcopy(masked).double()), x.double()))
    assert {name for name in ours if "lora" in name} == {"lora_A.other0.weight", "lora_B.other0.weight"}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_masks_are_independent_and_as_dense_as_asked(compiled):
    """Base zero, lora_A and lora_B parts of identities: the output shows both masks of the first columns."""
    model, p = several(p=(0.25, 0.5), bias=False), {"default": 0.25, "other0": 0.5}
    lk.patch(model)
    layer, rank, rows = lin(model), {"default": 5, "other0": 3}, 20_000
    nn.init.zeros_(layer.base_layer.weight)
    for name, r in rank.items():
        first = 0 if name == "default" else 5
        layer.scaling[name] = 1.0
        layer.lora_A[name].weight.data = torch.eye(K)[:r].clone()
        layer.lora_B[name].weight.data = torch.eye(N)[:, first : first + r].clone()
    torch.compiler.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    y = call(torch.ones(rows, K)).detach()
    masks = {"default": y[:, :5], "other0": y[:, 5:8]}
    for name, mask in masks.items():
        assert torch.allclose(mask[mask != 0], torch.tensor(1 / (1 - p[name])), rtol=1e-4)
        kept = (mask != 0).float().mean(0)
        assert ((kept - (1 - p[name])).abs() < 5 * (p[name] * (1 - p[name]) / rows) ** 0.5).all()
    both = ((masks["default"][:, :3] != 0) & (masks["other0"] != 0)).float().mean(0)
    assert ((both - 0.75 * 0.5).abs() < 5 * (0.375 * 0.625 / rows) ** 0.5).all(), "the masks depend on each other"


def test_several_adapters_drop_only_while_they_train():
    stock = several()
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(M, K)
    assert not torch.equal(lin(patched)(x), lin(patched)(x))
    lin(patched).lora_dropout["default"].eval()  # one of two
    assert not torch.equal(lin(patched)(x), lin(patched)(x))
    torch.testing.assert_close(lin(patched.eval())(x), lin(stock.eval())(x))


def test_several_adapters_compile_and_train_as_in_eager():
    torch.compiler.reset()
    patched = several()
    lk.patch(patched)
    compiled = torch.compile(lin(patched), fullgraph=True, backend="aot_eager")
    x = torch.randn(M, K, requires_grad=True)
    results = []
    for call in (lin(patched), compiled):
        torch.manual_seed(5)
        results.append(run(call, x))
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)


def test_checkpointing_draws_the_same_masks():
    patched = several()
    lk.patch(patched)
    x, gradients = torch.randn(M, K, requires_grad=True), []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        patched.zero_grad()
        call = functools.partial(checkpoint, lin(patched), use_reentrant=False) if checkpointed else lin(patched)
        call(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in lin(patched).named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


# --------------------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize("needs_grad", [True, False], ids=["x trains", "first layer"])
@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({}, contextlib.nullcontext),
        ({"net": Net(bias=False)}, contextlib.nullcontext),
        ({"use_rslora": True}, contextlib.nullcontext),
        ({"bias": "lora_only"}, contextlib.nullcontext),
        ({"net": Net(linear=Conv1D), "fan_in_fan_out": True}, contextlib.nullcontext),
        ({"dtype": BF16}, contextlib.nullcontext),
        ({"dtype": FP16, "autocast_adapter_dtype": False}, contextlib.nullcontext),
        ({}, bf16_autocast),
    ],
    ids=["plain", "no bias", "rsLoRA", "bias trains", "Conv1D", "bf16", "fp16 adapters", "autocast"],
)
def test_dora_under_dropout_with_pefts_own_mask(options, context, needs_grad):
    """The mask is torch's, drawn as PEFT draws it: the same seed gives the same mask."""
    dtype = options.get("dtype", FP32)
    stock = make(use_dora=True, lora_dropout=0.3, **copy.deepcopy(options))
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).fused == [("base_model.model.lin", "dora_linear")]
    x = torch.randn(M, K, dtype=dtype, requires_grad=needs_grad)
    torch.manual_seed(7)
    factor = (F.dropout(torch.ones_like(x), 0.3, True) != 0) / 0.7
    exact = run(
        lin(with_masks(stock, {"default": factor.detach()}).double()), x.detach().double().requires_grad_(needs_grad)
    )
    with context():
        torch.manual_seed(7)
        bound = run(lin(copy.deepcopy(stock).to(dtype)), x)
        torch.manual_seed(7)
        ours = run(lin(patched), x)
    assert_accurate(ours, bound, exact)
    assert "lora_magnitude_vector.default.weight" in ours
    assert ("base_layer.bias" in ours) == ("bias" in options)
    assert lk.stats()["fallback"] == {}


def test_dora_under_dropout_starts_as_the_base_layer():
    """To the bit, as PEFT's."""
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin"], use_dora=True, lora_dropout=0.5))
    lk.patch(model)
    x = torch.randn(M, K)
    assert torch.equal(lin(model)(x), lk.frozen_linear(x, lin(model).base_layer.weight, lin(model).base_layer.bias))


@pytest.mark.parametrize("part", ["layer", "dropout"])
def test_dora_drops_as_peft_does_where_a_part_is_in_eval_mode(part):
    stock = make(use_dora=True, lora_dropout=0.5)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(M, K)
    for model in (stock, patched):
        if part == "dropout":
            lin(model).lora_dropout.eval()
        else:
            lin(model).training = False  # the dropout module still trains, and PEFT does not ask it
    torch.testing.assert_close(lin(patched)(x), lin(stock)(x))
    assert torch.equal(lin(patched)(x), lin(patched)(x))
    assert lk.stats()["fallback"] == {}


def test_dora_under_dropout_makes_no_matrix_of_the_weights_size():
    """PEFT forms B A, by way of a unit matrix, and W + s B A."""
    m, n, k, r = 20, 300, 200, 4
    x, weight, A, B = (torch.randn(shape) for shape in ((m, k), (n, k), (r, k), (n, r)))
    leaves = x, A, B, torch.rand(n) + 0.5
    for leaf in leaves:
        leaf.requires_grad_()
    with ResultSizes(weight) as made:
        lk.dora_linear(x, weight, A, B, leaves[3], dropout_p=0.1, training=True).sum().backward()
    assert max(made.sizes) == m * n


def test_dora_under_dropout_compiles():
    torch.compiler.reset()
    stock = make(use_dora=True, lora_dropout=0.3)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    compiled = torch.compile(lin(patched), fullgraph=True, backend="aot_eager")
    x, results = torch.randn(M, K, requires_grad=True), []
    for call in (lin(stock), compiled):
        torch.manual_seed(5)
        results.append(run(call, x))
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [1.5, -0.1, "0.1"])
def test_dora_linear_names_a_bad_probability(p):
    x, weight, A, B, m = (torch.randn(shape) for shape in ((2, K), (N, K), (3, K), (N, 3), (N,)))
    with pytest.raises(ValueError, match=r"dora_linear: dropout_p must be a number in \[0, 1\]"):
        lk.dora_linear(x, weight, A, B, m, dropout_p=p, training=True)


def test_dora_linear_whose_weight_trains_under_dropout():
    x, weight, A, B, m, bias = (torch.randn(shape) for shape in ((5, K), (N, K), (3, K), (N, 3), (N,), (N,)))
    weight.requires_grad_(), bias.requires_grad_()

    def plain():
        V = weight + 2 * B @ A
        dropped = F.dropout(x, 0.5, True)
        # The norm takes no part in the gradient, and the branch's V is W's, too.
        return F.linear(x, weight, bias) + F.linear(dropped, V * (m / V.norm(dim=1).detach())[:, None] - weight)

    results = []
    for call in (plain, lambda: lk.dora_linear(x, weight, A, B, m, bias, scaling=2.0, dropout_p=0.5, training=True)):
        torch.manual_seed(1)
        y = call()
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (weight, bias))))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
