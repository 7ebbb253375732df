"""PEFT's convolutions, fused: lora_B's part is accumulated into the base's result; what is not falls back to PEFT's."""

import copy
import pickle

import pytest
import torch
from numerics import assert_as_accurate
from peft import LoraConfig, get_peft_model
from peft_layers import BF16, FP16, FP32, randomise, run
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.integrations.peft import conv as _conv
from lora_kernels.reasons import Reason
from lora_kernels.support import cpu as _cpu

CHANNELS, OUT, BATCH = 6, 8, 3
KINDS = {nn.Conv1d: (11,), nn.Conv2d: (7, 9), nn.Conv3d: (5, 6, 7)}


class Net(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def conv(kind=nn.Conv2d, kernel_size=3, **options):
    return kind(CHANNELS, OUT, kernel_size, **options)


def make(base=None, dtype=FP32, autocast_adapter_dtype=True, **options):
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["conv"]} | options))
    model = get_peft_model(Net(base or conv()).to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(model)
    return model


def layer(model):
    return model.base_model.model.conv


def both(model, **options):
    model.add_adapter("second", LoraConfig(**({"r": 2, "target_modules": ["conv"]} | options)))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])


def image(kind=nn.Conv2d, dtype=FP32, requires_grad=True, batch=BATCH):
    return torch.randn(batch, CHANNELS, *KINDS[kind], dtype=dtype).requires_grad_(requires_grad)


def assert_fused_and_accurate(stock, x, dtype=FP32, calls=1):
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).fused == [("base_model.model.conv", "lora_conv")]
    exact = run(layer(copy.deepcopy(stock).double()), x.detach().double().requires_grad_(x.requires_grad))
    bound, ours = run(layer(copy.deepcopy(stock).to(dtype)), x), run(layer(patched), x)
    assert ours.keys() == bound.keys() == exact.keys()
    for name, value in ours.items():
        assert_as_accurate(value.to(bound[name].dtype), bound[name], exact[name], name)
    assert lk.stats() == {"served": {("lora_conv", "reference"): calls}, "fallback": {}}
    return ours


@pytest.mark.parametrize("needs_grad", [True, False], ids=["x trains", "first layer"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kernel_size": 1},
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"groups": 2, "padding": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, options, needs_grad):
    ours = assert_fused_and_accurate(make(conv(kind, **options)), image(kind, requires_grad=needs_grad))
    assert {"lora_A.default.weight", "lora_B.default.weight"} < ours.keys()


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    assert_fused_and_accurate(make(), image(batch=batch))


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_padding_modes_are_the_base_layers(mode):
    """PEFT's lora_A pads with zeros, whatever the base does."""
    assert_fused_and_accurate(make(conv(padding=1, padding_mode=mode)), image())


def test_rectangular_kernels():
    base = nn.Conv2d(CHANNELS, OUT, (1, 5), stride=(2, 1), padding=(0, 2))
    assert_fused_and_accurate(make(base), image())


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"bias": "lora_only"}, {"rank_pattern": {"conv": 2}}], ids=str
)
def test_options_of_peft(options):
    assert_fused_and_accurate(make(**options), image())


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("adapters", ["float32", "same"])
def test_16_bit_base(dtype, adapters, monkeypatch):
    monkeypatch.setattr(_cpu, "has_native_matmul", lambda dtype: True)
    stock = make(dtype=dtype, autocast_adapter_dtype=adapters == "float32")
    ours = assert_fused_and_accurate(stock, image(dtype=dtype), dtype)
    assert ours["y"].dtype == dtype
    assert ours["lora_B.default.weight"].dtype == layer(stock).lora_B["default"].weight.dtype


def test_autocast(monkeypatch):
    monkeypatch.setattr(_cpu, "has_native_matmul", lambda dtype: True)
    stock, x = make(), image()
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    exact = run(layer(copy.deepcopy(stock).double()), x.detach().double().requires_grad_())
    with torch.autocast("cpu", BF16):
        bound, ours = run(layer(stock), x), run(layer(patched), x)
    for name, value in ours.items():
        assert value.dtype == bound[name].dtype
        assert_as_accurate(value.to(BF16), bound[name].to(BF16), exact[name], name)
    assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv3d])
def test_channels_last(kind, groups):
    """One product over all places; with groups, PEFT's formula on lora_B alone."""
    layout = torch.channels_last if kind is nn.Conv2d else torch.channels_last_3d
    stock = make(conv(kind, groups=groups)).to(memory_format=layout)
    x = image(kind).detach().to(memory_format=layout).requires_grad_()
    assert not layer(stock).base_layer(x).is_contiguous()
    assert_fused_and_accurate(stock, x)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_batch(kind):
    stock = make(conv(kind))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = image(kind)[0].detach().requires_grad_()
    expected, ours = run(layer(stock), x), run(layer(patched), x)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)
    assert lk.stats()["fallback"] == {}


