"""What a PEFT layer computes besides plain LoRA, fused: each branch as accurate as stock PEFT on the same branch."""

import copy
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from numerics import assert_as_accurate
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_layers import (
    BF16,
    FP16,
    FP32,
    K,
    N,
    Net,
    assert_fused_and_accurate,
    both_adapters,
    lin,
    make,
    randomise,
    run,
    second_adapter,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.functional import dora
from lora_kernels.reasons import Reason


def bf16_autocast():
    return torch.autocast("cpu", BF16)


# ------------------------------------------------------------------------------------------ several adapters


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "second",
    [
        {},  # another rank, and another scaling with it
        {"r": 10, "lora_alpha": 24},  # another rank, the same scaling
        {"lora_bias": True, "use_rslora": True},
    ],
    ids=str,
)
def test_several_adapters_are_one_of_the_summed_rank(second, dtype):
    stock = make(dtype)
    both_adapters(stock, **second)
    unfused = copy.deepcopy(stock).to(dtype)
    ours = assert_fused_and_accurate(stock, torch.randn(30, K, dtype=dtype, requires_grad=True), unfused)
    assert {"lora_A.default.weight", "lora_B.second.weight"} < ours.keys()


def test_several_adapters_with_dropout_in_eval_mode():
    stock = make(lora_dropout=0.3)
    both_adapters(stock)
    assert_fused_and_accurate(stock.eval(), torch.randn(4, K))


# ------------------------------------------------------------------------------------ mixed batches (adapter_names)

NAMES = {
    "interleaved": ["second", "__base__", "default", "second", "default"],
    "adjacent": ["default", "default", "__base__", "second", "second"],
    "one adapter": ["second"] * 5,
    "base only": ["__base__"] * 5,
}


def mixed(dtype=FP32, **options):
    stock = make(dtype, **options)
    second_adapter(stock, **options)
    return stock.eval()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_mixed_batch(names, options, dtype):
    stock = mixed(dtype, **options)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(5, 3, K, dtype=dtype, requires_grad=True)
    exact = run(lin(copy.deepcopy(stock).double()), x.detach().double().requires_grad_(), adapter_names=names)
    bound = run(lin(copy.deepcopy(stock).to(dtype)), x, adapter_names=names)
    ours = run(lin(patched), x, adapter_names=names)
    assert ours.keys() == bound.keys()
    for name, value in ours.items():
        assert_as_accurate(value.to(bound[name].dtype), bound[name], exact[name], name)
    unadapted = [i for i, name in enumerate(names) if name == "__base__"]
    assert torch.equal(ours["y"][unadapted], lin(stock).base_layer(x).detach()[unadapted])
    op = "lora_linear" if names == NAMES["base only"] else "multi_lora_linear"
    assert {op for op, _ in lk.stats()["served"]} - {"multi_lora_linear_backward"} == {op}
    assert lk.stats()["fallback"] == {}


def test_mixed_batch_multiplies_the_base_once():
    patched = mixed()
    lk.patch(patched)
    calls = []
    lin(patched).base_layer.register_forward_hook(lambda *_: calls.append(1))  # base_layer is called: hooks stay
    lin(patched)(torch.randn(5, K), adapter_names=NAMES["interleaved"])
    assert calls == [1]
    assert lk.stats()["fallback"] == {}


def test_mixed_batch_keeps_adapters_apart():
    """The rows of other adapters are not even multiplied by zero."""
    patched = mixed()
    lk.patch(patched)
    nn.init.constant_(lin(patched).lora_A["second"].weight, float("nan"))
    y = lin(patched)(torch.randn(5, K), adapter_names=NAMES["interleaved"])
    assert y.isnan().all(1).tolist() == [True, False, False, True, False]


def test_mixed_batch_under_autocast_and_with_tensor_scaling():
    stock = mixed()
    lin(stock).scaling["second"] = torch.tensor(0.4)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x, names = torch.randn(5, 3, K), NAMES["interleaved"]
    exact = lin(copy.deepcopy(stock).double())(x.double(), adapter_names=names)
    with bf16_autocast(), torch.no_grad():
        assert_as_accurate(lin(patched)(x, adapter_names=names), lin(stock)(x, adapter_names=names), exact)
    assert lk.stats()["fallback"] == {}


