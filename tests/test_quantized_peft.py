"""PEFT over a 4-bit base, patched: forward and gradients from the packed weight, and PEFT's contract as it was.

The oracle is PEFT on bitsandbytes; the bound is that of numerics.py against the decoded weight in float64.
"""

import copy
import functools
import pickle
import warnings

import peft
import pytest
import torch
from numerics import assert_as_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import formats

bnb = pytest.importorskip("bitsandbytes", reason="the layers that are served are bitsandbytes'")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
K, N = 128, 96  # bitsandbytes wants a multiple of 32 rows where it repacks them
SERVED = ("lora_linear_packed", "cpu")


class Net(nn.Module):
    is_loaded_in_4bit = True  # what transformers says of a model whose layers PEFT is to treat so

    def __init__(self, compute=FP32, bias=True, **options):
        super().__init__()
        options = {"quant_type": "nf4", "compute_dtype": compute} | options
        self.lin = bnb.nn.Linear4bit(K, N, bias=bias, **options)
        self.out = nn.Linear(N, 3)

    def forward(self, x, **kwargs):
        return self.out(self.lin(x, **kwargs).to(self.out.weight.dtype))


def make(net=None, adapter_dtype=None, **options):
    """A PEFT model with a LoRA layer ``lin`` on a packed base, whose B is not zero."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**({"r": 5, "lora_alpha": 12, "target_modules": ["lin"]} | options))
    model = peft.get_peft_model((net or Net()).to("cpu"), config)
    randomise(model)
    return model if adapter_dtype is None else with_adapters_of(model, adapter_dtype)


def with_adapters_of(model, dtype):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "lora_magnitude_vector" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)


def lin(model):
    return model.base_model.model.lin


def patched(model):
    ours = copy.deepcopy(model)
    report = lk.patch(ours)
    assert report.kept == []
    return ours


def exact(model):
    """The same layer over the decoded weight, in float64."""
    layer = copy.deepcopy(lin(model))
    weight = formats.from_module(layer.base_layer)
    base = nn.Linear(K, N, bias=layer.base_layer.bias is not None)
    base.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    base.bias = layer.base_layer.bias
    layer.base_layer = base
    return layer.double()


def run(layer, x, **kwargs):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x, **kwargs)
    results = {"y": y.detach()}
    (y if y.dtype == torch.float64 else y.float()).square().sum().backward()
    results |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return results | {"dx": x.grad}


def assert_served(model, x, *, unfused=None, **kwargs):
    """One call of the patched layer is one call of the op, and as accurate as PEFT's own, or as ``unfused``."""
    ours = patched(model)
    reference = run(exact(model), x.double(), **kwargs)
    bound = run(lin(unfused or model), x, **kwargs)
    lk.reset_stats()
    results = run(lin(ours), x, **kwargs)
    served = lk.stats()["served"]
    assert served[SERVED] == 1
    assert not lk.stats()["fallback"]
    assert results.keys() == reference.keys() == bound.keys()
    for name, value in reference.items():
        assert results[name].dtype == (bound[name].dtype if unfused is None else results[name].dtype)
        assert_as_accurate(results[name].to(bound[name].dtype), bound[name], value, name)


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("rows", [1, 3, 20, 130])
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4"}, {"compress_statistics": False}], ids=str)
def test_fp32(rows, options):
    assert_served(make(Net(**options)), torch.randn(rows, K))


