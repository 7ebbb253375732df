"""GPTQ and AWQ: bits of the definition, PEFT's layers, gradients from the packed weight, and what is refused."""

import copy

import peft
import pytest
import torch
from gptq_layers import Stub, packed
from numerics import ResultSizes, assert_as_accurate
from packed import decoded
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

import lora_kernels as lk
from lora_kernels import formats
from lora_kernels.formats import zero_points

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT does not know the stub
K, N = 192, 96
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "gptq": {},
    "gptq, second version": {"version": 2},
    "gptq, desc_act": {"shuffled": True},
    "gptq, one group": {"group": K},
    "gptq, ragged groups": {"group": 80},
    "gptq, 2 bits": {"bits": 2},
    "gptq, 3 bits": {"bits": 3, "shuffled": True},
    "gptq, 8 bits": {"bits": 8},
    "gptq, bf16": {"dtype": BF16},
    "awq": {"method": "awq"},
    "awq, fp32": {"method": "awq", "dtype": FP32},
}


def stub(kind="gptq", n=N, k=K, **options):
    return Stub(n, k, **KINDS[kind] | options)


# ---------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", [None, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_bits_of_the_definition(kind, dtype):
    """Kills: nibbles in another order, a zero that is not one more (or carries into its neighbour), groups by position
    where there are indices, a product that is rounded once where the libraries round to the scales' dtype before."""
    layer = stub(kind)
    weight = formats.from_module(layer)
    assert (weight.shape, weight.dtype) == ((N, K), None)
    assert weight.parts[0].data_ptr() == layer.qweight.data_ptr(), "read, not copied"
    got = weight.dequantize(dtype)
    assert got.is_contiguous()
    assert torch.equal(got, layer.expected.to(dtype or FP32))


