"""A patched PEFT layer where it is fused: as accurate as stock PEFT, with the same gradients and masks."""

import copy

import pytest
import torch
from numerics import assert_as_accurate
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft_layers import (
    BF16,
    FP16,
    FP32,
    K,
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

import lora_kernels as lk
from lora_kernels import philox

# ---------------------------------------------------------------------------------------------------- fused

INPUTS = [(K,), (4, K), (2, 3, K), (0, K)]


@pytest.mark.parametrize("needs_grad", [True, False], ids=["x trains", "first layer"])
@pytest.mark.parametrize("shape", INPUTS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"r": 1},
        {"rank_pattern": {"lin": 7}, "alpha_pattern": {"lin": 3}},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"lora_bias": True, "bias": "lora_only"},
    ],
    ids=str,
)
def test_plain_lora_is_fused(options, shape, needs_grad):
    ours = assert_fused_and_accurate(make(**options), torch.randn(shape, requires_grad=needs_grad))
    assert ("base_layer.bias" in ours) == ("bias" in options)


def test_without_bias():
    assert_fused_and_accurate(make(net=Net(bias=False)), torch.randn(4, K))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("adapter_dtype", ["float32", "same"])
def test_16_bit_base(dtype, adapter_dtype):
    stock = make(dtype, autocast_adapter_dtype=adapter_dtype == "float32")
    assert lin(stock).lora_A["default"].weight.dtype == (FP32 if adapter_dtype == "float32" else dtype)
    unfused = copy.deepcopy(stock).to(dtype)
    ours = assert_fused_and_accurate(stock, torch.randn(40, K, dtype=dtype, requires_grad=True), unfused)
    assert ours["y"].dtype == dtype
    assert ours["lora_A.default.weight"].dtype == lin(stock).lora_A["default"].weight.dtype


@pytest.mark.parametrize("adapters", [FP32, BF16])
@pytest.mark.parametrize("base", [FP32, BF16])
def test_autocast(base, adapters):
    if (base, adapters) == (FP32, BF16):
        stock = make()
        lin(stock).lora_A.to(BF16), lin(stock).lora_B.to(BF16)
    else:
        stock = make(base, autocast_adapter_dtype=adapters == FP32)
    ours = assert_fused_and_accurate(
        stock, torch.randn(40, K, dtype=base, requires_grad=True), context=lambda: torch.autocast("cpu", BF16)
    )
    assert ours["y"].dtype == BF16
    assert ours["dx"].dtype == base


@pytest.mark.parametrize("active", ["default", ["default"], ["default", "elsewhere"]])
def test_one_active_adapter_on_this_layer(active):
    stock = make()
    stock.add_adapter("elsewhere", LoraConfig(target_modules=["out"]))
    stock.base_model.set_adapter(active)
    if isinstance(active, str):
        lin(stock)._active_adapter = active
    assert_fused_and_accurate(stock, torch.randn(4, K))


def test_the_active_adapter_is_taken():
    stock = make()
    stock.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["lin"]))
    randomise(stock)
    stock.set_adapter("second")
    ours = assert_fused_and_accurate(stock, torch.randn(4, K))
    assert {name for name in ours if "lora" in name} == {"lora_A.second.weight", "lora_B.second.weight"}


def test_changed_scale_is_seen():
    stock = make()
    lin(stock).set_scale("default", 0.25)
    assert_fused_and_accurate(stock, torch.randn(4, K))


def test_dropout_mask_is_on_the_adapter_branch_only():
    stock, x, p = make(lora_dropout=0.25), torch.randn(60, K), 0.25
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    torch.manual_seed(7)
    ours = run(lin(patched), x)
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))  # what the layer drew
    keep = lk.dropout_mask(60, K, p, seed)
    assert 0.7 < keep.float().mean() < 0.8

    class Masked(nn.Identity):
        def forward(self, x):
            return torch.where(keep, x * philox.keep_scale(p), torch.zeros((), dtype=x.dtype))

    lin(stock).lora_dropout["default"] = Masked()
    bound, exact = run(lin(stock), x), run(lin(stock.double()), x.double())
    for name, value in ours.items():
        assert_as_accurate(value, bound[name], exact[name], name)


def test_dropout_follows_the_dropout_module():
    model, x = make(lora_dropout=0.5), torch.randn(60, K)
    lk.patch(model)
    assert not torch.equal(lin(model)(x), lin(model)(x))
    lin(model).lora_dropout.eval()  # the layer itself still trains
    assert torch.equal(lin(model)(x), lin(model)(x))


def test_backends_draw_the_same_mask():
    model, x = make(lora_dropout=0.5), torch.randn(60, K, requires_grad=True)
    lk.patch(model)
    torch.manual_seed(1)
    ours = run(lin(model), x)
    with lk.use_backend("reference"):
        torch.manual_seed(1)
        reference = run(lin(model), x)
    for name, value in ours.items():
        largest = reference[name].abs().max().item()
        torch.testing.assert_close(value, reference[name], rtol=0, atol=16 * torch.finfo(FP32).eps * largest)


@pytest.mark.parametrize("adapter", [None, "second"])
def test_from_peft_shares_everything(adapter):
    model, x = make(lora_dropout=0.1, use_rslora=True), torch.randn(4, K)
    second_adapter(model)
    layer = lk.LoRALinear.from_peft(lin(model), adapter)
    if adapter is not None:
        model.set_adapter(adapter)
    name = adapter or "default"
    assert layer.weight is lin(model).base_layer.weight
    assert layer.bias is lin(model).base_layer.bias
    assert layer.lora_A is lin(model).lora_A[name].weight
    assert layer.lora_B is lin(model).lora_B[name].weight
    assert (layer.rank, layer.scaling) == (lin(model).r[name], lin(model).scaling[name])
    assert layer.dropout_p == (0.1 if adapter is None else 0.0)
    torch.testing.assert_close(layer.eval()(x), lin(model.eval())(x))


def test_from_peft_refuses_what_it_cannot_hold():
    for options, reason in (({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "bias in lora_B")):
        with pytest.raises(ValueError, match=f"adapter 'default' is not plain LoRA on a plain nn.Linear: {reason}"):
            lk.LoRALinear.from_peft(lin(make(**options)))
    model = make()
    with pytest.raises(ValueError, match="no adapter 'other' on this layer, it has default"):
        lk.LoRALinear.from_peft(lin(model), "other")
    both_adapters(model)
    with pytest.raises(ValueError, match=r"name one of the active adapters \['default', 'second'\]"):
        lk.LoRALinear.from_peft(lin(model))
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter merged"):
        lk.LoRALinear.from_peft(lin(model), "default")


# --------------------------------------------------------------------------------------------------- compile


def test_compiles_whole_and_once():
    model = make(lora_dropout=0.1)
    lk.patch(model)
    assert type(lin(model)) is not LoraLinear
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1)
    torch.compiler.reset()
    compiled = torch.compile(lin(model), fullgraph=True, backend="aot_eager")
    try:
        for step in range(4):
            compiled(torch.randn(6, K)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
    assert lk.stats()["fallback"] == {}
    assert sum(n for (op, _), n in lk.stats()["served"].items() if op == "lora_linear") == 4