@pytest.mark.parametrize("rows", [1, 20, 130])
@pytest.mark.parametrize("adapter", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("compute", [FP32, BF16, FP16, None], ids=str)
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16], ids=str)
def test_the_four_dtypes(x_dtype, compute, adapter, rows):
    """Of x, of the product, of the adapter; the state's is float32. Kills: x rounded to the compute dtype where PEFT's
    branch sees it whole; y in another dtype than x's; a bias that is not cast."""
    model = make(Net(compute), adapter)
    product = compute or x_dtype
    narrow = adapter != FP32 and (adapter != product or x_dtype != product)
    if narrow:  # PEFT rounds x for such an adapter; its own code does
        ours = copy.deepcopy(model)
        lk.patch(ours)
        lk.reset_stats()
        x = torch.randn(rows, K).to(x_dtype)
        torch.testing.assert_close(lin(ours)(x), lin(model)(x), rtol=0, atol=0)
        assert lk.stats()["fallback"] == {("lora_linear", lk.Reason.MIXED_DTYPES): 1}
        return
    ours = patched(model)
    x = torch.randn(2, rows, K).to(x_dtype)
    reference, bound = run(exact(model), x.double()), run(lin(model), x)
    lk.reset_stats()
    results = run(lin(ours), x)
    assert lk.stats()["served"][SERVED] == 1
    for name, value in reference.items():
        assert results[name].dtype == bound[name].dtype
        # What PEFT rounds in 16 bits, we may: the yardstick is its error in the narrowest of the dtypes.
        assert_as_accurate(results[name].to(min(x_dtype, product, key=lambda d: d.itemsize)), bound[name], value, name)


def test_bias_and_lora_bias():
    model = make(Net(bias=True), lora_bias=True)
    nn.init.normal_(lin(model).lora_B["default"].bias)
    assert_served(model, torch.randn(7, K))


@pytest.mark.parametrize("compute", [FP32, BF16], ids=str)
def test_dora(compute):
    model = make(Net(compute), use_dora=True)
    unfused = with_adapters_of(copy.deepcopy(model), compute)  # s is rounded, as autocast does it
    assert_served(model, torch.randn(30, K).to(compute), unfused=unfused)


def test_a_packed_base_under_peft_s_plain_layer():
    """A model that was quantised by hand, of which transformers says nothing: PEFT wraps it as a plain linear layer."""
    net = Net()
    net.is_loaded_in_4bit = False
    model = make(net)
    assert type(lin(model)) is peft.tuners.lora.Linear
    assert_served(model, torch.randn(9, K))