def test_several_adapters_and_tensor_scaling():
    stock = make()
    both(stock)
    layer(stock).scaling["second"] = torch.tensor(0.7)
    ours = assert_fused_and_accurate(stock, image())
    assert {"lora_A.default.weight", "lora_B.second.weight"} < ours.keys()


def test_dropout_is_pefts_own():
    """The module is called: one mask for each adapter, of torch's generator, so that the same seed gives the same."""
    stock = make(lora_dropout=0.4)
    both(stock, lora_dropout=0.2)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x, results = image(), []
    for model in (stock, patched):
        torch.manual_seed(5)
        results.append(run(layer(model), x))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(patched)(x), layer(patched)(x))
    assert torch.equal(layer(patched.eval())(x), layer(patched)(x))


def test_base_that_trains():
    stock = make()
    for parameter in layer(stock).base_layer.parameters():
        parameter.requires_grad_()
    assert {"base_layer.weight", "base_layer.bias"} < assert_fused_and_accurate(stock, image()).keys()


def test_frozen_parts_get_no_gradient():
    stock = make()
    layer(stock).lora_A["default"].requires_grad_(False)
    ours = assert_fused_and_accurate(stock, image(requires_grad=False))
    assert ours.keys() == {"y", "lora_B.default.weight"}


class _Sizes(TorchDispatchMode):
    """How many results have y's size."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        written = func._schema.is_mutable or func.is_view
        if isinstance(result, torch.Tensor) and result.numel() == self.numel and not written:
            self.found += 1
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_nothing_as_large_as_the_result_is_made(layout):
    """PEFT makes three more: lora_B's result, that scaled, and the sum. Backward makes none, and saves none."""
    base = nn.Conv2d(CHANNELS, 3 * OUT, 3)
    stock = make(base).to(memory_format=layout)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = image().detach().to(memory_format=layout)
    made, saved = [], []
    for model in (stock, patched):
        numel = layer(model)(x).numel()
        sizes = []
        with (
            _Sizes(numel) as forward,
            torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t),
        ):
            y = layer(model)(x)
        grad = torch.ones_like(y)
        with _Sizes(numel) as backward:
            y.backward(grad)
        made.append((forward.found, backward.found))
        saved.append(sizes.count(numel))
    assert made[0][0] == 4
    assert made[1] == (1, 0)
    assert saved[1] == 0


def test_the_result_may_be_changed_in_place():
    patched = make()
    lk.patch(patched)
    y = layer(patched)(image())
    torch.relu_(y).sum().backward()


@pytest.mark.parametrize("case", ["plain", "dropout", "several", "groups"])
def test_compiles(case):
    torch.compiler.reset()
    stock = make(conv(groups=2 if case == "groups" else 1), lora_dropout=0.3 if case == "dropout" else 0.0)
    if case == "several":
        both(stock)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    compiled = torch.compile(layer(patched), fullgraph=True, backend="aot_eager")
    x, results = image(), []
    for call in (layer(stock), compiled):
        torch.manual_seed(5)
        results.append(run(call, x))
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-4)


def test_a_model_of_convolutions_trains_merges_and_unpatches():
    torch.manual_seed(0)
    net = nn.Sequential(conv(padding=1), nn.ReLU(inplace=True), nn.Conv2d(OUT, 2, 3))
    stock = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"]))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    assert repr(patched) == repr(stock)
    assert lk.verify(patched).ok
    x, curves = image(requires_grad=False), []
    for model in (stock, patched):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(5):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]
    expected = patched(x)
    copied = pickle.loads(pickle.dumps(patched))
    assert torch.equal(copied(x), expected)
    merged = copy.deepcopy(patched).merge_and_unload()
    assert [type(m) for m in merged.modules()] == [nn.Sequential, nn.Conv2d, nn.ReLU, nn.Conv2d]
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    lk.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in stock.modules()]
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- falls back


class OwnConv(nn.Conv2d):
    pass


def hook(path):
    return lambda m: layer(m).get_submodule(path).register_forward_hook(lambda _m, _args, out: out * 2)


def keep_results(model):
    """Whoever keeps the base's result must find in it what the base computed."""
    layer(model).base_layer.register_forward_hook(lambda m, _args, out: m.__dict__.update(kept=out))


