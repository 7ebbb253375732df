"""Packed layers by themselves, and under PEFT's adapters and other libraries' hands: made, merged, copied, refused."""

import copy
import pickle

import peft
import pytest
import torch
from gptq_layers import Stub
from torch import nn

import lora_kernels as lk
from lora_kernels import formats

bnb = pytest.importorskip("bitsandbytes", reason="the layers that are served are bitsandbytes'")
K, N = 128, 96


def quantised(name="nf4", bias=True, dtype=torch.float32, **options):
    net = nn.Sequential(nn.Linear(K, N, bias=bias, dtype=dtype))
    lk.quantize_(net, name, **options)
    return net[0]


def linear4bit():
    return bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=torch.float32).to("cpu")


def linear8bit():
    return bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")


# ---------------------------------------------------------------------------------------------------- from_linear


def fail(*_):
    pytest.fail("a hook of the first layer")


@pytest.mark.parametrize("make", [quantised, linear4bit, linear8bit], ids=lambda make: make.__name__)
def test_from_linear_is_what_inject_makes(make):
    """Kills: a layer that shares the dictionaries of the first, which gets the adapter then; hooks that come along; a
    copy of the weight."""
    linear = make().eval()
    linear.register_forward_hook(fail)
    net, before = nn.ModuleDict({"lin": copy.deepcopy(linear)}), set(dict(linear.named_parameters()))
    net["lin"]._forward_hooks.clear()
    torch.manual_seed(1)
    lk.inject(net, ["lin"], r=4, alpha=8, dropout=0.25, use_rslora=True)
    torch.manual_seed(1)
    layer = lk.LoRALinear.from_linear(linear, r=4, alpha=8, dropout=0.25, use_rslora=True)
    injected, x = net["lin"], torch.randn(5, K)
    assert type(layer) is type(injected)
    assert (layer.scaling, layer.dropout_p, layer.training) == (4.0, 0.25, False)
    assert set(dict(linear.named_parameters())) == before
    assert layer.state_dict().keys() == injected.state_dict().keys()
    assert layer.weight is linear.weight
    assert not any(p.requires_grad for name, p in layer.named_parameters() if "lora" not in name)
    for each in (layer, injected):
        nn.init.constant_(each.lora_B, 0.1)
    assert torch.equal(layer(x), injected(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert not hasattr(linear, "lora_A")


def test_from_linear_refuses_packed_layers_by_name():
    layer = linear4bit()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=f"from_linear: {lk.Reason.REPACKED}"):
        lk.LoRALinear.from_linear(layer, r=2, alpha=4)
    layer = quantised()
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=f"from_linear: {lk.Reason.INSTANCE_FORWARD}"):
        lk.LoRALinear.from_linear(layer, r=2, alpha=4)
    with pytest.raises(ValueError, match=f"from_linear: {lk.Reason.DISPLACED}"):
        lk.LoRALinear.from_linear(Stub(N, K), r=2, alpha=4)
    with pytest.raises(TypeError, match="adapter_dtype must be"):
        lk.LoRALinear.from_linear(quantised(), r=2, alpha=4, adapter_dtype=torch.int8)


# ---------------------------------------------------------------------------------------------------- PEFT