def test_our_own_packed_layer_under_peft():
    net = nn.Sequential(nn.Linear(K, N))
    lk.quantize_(net)
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"]))
    randomise(model)
    x = torch.randn(6, K)
    expected = model(x)
    report = lk.patch(model)
    assert [by for _, by in report.fused] == ["lora_linear, nf4, 4.84 bits"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("rows", [2, 90])
def test_dropout_is_the_library_s_mask(rows):
    """Kills: a mask of x on the base product, another mask in backward."""
    model = make(lora_dropout=0.4)
    ours, reference = patched(model).train(), exact(model)
    x = torch.randn(rows, K)
    torch.manual_seed(11)
    results = run(lin(ours), x)
    torch.manual_seed(11)
    from lora_kernels.functional.checks import draw_seed

    mask = lk.dropout_mask(rows, K, 0.4, draw_seed(x.device))

    class Masked(nn.Module):
        def forward(self, t):
            return t * mask * lk.philox.keep_scale(0.4)

    reference.lora_dropout["default"] = Masked()
    for name, value in run(reference, x.double()).items():
        torch.testing.assert_close(results[name].double(), value, rtol=1e-4, atol=1e-4)


def test_bf16_autocast():
    model = make(Net(FP32))
    ours, x = patched(model), torch.randn(40, K)
    with torch.autocast("cpu", dtype=BF16):
        results, bound = run(lin(ours), x), run(lin(model), x)
    reference = run(exact(model), x.double())
    for name, value in reference.items():
        assert_as_accurate(results[name].to(BF16), bound[name].to(BF16), value, name)


# ----------------------------------------------------------------------------------------------------- contract


def test_report_and_reasons():
    model = make()
    report = lk.patch(model)
    assert report.fused == [("base_model.model.lin", "lora_linear, nf4, 4.84 bits")]
    assert lk.is_fused(lin(model))
    assert type(lin(model)).__name__ == "Linear4bit"
    assert isinstance(lin(model), peft.tuners.lora.bnb.Linear4bit)
    lk.unpatch(model)
    assert type(lin(model)) is peft.tuners.lora.bnb.Linear4bit


def test_why_names_the_packed_op():
    weight = formats.from_module(lin(make()).base_layer)
    x, A, B = torch.randn(200, K), torch.randn(4, K), torch.randn(N, 4)
    choice = lk.why("lora_linear", x, weight, A, B)
    assert choice.backend == "cpu"
    assert "decoded" in choice.reason
    assert lk.why("frozen_linear", x, weight).backend == "cpu"
    with pytest.raises(ValueError, match="unknown op over a quantised weight 'prompt_embedding'"):
        lk.why("prompt_embedding", weight)


def test_patch_peft_serves_models_made_later():
    lk.patch_peft()
    try:
        model = make()
    finally:
        lk.unpatch_peft()
    assert lk.is_fused(lin(model))


def test_disabled_adapters_and_names():
    model = make()
    ours, x = patched(model), torch.randn(4, K)
    with ours.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(ours(x), model(x), rtol=0, atol=0)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lin"]))
    randomise(model)
    ours = patched(model)
    names = ["default", "__base__", "second", "default"]
    torch.testing.assert_close(lin(ours)(x, adapter_names=names), lin(model)(x, adapter_names=names))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_adapters(dropout):
    model = make(lora_dropout=dropout)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lin"], lora_dropout=dropout))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    ours, x = patched(model), torch.randn(200, K)
    if dropout:
        results = torch.stack([lin(ours.train())(x) for _ in range(50)])
        expected, spread = lin(ours.eval())(x), results.std(0) / 50**0.5
        assert ((results.mean(0) - expected).abs() < 6 * spread + 1e-4).all(), "the mean over masks is the layer's"
        return
    assert_served(model, x)


def test_merging_replaces_what_is_read():
    """Kills: a weight that is kept from one call to the next."""
    model = make()
    ours, x = patched(model), torch.randn(5, K)
    before = lin(ours)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (model, ours):
            each.merge_adapter()
        torch.testing.assert_close(lin(ours)(x), lin(model)(x))
        for each in (model, ours):
            each.unmerge_adapter()
    after = lin(ours)(x)
    torch.testing.assert_close(after, lin(model)(x))
    assert not torch.equal(before, after), "quantising twice has changed the weight"


def test_a_repacked_weight_is_left_to_bitsandbytes():
    model = make()
    lin(model).base_layer.weight.quant_state.packing_format_for_cpu = True
    report = lk.patch(model)
    assert report.kept == [("base_model.model.lin", lk.Reason.REPACKED)]


@pytest.mark.parametrize("hooked", ["base_layer", "lora_A"])
def test_hooks_are_seen(hooked):
    model = make()
    lk.patch(model)
    layer = lin(model)
    seen = []
    module = layer.base_layer if hooked == "base_layer" else layer.lora_A["default"]
    module.register_forward_hook(lambda *_: seen.append(1))
    lk.reset_stats()
    layer(torch.randn(3, K))
    assert seen
    assert lk.stats()["fallback"] == {("lora_linear", lk.Reason.ADAPTER_HOOKS): 1}


def test_compute_dtype_is_set_by_the_first_call():
    """As bitsandbytes does it: a later call in another dtype is multiplied in the first one's."""
    model = make(Net(None))
    ours = patched(model)
    for x in (torch.randn(3, K), torch.randn(3, K).bfloat16()):
        torch.testing.assert_close(lin(ours)(x), lin(model)(x), rtol=1e-2, atol=1e-2)
        assert lin(ours).base_layer.compute_dtype == lin(model).base_layer.compute_dtype == FP32


def test_prepare_for_kbit_training_and_checkpointing():
    """Kills: a decoded weight that is saved, or one of another layer that a recompute finds in a workspace."""

    class Deep(nn.Module):
        is_loaded_in_4bit = True

        def __init__(self):
            super().__init__()
            self.lin = nn.ModuleList(
                [bnb.nn.Linear4bit(K, K, bias=False, quant_type="nf4", compute_dtype=FP32) for _ in range(3)]
            )
            self.use_checkpoint = None

        def forward(self, x):
            for layer in self.lin:
                x = x + (
                    checkpoint(layer, x, use_reentrant=self.use_checkpoint)
                    if self.use_checkpoint is not None
                    else layer(x)
                )
            return x

    torch.manual_seed(0)
    model = peft.get_peft_model(
        Deep().to("cpu"), peft.LoraConfig(r=4, target_modules=["0", "1", "2"], lora_dropout=0.2)
    )
    randomise(model)
    lk.patch(model)
    grads = []
    x = torch.randn(70, K)
    for how in (None, False, True):
        if how is not None:
            model.base_model.model.call = functools.partial(checkpoint, use_reentrant=how)
        torch.manual_seed(5)
        model.zero_grad()
        model(x.clone().requires_grad_()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for others in grads[1:]:
        assert len(others) == len(grads[0]) == 6
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others))