def test_mixed_batch_compiles():
    patched = mixed()
    lk.patch(patched)
    x, names = torch.randn(5, 3, K), NAMES["interleaved"]
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(lin(patched), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, adapter_names=names), lin(patched)(x, adapter_names=names))


def test_mixed_batch_in_a_whole_model():
    stock = mixed()
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x, names = torch.randn(5, K), NAMES["interleaved"]
    with torch.no_grad():
        torch.testing.assert_close(patched(x, adapter_names=names), stock(x, adapter_names=names))
    for model in (stock.train(), patched.train()):
        with pytest.raises(ValueError, match="when the model is in training mode"):
            model(x, adapter_names=names)


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (lambda m: m.merge_adapter(), NAMES["interleaved"], "when there are merged adapters"),
        (lambda m: None, NAMES["interleaved"][:3], "should be the same as the number of inputs"),
        (lambda m: second_adapter(m, use_dora=True), NAMES["one adapter"], "when DoRA is enabled"),
    ],
    ids=["merged", "too few names", "DoRA"],
)
def test_mixed_batches_that_peft_refuses(change, names, message):
    patched = make().eval()
    lk.patch(patched)
    change(patched)
    with pytest.raises(ValueError, match=message):
        lin(patched)(torch.randn(5, K), adapter_names=names)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.ADAPTER_NAMES): 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.base_model.disable_adapter_layers(), Reason.DISABLED),
        (lambda m: lin(m).lora_A.second.register_forward_hook(lambda *_: None), Reason.ADAPTER_HOOKS),
    ],
    ids=["disabled", "hook"],
)
def test_mixed_batches_that_fall_back(change, reason):
    stock = mixed(lora_dropout=0.5)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x, results = torch.randn(4, K), []
    for model in (stock, patched):
        change(model)
        torch.manual_seed(3)
        results.append(lin(model)(x, adapter_names=["second", "__base__", "second", "second"]))
    assert torch.equal(*results)
    assert lk.stats()["fallback"] == {("lora_linear", reason): 1}


# ------------------------------------------------------------------------------------------------------ Conv1D


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_conv1d(options, dtype):
    stock = make(dtype, net=Net(linear=Conv1D), fan_in_fan_out=True, **options)
    unfused = copy.deepcopy(stock).to(dtype)
    assert_fused_and_accurate(stock, torch.randn(3, 10, K, dtype=dtype, requires_grad=True), unfused)


def test_conv1d_merges_as_before():
    patched = make(net=Net(linear=Conv1D), fan_in_fan_out=True)
    lk.patch(patched)
    x = torch.randn(4, K)
    expected = patched(x)
    patched.merge_adapter()
    torch.testing.assert_close(patched(x), expected)


# ----------------------------------------------------------------------------------------------- tensor scaling


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("scaling", [torch.tensor(1.5), torch.tensor(0.7, dtype=BF16)], ids=["fp32", "bf16"])
def test_tensor_scaling(scaling, dtype):
    stock = make(dtype, lora_bias=True)
    lin(stock).scaling["default"] = scaling
    unfused = copy.deepcopy(stock).to(dtype)
    assert_fused_and_accurate(stock, torch.randn(30, K, dtype=dtype, requires_grad=True), unfused)


@pytest.mark.parametrize(
    "scaling",
    [np.float32(0.75), np.float64(0.75), np.int64(2), Fraction(3, 4), 2, torch.tensor(2), torch.tensor(True)],
    ids=lambda scaling: f"{type(scaling).__name__} {scaling}",
)
@pytest.mark.parametrize("target", ["lin", "emb"])
def test_numbers_of_other_kinds(scaling, target):
    """lora_alpha=np.float32(4) gives such a factor; PEFT multiplies by it without looking."""
    net = nn.ModuleDict({"lin": nn.Linear(K, N), "emb": nn.Embedding(11, 6)})
    stock = get_peft_model(net, LoraConfig(target_modules=[target], init_lora_weights=False))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    theirs, ours = (model.base_model.model[target] for model in (stock, patched))
    ours.scaling["default"] = scaling
    theirs.scaling["default"] = float(scaling) if isinstance(scaling, Fraction) else scaling  # PEFT takes no fractions
    x = torch.randn(3, K) if target == "lin" else torch.arange(5)
    torch.testing.assert_close(ours(x), theirs(x))
    assert lk.stats()["fallback"] == {}