def peft_model(layer, seed=0, **options):
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["lin"], "init_lora_weights": False} | options
    model = peft.get_peft_model(nn.ModuleDict({"lin": layer}), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return model


def lin(model):
    return model.base_model.model["lin"]


def over_decoded(layer):
    """A plain layer of the numbers that a packed one stands for."""
    plain = nn.Linear(K, N, bias=layer.bias is not None)
    plain.weight.data.copy_(layer.quantized_weight().dequantize())
    if layer.bias is not None:
        plain.bias.data.copy_(layer.bias)
    return plain


@pytest.mark.parametrize("name", ["nf4", "int8", "float8"])
def test_dora_over_a_quantized_linear(name):
    """PEFT's own code, which asks the layer for its numbers, and ours. Kills: bytes that are taken for numbers."""
    layer = quantised(name)
    expected, stock = peft_model(over_decoded(layer), use_dora=True), peft_model(layer, use_dora=True)
    magnitude = [lin(m).lora_magnitude_vector["default"].weight for m in (stock, expected)]
    torch.testing.assert_close(*magnitude)
    ours, x = copy.deepcopy(stock), torch.randn(7, K)
    report = lk.patch(ours)
    assert [served for _, served in report.fused] == [f"dora_linear, {name}, {_bits(layer)} bits"]
    torch.testing.assert_close(lin(stock)(x), lin(expected)(x))
    torch.testing.assert_close(lin(ours)(x), lin(expected)(x))


def _bits(layer):
    return f"{layer.quantized_weight().bits_per_weight:.2f}"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int8", "float8"])
def test_merging_peft_s_adapters(name, dora):
    """Kills: a sum that is not quantised again, a bias or a DoRA factor that is left out, an adapter that is merged
    twice, a weight that is another parameter than before."""
    layer = quantised(name)
    model = peft_model(layer, use_dora=dora, lora_bias=not dora)
    lk.patch(model)
    plain = peft_model(over_decoded(layer), use_dora=dora, lora_bias=not dora)
    parameter, x = lin(model).base_layer.weight, torch.randn(7, K)
    before = layer.quantized_weight().dequantize()
    with pytest.warns(UserWarning, match="quantised again"):
        model.merge_adapter()
    plain.merge_adapter()
    exact = lin(plain).base_layer
    again = formats.FORMATS[name].again(exact.weight.data, layer.quantized_weight())
    assert lin(model).merged
    assert lin(model).base_layer.weight is parameter
    torch.testing.assert_close(layer.quantized_weight().dequantize(), again.dequantize())
    torch.testing.assert_close(layer.bias, exact.bias)
    torch.testing.assert_close(
        lin(model)(x), nn.functional.linear(x, layer.quantized_weight().dequantize(), layer.bias)
    )
    model.unmerge_adapter()
    assert not lin(model).merged
    assert (before - layer.quantized_weight().dequantize()).norm() < 0.3 * before.norm(), "about what it was"
    with pytest.warns(UserWarning, match="quantised again"):
        unloaded = model.merge_and_unload()
    assert type(unloaded["lin"]) is lk.QuantizedLinear


def test_merging_what_is_not_finite():
    model = peft_model(quantised())
    lk.patch(model)
    layer = lin(model)
    before = layer.base_layer.quantized_weight().dequantize()
    nn.init.constant_(layer.lora_B["default"].weight, float("inf"))
    with pytest.raises(ValueError, match="adapter 'default' is not finite"):
        model.merge_adapter()
    assert not layer.merged
    assert torch.equal(layer.base_layer.quantized_weight().dequantize(), before)
    with pytest.warns(UserWarning, match="has no bias"):
        model = peft_model(quantised(bias=False), lora_bias=True)
    lk.patch(model)
    with pytest.raises(RuntimeError, match="lora_bias=True needs a bias"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="nothing is merged"):
        lin(model).unmerge()


def test_from_peft_says_that_the_weight_is_packed():
    """Kills: a transposed weight that is taken to be the reason."""
    for layer, name in ((quantised("float8"), "float8"), (linear4bit(), "nf4")):
        net = nn.ModuleDict({"lin": layer})
        net.is_loaded_in_4bit = name == "nf4"
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["lin"]))
        with pytest.raises(ValueError, match=rf"from_peft: the weight .* is packed \({name}\); lk.patch serves it"):
            lk.LoRALinear.from_peft(lin(model))


# ------------------------------------------------------------------------------------------------- classes in front


@pytest.mark.parametrize("make", [quantised, linear4bit], ids=lambda make: make.__name__)
def test_a_class_in_front_of_ours_is_not_taken_for_the_layer_s(make):
    """FSDP puts one there. Kills: a copy of a layer of another class."""
    layer = lk.LoRALinear.from_linear(make(), r=2, alpha=4)
    frozen = nn.Sequential(linear4bit().requires_grad_(False))
    lk.patch(frozen, frozen_linears=True)
    for each in (layer, frozen[0]):
        kind = type(each)
        assert type(copy.deepcopy(each)) is kind
        each.__class__ = type(f"FSDP{kind.__name__}", (type("FSDPModule", (), {}), kind), {})
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"FSDP.*: a wrapped layer .FSDP. is neither copied nor pickled"):
                copying(each)


# ----------------------------------------------------------------------------------------------------- torchao


def torchao_layer(name, dtype):
    quantization = pytest.importorskip("torchao.quantization", reason="its tensors are what is merged into")
    layer = nn.Linear(K, N, dtype=dtype)
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(version=2),
        "float8": quantization.Float8WeightOnlyConfig,
    }  # fmt: skip
    if name in config:
        quantization.quantize_(layer, config[name]())
        return layer
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="its tensors are what is merged into")
    packed = mx.MXTensor.to_mx(layer.weight.data, torch.float4_e2m1fn_x2, 32)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int8", "float8"])
def test_merging_into_torchao_s_tensors(name, dtype):
    """In place: torchao's own numbers are the sum's, quantised again. Kills: a scale or a zero point that stays."""
    net = nn.Sequential(torchao_layer(name, dtype))
    lk.inject(net, ["0"], r=4, alpha=8)
    layer, x = net[0], torch.randn(5, K, dtype=dtype)
    nn.init.normal_(layer.lora_B, std=0.05)
    weight, before = formats.from_module(layer), layer(x)
    update = 2 * layer.lora_B.float() @ layer.lora_A.float()
    exact, kept = weight.dequantize(torch.float32) + update, layer.weight
    lost = lk.merge_adapter(net, keep_base=True)["0"]
    assert layer.weight is kept
    again = formats.FORMATS[name].again(exact, weight).dequantize(torch.float32)
    assert torch.equal(kept.dequantize(), again.to(dtype))
    assert lost == pytest.approx(((again - exact).norm() / update.norm()).item(), rel=1e-3)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, kept.dequantize(), layer.bias))
    lk.unmerge_adapter(net)
    assert torch.equal(layer(x), before)


def test_merging_is_refused_where_scales_are_read_by_tables():
    net = nn.Sequential(torchao_layer("mxfp4", torch.float32))
    lk.inject(net, ["0"], r=4, alpha=8)
    nn.init.normal_(net[0].lora_B)
    x = torch.randn(5, K)
    before = net[0](x)
    with pytest.raises(ValueError, match="keeps its mxfp4 in another form than it is read in"):
        lk.merge_adapter(net)
    assert torch.equal(net[0](x), before)