def test_what_is_saved_for_backward():
    """x, s, the adapter and the packed parts by reference: nothing as large as the weight."""
    ours = patched(make())
    weight = formats.from_module(lin(ours).base_layer)
    mine = {part.untyped_storage().data_ptr() for part in weight.parts}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lin(ours)(torch.randn(16, K, requires_grad=True))
    new = [t for t in saved if t.untyped_storage().data_ptr() not in mine]
    assert len(saved) - len(new) == len(weight.parts)
    assert max(t.numel() for t in new) < N * K
    assert sum(t.numel() * t.element_size() for t in new) == 4 * (16 * K + 16 * 5 + 5 * K + N * 5)


@pytest.mark.parametrize("rows", [2, 100])
def test_compiled_without_a_graph_break(rows):
    model = patched(make())
    layer, x = lin(model), torch.randn(rows, K)
    expected = run(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(x.grad, expected["dx"])
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, expected["lora_A.default.weight"])


def test_saved_and_loaded(tmp_path):
    model = make()
    ours, x = patched(model).eval(), torch.randn(3, K)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(3)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path).eval()
    lk.patch(other)
    torch.testing.assert_close(other(x), ours(x), rtol=0, atol=0)


def test_verify_holds_packed_layers_to_the_decoded_weight():
    model = make(Net(BF16), lora_dropout=0.1)
    lk.patch(model)
    result = lk.verify(model)
    assert "1 ok" in str(result)
    assert "lora_linear_packed" in str(result)


# --------------------------------------------------------------------------------------------------- own layers


@pytest.mark.parametrize("kind", ["ours", "bitsandbytes"])
def test_inject_on_a_packed_layer(kind):
    net = Net() if kind == "bitsandbytes" else nn.ModuleDict({"lin": nn.Linear(K, N)})
    net = net.to("cpu")
    if kind == "ours":
        lk.quantize_(net, modules=["lin"])
    layer = net.lin if kind == "bitsandbytes" else net["lin"]
    weight = formats.from_module(layer)
    keys = set(layer.state_dict())
    lk.inject(net, ["lin"], r=4, alpha=8)
    assert isinstance(layer, lk.LoRALinear)
    assert layer.lora_A.dtype == FP32
    assert set(layer.state_dict()) == keys | {"lora_A", "lora_B"}
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, K)
    expected = (
        torch.nn.functional.linear(x, weight.dequantize(), layer.bias) + 2 * x @ layer.lora_A.t() @ layer.lora_B.t()
    )
    torch.testing.assert_close(layer(x), expected)
    assert "1 ok" in str(lk.verify(net))