def test_dropout_of_another_kind_of_number():
    stock = make(lora_dropout=np.float32(0.25))
    lk.patch(stock)
    lin(stock)(torch.randn(3, K))
    assert lk.stats()["fallback"] == {}


def test_tensor_scaling_that_trains():
    stock = make()
    gradients = []
    for layer in (lin(stock), lin(copy.deepcopy(stock))):
        layer.scaling["default"] = torch.tensor(1.5, requires_grad=True)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(4, K)
    for model in (stock, patched):
        scaling = lin(model).scaling["default"] = torch.tensor(1.5, requires_grad=True)
        lin(model)(x).square().sum().backward()
        gradients.append(scaling.grad)
    torch.testing.assert_close(*gradients)
    assert lk.stats()["fallback"] == {}


# ----------------------------------------------------------------------------------------------------- hot-swap


def test_hot_swap_with_padded_ranks(tmp_path):
    """Adapters of different rank and scaling take each other's place, in a compiled model without a new trace."""
    for name, options in (("small", {"r": 2, "lora_alpha": 3}), ("large", {"r": 6, "use_rslora": False})):
        make(**options).save_pretrained(tmp_path / name)
    net = Net()
    stock, patched = (make(net=copy.deepcopy(net), r=2, lora_alpha=3).eval() for _ in range(2))
    for model in (stock, patched):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    lk.patch(patched)
    assert lk.patch(patched).kept == []
    x = torch.randn(4, K)
    torch.compiler.reset()
    compiled = torch.compile(lin(patched), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        torch.compiler.set_stance("fail_on_recompile")
        try:
            for name in ("large", "small"):
                for model in (stock, patched):
                    hotswap_adapter(model, tmp_path / name, adapter_name="default")
                torch.testing.assert_close(compiled(x), lin(stock)(x))
        finally:
            torch.compiler.set_stance("default")
    assert lin(patched).lora_A.default.weight.shape[0] == 8
    assert lk.stats()["fallback"] == {}


# --------------------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("needs_grad", [True, False], ids=["x trains", "first layer"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"bias": "lora_only"}], ids=lambda o: str(o) or "plain"
)
def test_dora(options, needs_grad, bias):
    stock = make(net=Net(bias=bias), use_dora=True, **options)
    if "lora_dropout" in options:
        stock.eval()
    ours = assert_fused_and_accurate(stock, torch.randn(2, 7, K, requires_grad=needs_grad))
    assert "lora_magnitude_vector.default.weight" in ours
    assert lk.patch(stock).fused == [("base_model.model.lin", "dora_linear")]