def buffer_bias(model):
    layer(model).lora_B["default"].bias = None
    del layer(model).lora_B["default"].bias
    layer(model).lora_B["default"].register_buffer("bias", torch.ones(OUT))


def strided_B(model):
    base = layer(model).lora_B["default"]
    base.padding, base.stride = (1, 1), (1, 1)
    layer(model).base_layer.padding = (1, 1)
    layer(model).lora_A["default"].padding = (0, 0)


FALLBACKS = {
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), Reason.DISABLED),
    "merged": ({}, lambda m: m.merge_adapter(), Reason.MERGED),
    "DoRA": ({"use_dora": True}, None, Reason.DORA),
    "lora_bias": ({"lora_bias": True}, None, Reason.LORA_BIAS),
    "lora_B bias is a buffer": ({}, buffer_bias, Reason.DISPLACED),
    "lora_B pads": ({}, strided_B, Reason.ADAPTER_MODULES),
    "subclass": ({"base": OwnConv(CHANNELS, OUT, 3)}, None, Reason.BASE_LAYER),
    "parametrized base": ({}, lambda m: parametrizations.weight_norm(layer(m).base_layer), Reason.PARAMETRIZED),
    "parametrized lora_B": (
        {}, lambda m: parametrizations.weight_norm(layer(m).lora_B["default"]), Reason.PARAMETRIZED,
    ),
    "hook on the base": ({}, hook("base_layer"), Reason.ADAPTER_HOOKS),
    "hook that keeps the base's result": ({}, keep_results, Reason.ADAPTER_HOOKS),
    "hook on lora_B": ({}, hook("lora_B.default"), Reason.ADAPTER_HOOKS),
    "narrow adapter": ({}, lambda m: layer(m).lora_A.to(BF16) and layer(m).lora_B.to(BF16), Reason.MIXED_DTYPES),
    "scaling of a vector": ({}, lambda m: layer(m).scaling.update(default=torch.ones(1, 1, 1)), Reason.TENSOR_SCALING),
}  # fmt: skip


@pytest.mark.parametrize(("options", "change", "reason"), FALLBACKS.values(), ids=FALLBACKS.keys())
def test_falls_back_to_peft(options, change, reason):
    stock = make(**copy.deepcopy(options))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    for model in (stock, patched):
        if change is not None:
            torch.manual_seed(1)
            change(model)
    x = image()
    expected, ours = run(layer(stock), x), run(layer(patched), x)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    kept = [m.base_layer.__dict__.get("kept") for m in (layer(stock), layer(patched))]
    assert kept[0] is None or torch.equal(*kept)
    assert lk.stats() == {"served": {}, "fallback": {("lora_conv", str(reason)): 1}}
    assert ("base_model.model.conv", reason) in lk.patch(patched).kept


def test_hooks_on_what_is_called_stay():
    stock = make(lora_dropout=0.1).eval()
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    for model in (stock, patched):
        hook("lora_A.default")(model), hook("lora_dropout.default")(model)
    x = image()
    torch.testing.assert_close(layer(patched)(x), layer(stock)(x), rtol=1e-4, atol=1e-4)
    assert lk.stats()["fallback"] == {}


def test_other_calls_are_pefts():
    stock = make().eval()
    both(stock)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x, names = image(requires_grad=False), ["second", "__base__", "default"]
    assert torch.equal(layer(patched)(x, adapter_names=names), layer(stock)(x, adapter_names=names))
    ours, theirs = (torch.vmap(layer(m))(x[None]) for m in (patched, stock))
    torch.testing.assert_close(ours, theirs)
    assert lk.stats()["fallback"] == {("lora_conv", Reason.ADAPTER_NAMES): 1, ("lora_conv", Reason.TRANSFORM): 1}


def test_16_bits_that_the_cpu_does_not_multiply_are_pefts(monkeypatch):
    monkeypatch.setattr(_cpu, "has_native_matmul", lambda dtype: dtype == FP32)
    stock = make(dtype=BF16)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = image(dtype=BF16)
    assert torch.equal(layer(patched)(x), layer(stock)(x))
    assert lk.stats() == {"served": {}, "fallback": {("lora_conv", Reason.DTYPE): 1}}


def test_patch_peft_makes_fused_convolutions():
    lk.patch_peft()
    try:
        model = make()
        assert lk.is_fused(layer(model))
        layer(model)(image())
    finally:
        lk.unpatch_peft()
    assert lk.stats()["served"] == {("lora_conv", "reference"): 1}
    assert _conv.adapters(layer(model))[0][0] == "default"