def test_merging_a_packed_layer():
    """Kills: statistics that stay those of the old weight; an unmerge that quantises again."""
    net = nn.Sequential(nn.Linear(K, N))
    lk.quantize_(net)
    lk.inject(net, ["0"], r=4, alpha=8)
    layer, x = net[0], torch.randn(6, K)
    nn.init.normal_(layer.lora_B, std=0.02)
    before, unmerged = layer(x), copy.deepcopy(net)
    exact_weight = layer.quantized_weight().dequantize() + 2 * layer.lora_B @ layer.lora_A
    lost = layer.merge(keep_base=True)
    weight = layer.quantized_weight().dequantize()
    expected_loss = (weight - exact_weight).norm() / (2 * layer.lora_B @ layer.lora_A).norm()
    assert lost == pytest.approx(expected_loss.item(), rel=1e-3)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer(x), before)
    lk.merge_adapter(net)
    with pytest.raises(RuntimeError, match="without keep_base=True"):
        lk.unmerge_adapter(net)
    assert layer.merged
    net = unmerged
    lk.merge_adapter(net, unload=True)
    assert type(net[0]) is lk.QuantizedLinear
    torch.testing.assert_close(net(x), torch.nn.functional.linear(x, weight, layer.bias))


def test_merging_what_is_not_finite_changes_nothing():
    net = nn.Sequential(nn.Linear(K, N))
    lk.quantize_(net)
    lk.inject(net, ["0"], r=4, alpha=8)
    before = net[0].quantized_weight().dequantize()
    nn.init.constant_(net[0].lora_B, float("inf"))
    with pytest.raises(ValueError, match="finite"):
        net[0].merge()
    with pytest.raises(ValueError, match="finite"):
        lk.merge_adapter(net)
    assert torch.equal(net[0].quantized_weight().dequantize(), before)
    assert not net[0].merged


# ----------------------------------------------------------------------------------------------- frozen layers


def test_frozen_packed_layers_are_served(monkeypatch):
    """Layers without an adapter: bitsandbytes' own are swapped and given back, ours need nothing."""
    net = nn.Sequential(bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=FP32), nn.Linear(N, K)).to("cpu")
    lk.quantize_(net, "fp4", modules=["1"], block=32)
    assert lk.patch(net, frozen_linears=True).kept == [("0", lk.Reason.BASE_REQUIRES_GRAD)], "its bias trains"
    net.requires_grad_(False)
    x = torch.randn(20, K, requires_grad=True)
    expected = net(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    report = lk.patch(net, frozen_linears=True)
    assert report.fused == [("0", "frozen, packed")]
    assert "1 frozen linear packed" in str(report)
    lk.reset_stats()
    y = net(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert lk.stats()["served"] == {("linear_packed", "cpu"): 2, ("linear_packed_backward", "cpu"): 2}
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), y)
    net[0].weight.quant_state.packing_format_for_cpu = True
    with monkeypatch.context() as patch:
        patch.setattr(bnb.nn.Linear4bit, "forward", lambda layer, given: given.new_full((1,), 7.0))
        assert net[0](x).item() == 7.0, "bitsandbytes' own forward serves what it has repacked"
    assert lk.stats()["fallback"] == {("frozen_linear", lk.Reason.REPACKED): 1}
    net[0].weight.quant_state.packing_format_for_cpu = False
    lk.unpatch(net)
    assert type(net[0]) is bnb.nn.Linear4bit


def test_frozen_packed_layers_beside_adapters():
    layers = {name: bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=FP32) for name in ("lin", "other")}
    net = nn.ModuleDict(layers).to("cpu")
    net.is_loaded_in_4bit = True
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["lin"]))
    report = lk.patch(model, frozen_linears=True)
    assert dict(report.fused) == {
        "base_model.model.lin": "lora_linear, nf4, 4.84 bits", "base_model.model.other": "frozen, packed",
    }  # fmt: skip


# ------------------------------------------------------------------------- what a reader of the first version has found


def test_merging_where_the_weight_is_kept_in_another_form():
    """bitsandbytes' 8 bits keep a magnitude, of which a scale is made: written there, it would be lost."""
    net = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")
    lk.inject(net, ["0"], r=4, alpha=32)
    nn.init.normal_(net[0].lora_B)
    x = torch.randn(5, 64)
    before = net(x)
    with pytest.raises(ValueError, match="keeps its int8 in another form"):
        lk.merge_adapter(net)
    assert torch.equal(net(x), before)
    assert torch.equal(net.eval()(x), before), "exact in both modes"