@pytest.mark.parametrize("adapters", ["float32", "same"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_dora_on_a_16_bit_base(dtype, adapters):
    stock = make(dtype, use_dora=True, autocast_adapter_dtype=adapters == "float32")
    unfused = copy.deepcopy(stock).to(dtype)
    ours = assert_fused_and_accurate(stock, torch.randn(40, K, dtype=dtype, requires_grad=True), unfused)
    assert ours["y"].dtype == dtype


@pytest.mark.parametrize("base", [FP32, BF16])
def test_dora_under_autocast(base):
    stock = make(base, use_dora=True)
    x = torch.randn(40, K, dtype=base, requires_grad=True)
    assert assert_fused_and_accurate(stock, x, context=bf16_autocast)["y"].dtype == BF16


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dora_starts_as_the_base_layer(dtype, bias, rows):
    """To the bit, as PEFT's: a bias that is added after the product is rounded once more."""
    config = LoraConfig(target_modules=["lin"], use_dora=True)
    model = get_peft_model(Net(bias=bias).to(dtype), config, autocast_adapter_dtype=False)
    lk.patch(model)
    base, x = lin(model).base_layer, torch.randn(rows, K, dtype=dtype)
    expected = lk.lora_linear(x, base.weight, torch.zeros(1, K, dtype=dtype), torch.zeros(N, 1, dtype=dtype), base.bias)
    assert torch.equal(lin(model)(x), expected)


@pytest.mark.parametrize("adapters", [None, "cast"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_dora_norm_without_an_update_has_the_bits_of_pefts(dtype, adapters):
    """The root of the square of the norm is an ulp off in about one row of four. Where PEFT's magnitude is not rounded
    to 16 bits on the way (as it is for a 16-bit base with fp32 adapters), the scale is then exactly 1 at the start.
    """
    net = Net(linear=lambda *_, **__: nn.Linear(576, 192)).to(dtype)
    options = {} if adapters is None else {"autocast_adapter_dtype": False}
    model = get_peft_model(net, LoraConfig(target_modules=["lin"], use_dora=True), **options)
    layer = lin(model)
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    weight, scaling = layer.base_layer.weight, layer.scaling["default"]
    magnitude = layer.lora_magnitude_vector["default"]
    theirs = magnitude.get_weight_norm(weight.to(A.dtype), B @ A, scaling)
    ours = dora.norm(weight, A, B, scaling)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    if A.dtype == dtype:
        assert torch.equal(magnitude.weight / ours, torch.ones_like(ours))
    B[3] = torch.randn(8)
    changed = dora.norm(weight, A, B, scaling) != theirs
    assert changed.tolist() == [row == 3 for row in range(192)], "rows without an update keep their bits"


@pytest.mark.parametrize("dynamic", [False, True])
def test_dora_and_several_adapters_compile(dynamic):
    torch.compiler.reset()
    for stock in (make(use_dora=True), make()):
        if not lin(stock).lora_magnitude_vector:
            both_adapters(stock)
        patched = copy.deepcopy(stock)
        lk.patch(patched)
        compiled = torch.compile(lin(patched), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        x = torch.randn(6, K, requires_grad=True)
        expected = run(lin(stock), x)
        for name, value in run(compiled, x).items():
            torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=2e-5, atol=1e-5)


DORA_ERRORS = {
    "no tensor": ({"magnitude": 1.0}, TypeError, "dora_linear: magnitude must be a tensor, got float"),
    "integers": ({"magnitude": torch.ones(N).long()}, TypeError, "magnitude must be floating point, got torch.int64"),
    "size": ({"magnitude": torch.ones(N + 1)}, ValueError, rf"magnitude must be \[{N}\] to fit weight"),
    "device": ({"magnitude": torch.ones(N, device="meta")}, ValueError, "magnitude must be on cpu like weight"),
    "bias": ({"bias": torch.ones(1)}, ValueError, r"dora_linear: bias must be \[18\]"),
}


@pytest.mark.parametrize(("change", "error", "message"), DORA_ERRORS.values(), ids=DORA_ERRORS.keys())
def test_dora_linear_names_the_bad_argument(change, error, message):
    arguments = {
        "x": torch.randn(2, K), "weight": torch.randn(N, K), "lora_A": torch.randn(3, K), "lora_B": torch.randn(N, 3),
        "magnitude": torch.ones(N),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        lk.dora_linear(**(arguments | change))


# -------------------------------------------------------------------------------------------- target_parameters


def test_the_weight_of_a_linear_layer_as_a_target_parameter():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about parameters of linear layers
        stock = get_peft_model(Net(), LoraConfig(r=2, target_modules=[], target_parameters=["lin.weight"]))
    randomise(stock)
    patched = copy.deepcopy(stock)
    report = lk.patch(patched)
    assert report.fused == [("base_model.model.lin", "lora_linear")]
    x = torch.randn(4, K, requires_grad=True)
    ours, expected = run(patched, x), run(stock, x)
    exact = run(copy.deepcopy(stock).double(), x.detach().double().requires_grad_())
    assert ours.keys() == expected.keys() == exact.keys()
    for name, value in expected.items():
        assert_as_accurate(ours[name], value, exact[name], name)
    assert lk.stats()["fallback"] == {}
    for model in (patched, stock):
        model.merge_adapter()
    assert torch.equal(patched(x), stock(x))
    assert lk.stats()["fallback"] == {("lora_linear", Reason.MERGED): 1}
    lk.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in stock.modules()]