@pytest.mark.parametrize("n", [8, 40, 104])
@pytest.mark.parametrize(("method", "bits"), [("gptq", 2), ("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_rows_that_fill_no_word(method, bits, n):
    """Kills: zeros that are taken to be as many as their words hold."""
    layer = Stub(n, K, method, bits)
    weight = formats.from_module(layer)
    assert torch.equal(weight.dequantize(FP16), layer.expected)
    for rows in (1, 33, 64):
        blocks = weight.split(rows)
        assert torch.equal(torch.cat([block.dequantize(FP16) for block in blocks]), layer.expected)
        assert len(blocks) == -(-n // (-(-rows // blocks[0].shape[0]) * blocks[0].shape[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_weight_is_decoded_some_rows_at_a_time(monkeypatch, kind):
    """Kills: temporaries as large as the weight; rows that are decoded with the zeros of the first ones."""
    layer = stub(kind, n=N + (32 if "3 bits" in kind else 8))
    monkeypatch.setattr(zero_points, "_AT_ONCE_IN_CACHE", 1)
    weight = formats.from_module(layer)
    with ResultSizes(weight.parts[0]) as results:
        got = decoded(weight)
    assert torch.equal(got, layer.expected.float())
    assert sorted(set(results.sizes))[-2] <= 32 * K, "but for the result"


def test_size():
    weight = formats.from_module(Stub(1024, 1024, group=128, bias=False))
    assert weight.bits_per_weight == pytest.approx(4 + (16 + 4) / 128 + 32 / 1024)
    assert repr(weight).startswith("QuantizedWeight(gptq, [1024, 1024], 4.19 bits per weight, to any dtype")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_schema(method):
    args = formats.from_module(Stub(32, 64, method)).args
    torch.library.opcheck(torch.ops.lora_kernels.dequantize.default, args)
    x, A, B = torch.randn(3, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True), torch.randn(32, 4)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_packed.default, (x, *args, A, B, None, None, 0.5, 0.0))
    torch.library.opcheck(torch.ops.lora_kernels.linear_packed.default, (x, *args, None))


# ------------------------------------------------------------------------------------------------------- refusals


def sharded(layer):
    layer.qweight = layer.qweight[: len(layer.qweight) // 2]


def five_bits(layer):
    layer.qweight = torch.zeros(K * 5 // 32, N, dtype=torch.int32)


def moved(layer):
    layer.scales = layer.scales.to("meta")


def transposed(layer):
    layer.scales = layer.scales.t().contiguous().t()


@pytest.mark.parametrize(
    ("method", "change", "reason"),
    [
        ("gptq", lambda layer: setattr(layer, "QUANT_TYPE", "marlin"), lk.Reason.KERNEL_BYTES),
        ("awq", lambda layer: setattr(layer, "q_handle", object()), lk.Reason.KERNEL_BYTES),
        ("gptq", lambda layer: setattr(layer, "planar", True), lk.Reason.FORMAT),
        ("gptq", lambda layer: setattr(layer, "had_K", torch.eye(2)), lk.Reason.BASE_LAYER),
        ("gptq", lambda layer: setattr(layer, "adapter", object()), lk.Reason.BASE_LAYER),
        ("gptq", lambda layer: setattr(layer, "qzeros", None), lk.Reason.DISPLACED),
        ("gptq", sharded, lk.Reason.FORMAT),
        ("gptq", lambda layer: layer.__dict__.update(Stub(N, K, bits=3).__dict__, bits=3), None),
        ("gptq", lambda layer: layer.__dict__.update(Stub(N + 8, K, bits=3).__dict__, bits=3), lk.Reason.FORMAT),
        ("gptq", five_bits, lk.Reason.FORMAT),
        ("gptq", moved, lk.Reason.DEVICES),
        ("awq", transposed, lk.Reason.LAYOUT),
        ("awq", lambda layer: setattr(layer, "bits", 8), lk.Reason.FORMAT),
        ("awq", lambda layer: setattr(layer, "qweight", layer.qweight.t().contiguous()), lk.Reason.FORMAT),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_a_reason(method, change, reason):
    layer = Stub(N, K, method)
    change(layer)
    found = formats.from_module(layer)
    assert found is reason if reason is not None else isinstance(found, lk.QuantizedWeight)


@pytest.mark.parametrize(
    ("method", "index", "part", "message"),
    [
        ("gptq", 0, torch.zeros(7, N, dtype=torch.int32), "the sizes of data are not those of a weight of 96x192"),
        ("gptq", 1, torch.zeros(6, 13, dtype=torch.int32), r"zeros must be torch.int32 \(6, 12\)"),
        ("gptq", 2, torch.zeros(6, N, dtype=torch.float64), "scales must be torch.float32 or torch.bfloat16 or"),
        ("gptq", 3, torch.zeros(K, dtype=torch.int64), r"groups must be torch.int32 \(192,\)"),
        ("awq", 0, torch.zeros(K, 13, dtype=torch.int32), r"data must be torch.int32 \(192, 12\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(method, index, part, message):
    weight = formats.from_module(Stub(N, K, method))
    parts = (*weight.parts[:index], part, *weight.parts[index + 1 :])
    with pytest.raises(ValueError, match=message):
        lk.QuantizedWeight(method, weight.layout, parts, weight.shape, weight.block, None)
    with pytest.raises(ValueError, match="parts are expected, got 2"):
        lk.QuantizedWeight(method, weight.layout, weight.parts[:2], weight.shape, weight.block, None)


# ----------------------------------------------------------------------------------------------------------- PEFT


def peft_layer(layer, r=4, **config):
    """PEFT's layer as its dispatcher makes it of one that is the library's."""
    is_awq = not hasattr(layer, "g_idx")
    made = (AwqLoraLinear if is_awq else GPTQLoraLinear)(
        layer, "default", peft.LoraConfig(r=r, **config), r=r, lora_alpha=12
    )
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return made


def patched(layer):
    net = nn.ModuleDict({"lin": copy.deepcopy(layer)})
    weight = formats.from_module(layer.base_layer)
    report = lk.patch(net)
    assert report.fused == [("lin", f"lora_linear, {weight.format}, {weight.bits_per_weight:.2f} bits")]
    return net["lin"]


def results(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return {"y": y.detach(), "dx": x.grad, **grads}


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", ["gptq", "gptq, 3 bits", "awq"])
def test_peft_s_layers_are_served(kind, dtype, bias, rows):
    """Kills: a bias that is taken for absent because it is a buffer, or for displaced because it is an attribute."""
    theirs = peft_layer(stub(kind, bias=bias))
    ours = patched(theirs)
    x = torch.randn(2, rows, K).to(dtype)
    lk.reset_stats()
    got = results(ours, x)
    stats = lk.stats()
    assert not stats["fallback"]
    assert {("lora_linear_packed", "cpu"), ("lora_linear_packed_backward", "cpu")} <= stats["served"].keys()
    unfused, exact = copy.deepcopy(theirs).to(dtype), copy.deepcopy(theirs).double()
    exact.base_layer.expected = theirs.base_layer.expected.to(dtype).double()
    bound, expected = results(unfused, x), results(exact, x.double())
    assert got.keys() == bound.keys() == expected.keys()
    assert got["y"].dtype == got["dx"].dtype == dtype
    for name, value in got.items():
        assert_as_accurate(value.to(dtype), bound[name], expected[name], name)


def test_what_is_saved_for_backward():
    """Kills: a decoded weight that waits for its backward, as the library's own layer has it."""
    ours = patched(peft_layer(stub(n=256)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(torch.randn(16, K, requires_grad=True))
    mine = {part.data_ptr() for part in formats.from_module(ours.base_layer).parts}
    assert len([t for t in saved if t.data_ptr() in mine]) == 4
    assert max(t.numel() for t in saved if t.data_ptr() not in mine) < N * K


def test_dropout_several_adapters_and_names():
    theirs = peft_layer(stub(), lora_dropout=0.3)
    ours, x = patched(theirs), torch.randn(40, K)
    assert torch.equal(ours.eval()(x), patched(theirs).eval()(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    ours.train()
    torch.manual_seed(1)
    first = ours(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), first)
    assert not torch.equal(ours(x), first)
    for layer in (theirs, ours):
        torch.manual_seed(2)
        layer.update_layer("other", 3, lora_alpha=5, config=peft.LoraConfig(r=3, init_lora_weights=False))
        layer.set_adapter(["default", "other"])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    names = ["default"] * 10 + ["other"] * 10 + ["__base__"] * 20  # which PEFT's own forward does not take
    mixed = ours(x, adapter_names=names)
    for begin, end, active in ((0, 10, "default"), (10, 20, "other")):
        theirs.set_adapter(active)
        torch.testing.assert_close(mixed[begin:end], theirs(x[begin:end]))
    torch.testing.assert_close(mixed[20:], theirs.base_layer(x[20:]))


def test_autocast():
    theirs = peft_layer(stub())
    ours, x = patched(theirs), torch.randn(9, K)
    with torch.autocast("cpu", dtype=BF16):
        got, same_dtype = ours(x), theirs(x)
    assert got.dtype == same_dtype.dtype == BF16
    exact = copy.deepcopy(theirs).double()
    exact.base_layer.expected = theirs.base_layer.expected.to(BF16).double()
    assert_as_accurate(got, same_dtype, exact(x.double()))


def test_compiled_without_a_graph_break():
    ours, x = patched(peft_layer(stub())), torch.randn(5, K)
    expected = results(ours, x)
    torch._dynamo.reset()
    got = results(torch.compile(ours, backend="aot_eager", fullgraph=True), x)
    for a, b in zip(got.values(), expected.values()):
        torch.testing.assert_close(a, b)


def test_what_has_been_repacked_is_left_to_its_library():
    theirs = peft_layer(stub())
    theirs.base_layer.QUANT_TYPE = "exllamav2"
    net, x = nn.ModuleDict({"lin": theirs}), torch.randn(3, K)
    expected = theirs(x)
    assert lk.patch(net).kept == [("lin", lk.Reason.KERNEL_BYTES)]
    lk.reset_stats()
    assert torch.equal(net["lin"](x), expected)
    with pytest.raises(TypeError, match="adapter_names"):
        net["lin"](x, adapter_names=["default"] * 3)
    assert lk.stats()["fallback"] == {("lora_linear", lk.Reason.KERNEL_BYTES): 2}
    lk.unpatch(net)
    assert type(net["lin"]) is GPTQLoraLinear


def test_merging_is_refused():
    """Nobody can quantise the sum again without data."""
    ours = patched(peft_layer(stub()))
    with pytest.raises(NotImplementedError):
        ours.merge()
    net = nn.ModuleDict({"lin": stub()})
    with pytest.raises(ValueError, match=f"lin: {lk.Reason.DISPLACED}"):
        lk.inject(net, ["lin"], r=4, alpha=8)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_frozen_layers(kind):
    net = nn.Sequential(stub(kind), stub(kind, k=N, bias=False))
    x = torch.randn(6, K, requires_grad=True)
    expected = net(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert lk.patch(net, frozen_linears=True).fused == [("0", "frozen, packed"), ("1", "frozen, packed")]
    lk.reset_stats()
    y = net(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert lk.stats() == {
        "served": {("linear_packed", "cpu"): 2, ("linear_packed_backward", "cpu"): 2}, "fallback": {},
    }  # fmt: skip
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_the_packer_is_the_stream_of_bits():
    assert packed(torch.arange(8)[:, None], 4, 0).item() == 0x76543210
    assert packed(torch.tensor([[7] * 11]), 3, 1).tolist() == [[-1, 1]]


def test_why():
    layer = stub(bias=False)
    found = lk.why("lora_linear", torch.randn(3, K), formats.from_module(layer), torch.randn(4, K), torch.randn(N, 4))
    assert found[:2] == ("cpu", "dequantize + product")
    assert "plain torch code decodes the weight" in found[2]