def test_peft_does_not_take_bytes_for_numbers():
    net = nn.Sequential(nn.Linear(64, 64))
    lk.quantize_(net, "int8")
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(RuntimeError, match=r"size of tensor|shape"):
        model.merge_and_unload(safe_merge=True)


def test_a_loaded_state_is_a_copy():
    a, b = (nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    for net in (a, b):
        lk.quantize_(net)
    x = torch.randn(3, 64)
    expected = a(x)
    b.load_state_dict(a.state_dict())
    lk.inject(b, ["0"], r=4, alpha=32)
    nn.init.normal_(b[0].lora_B)
    lk.merge_adapter(b)
    assert torch.equal(a(x), expected)
    shell = copy.deepcopy(a).to("meta")
    shell.load_state_dict(a.state_dict(), assign=True)
    assert torch.equal(shell(x), expected)


@pytest.mark.parametrize("name", ["nf4", "int8", "float8"])
def test_a_merge_that_overflows_changes_nothing(name):
    net = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=FP16))
    net[0].weight.data[3, 5] = 6e4
    lk.quantize_(net, name)
    lk.inject(net, ["0"], r=1, alpha=1)
    layer = net[0]
    layer.lora_A.data.fill_(1.0)
    before = layer.quantized_weight().dequantize()
    assert layer.merge() == 0.0, "nothing to add"
    layer.merged = False
    layer.lora_B.data.fill_(1e4)
    with pytest.raises(ValueError, match="finite"):
        layer.merge()
    assert torch.equal(layer.quantized_weight().dequantize(), before)


def test_trained_biases_over_packed_weights():
    model = make(Net(bias=True), use_dora=True, lora_dropout=0.1, bias="all").train()
    ours = patched(model)
    lin(ours)(torch.randn(5, K)).square().sum().backward()
    assert lin(ours).base_layer.bias.grad.any()
    model = make(Net(bias=True), bias="all")
    ours, x, names = patched(model), torch.randn(2, K), ["default", "__base__"]
    for layer in (lin(ours), lin(model)):
        layer(x, adapter_names=names).square().sum().backward()
    torch.testing.assert_close(lin(ours).base_layer.bias.grad, lin(model).base_layer.bias.grad)


def test_dtypes_as_bitsandbytes_has_them():
    """Under autocast a 4-bit layer answers in x's dtype; lora_bias is not rounded to the compute dtype."""
    model = make(Net(BF16), lora_bias=True)
    nn.init.constant_(lin(model).lora_B["default"].bias, 200.6 / (12 / 5))
    ours, x = patched(model), torch.zeros(1, K)
    for layer in (lin(model), lin(ours)):
        layer.base_layer.bias.data.zero_()
    torch.testing.assert_close(lin(ours)(x), lin(model)(x), rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=BF16):
        assert lin(ours)(torch.randn(3, K)).dtype == lin(model)(torch.randn(3, K)).dtype == FP32


def test_unpatch_reaches_beneath_a_hook():
    from accelerate.hooks import ModelHook, add_hook_to_module

    net = nn.Sequential(bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=FP32)).to("cpu").requires_grad_(False)
    x = torch.randn(4, K)
    expected = net(x)
    lk.patch(net, frozen_linears=True)
    add_hook_to_module(net[0], ModelHook())
    lk.unpatch(net)
    assert type(net[0]) is bnb.nn.Linear4bit
    torch.testing.assert_close(net(x), expected)


def test_inject_on_a_frozen_packed_layer():
    net = nn.Sequential(bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=FP32)).to("cpu").requires_grad_(False)
    lk.patch(net, frozen_linears=True)
    lk.inject(net, ["0"], r=2, alpha=4)
    assert torch.equal(pickle.loads(pickle.dumps(net))(torch.ones(1, K)), net(torch.ones(1, K)))
