"""Formats int8 and float8: the bits of bitsandbytes, torchao and transformers; PEFT over their layers, patched."""

import copy

import peft
import pytest
import torch
from numerics import assert_as_accurate
from torch import nn

import lora_kernels as lk
from lora_kernels import formats
from lora_kernels.formats import FORMATS

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes' layers are read")
torchao = pytest.importorskip("torchao.quantization", reason="torchao's tensors are read")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K, N = 160, 72


def some_weight(dtype=torch.float32, n=N, k=K):
    torch.manual_seed(0)
    return (torch.randn(n, k) * torch.logspace(-3, 1, n)[:, None]).to(dtype)


def plain(dtype=torch.float32):
    layer = nn.Linear(K, N, dtype=dtype)
    layer.weight.data.copy_(some_weight(dtype))
    return layer


def in_bitsandbytes(dtype=torch.float32):
    source = plain(dtype)
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(source.weight.data.float(), requires_grad=False, has_fp16_weights=False)
    layer.bias = source.bias
    return layer.to("cpu")


def in_torchao(config, dtype=torch.float32):
    layer = plain(dtype)
    torchao.quantize_(layer, config)
    return layer


def in_fp8_linear(block_size, dtype=torch.float32):
    """transformers' layer, filled by hand: its own kernel needs a GPU."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(K, N, block_size=block_size, has_bias=True)
    square = None if block_size is None else block_size[0]
    weight = FORMATS["float8"].quantize(some_weight(), square=square or 1024)
    layer.weight = nn.Parameter(weight.parts[0].view(torch.float8_e4m3fn), requires_grad=False)
    scales = weight.parts[1] if block_size is not None else weight.parts[1].view(())
    layer.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    return layer


def in_compressed_tensors(dtype=torch.float32):
    layer = plain(dtype)
    weight = FORMATS["float8"].quantize(layer.weight.data)
    layer.weight = nn.Parameter(weight.parts[0].view(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = nn.Parameter(weight.parts[1].to(dtype), requires_grad=False)
    return layer


LAYERS = {
    "bitsandbytes": in_bitsandbytes,
    "torchao int8": lambda dtype=torch.float32: in_torchao(torchao.Int8WeightOnlyConfig(), dtype),
    "torchao float8": lambda dtype=torch.float32: in_torchao(torchao.Float8WeightOnlyConfig(), dtype),
}


def decoded(layer, dtype):
    """By the layer's own library."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return weight.CB.to(dtype).mul_(weight.SCB.unsqueeze(1).mul(1.0 / 127.0))  # as its training forward has it
    return weight.dequantize(dtype)


# ---------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_quantised_as_bitsandbytes_does(dtype):
    """Kills: a largest magnitude of the unrounded weight, rounding half away from zero, the quotient by 127."""
    weight = some_weight(dtype)
    weight[3] = 0.0
    data, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    ours = FORMATS["int8"].quantize(weight)
    assert torch.equal(ours.parts[0].view(torch.int8), data)
    assert torch.equal(ours.parts[1].view(-1), largest * (1.0 / 127.0))
    assert torch.equal(FORMATS["int8"].pack(ours)["SCB"], largest), "kept as theirs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_is_quantised_as_torchao_does(dtype):
    """Kills: a scale that is not rounded to the weight's dtype, a product with its inverse."""
    layer = in_torchao(torchao.Float8WeightOnlyConfig(), dtype)
    ours, theirs = FORMATS["float8"].quantize(some_weight(dtype)), layer.weight
    assert torch.equal(ours.parts[0], theirs.qdata.view(torch.uint8))
    assert torch.equal(ours.parts[1], theirs.scale)


@pytest.mark.parametrize("decoded_to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_read_to_its_library_s_bits(kind, dtype, decoded_to):
    layer = LAYERS[kind](dtype).train()
    weight = formats.from_module(layer)
    for backend in ("reference", None):
        with lk.use_backend(backend):
            assert torch.equal(weight.dequantize(decoded_to), decoded(layer, decoded_to))


@pytest.mark.parametrize("block_size", [(128, 128), (32, 32), None], ids=str)
def test_fine_grained_fp8_is_read(block_size):
    """Kills: scales of the wrong square at a rim that is no whole one."""
    layer = in_fp8_linear(block_size)
    weight = formats.from_module(layer)
    n, k = block_size or (N, K)
    scales = layer.weight_scale_inv.reshape(-(-N // n), -(-K // k))
    expected = torch.empty(N, K)
    for row in range(N):
        for column in range(K):
            expected[row, column] = layer.weight[row, column].float() * scales[row // n, column // k]
    assert torch.equal(weight.dequantize(), expected)
    blocks = weight.split(13)
    assert torch.equal(torch.cat([block.dequantize() for block in blocks]), expected)


def test_compressed_fp8_is_read():
    layer = in_compressed_tensors()
    weight = formats.from_module(layer)
    assert torch.equal(weight.dequantize(), layer.weight.float() * layer.weight_scale)


def test_rows_of_zeros_stay_zero():
    weight = some_weight()
    weight[5] = 0.0
    for name in ("int8", "float8"):
        assert not FORMATS[name].quantize(weight).dequantize()[5].any()
    assert not FORMATS["float8"].quantize(torch.zeros(200, 300), square=128).dequantize().any()


# ------------------------------------------------------------------------------------------------------- refusals


def with_rounded_activations(layer):
    """As torchao marks them; its own config asks for a GPU that multiplies fp8."""
    layer.weight.act_quant_kwargs = object()
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: in_bitsandbytes().eval(), lk.Reason.INT8_EVAL),
        (lambda: bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True), lk.Reason.FORMAT),
        (lambda: in_torchao(torchao.Int8DynamicActivationInt8WeightConfig()), lk.Reason.ACTIVATIONS),
        (lambda: with_rounded_activations(LAYERS["torchao float8"]()), lk.Reason.ACTIVATIONS),
        (lambda: in_fp8_linear((16, 32)), lk.Reason.BLOCKS),
    ],
    ids=["eval", "fp16 weights", "dynamic int8", "dynamic float8", "oblong"],
)
def test_what_is_not_served_has_a_reason(make, reason):
    assert formats.from_module(make()) is reason


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((N, 2), torch.float32, "scales must be torch.float32"),
        ((N, 1), torch.float16, "scales must be torch.float32"),
        ((N + 1, 1), torch.float32, "scales must be torch.float32"),
    ],
    ids=str,
)
def test_scales_that_do_not_fit_are_refused(shape, dtype, message):
    data = torch.zeros(N, K, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        lk.QuantizedWeight("int8", "int8", (data, torch.ones(shape, dtype=dtype)), (N, K), K)


# ------------------------------------------------------------------------------------------------------------ PEFT


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.is_loaded_in_8bit = isinstance(layer, bnb.nn.Linear8bitLt)
        self.lin = layer

    def forward(self, x):
        return self.lin(x)


def make(layer, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["lin"]} | options))
    model = peft.get_peft_model(Net(layer), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def run(layer, x):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (y if y.dtype == torch.float64 else y.float()).square().sum().backward()
    return {"y": y.detach(), "dx": x.grad} | {
        name: p.grad for name, p in layer.named_parameters() if p.grad is not None
    }


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("x_dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_peft_over_eight_bits(kind, x_dtype, rows):
    """As accurate as plain torch code over the decoded weight, against float64."""
    model = make(LAYERS[kind](x_dtype if "torchao" in kind else torch.float32))
    layer = model.base_model.model.lin
    base = nn.Linear(K, N)
    base.weight = nn.Parameter(decoded(layer.base_layer, x_dtype), requires_grad=False)
    base.bias = nn.Parameter(layer.base_layer.bias.detach(), requires_grad=False)
    dense = copy.deepcopy(layer)
    dense.base_layer = base
    bound_layer = copy.deepcopy(dense).to(x_dtype)
    report = lk.patch(model)
    assert report.kept == []
    x = torch.randn(rows, K).to(x_dtype)
    lk.reset_stats()
    results = run(layer, x)
    assert [op for op, _ in lk.stats()["served"]] == ["lora_linear_packed", "lora_linear_packed_backward"]
    reference, bound = run(dense.double(), x.double()), run(bound_layer, x)
    for name, value in reference.items():
        assert_as_accurate(results[name].to(x_dtype), bound[name], value, name)


def test_int8_in_eval_mode_is_bitsandbytes_unless_asked():
    model = make(in_bitsandbytes())
    x = torch.randn(6, K)
    trained, layer = model(x), model.base_model.model.lin
    base, A, B = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dense = formats.from_module(base).dequantize().double()
    update = layer.scaling["default"] * x.double() @ A.double().t() @ B.double().t()
    exact = nn.functional.linear(x.double(), dense, base.bias.double()) + update
    report = lk.patch(model)
    assert report.kept == []
    assert_as_accurate(model(x), trained, exact)
    model.eval()
    lk.reset_stats()
    rounded = model(x)
    assert lk.stats()["fallback"] == {("lora_linear", lk.Reason.INT8_EVAL): 1}
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(rounded, trained, exact)
    lk.patch(model, int8_eval="exact")
    assert_as_accurate(model(x), trained, exact)
    lk.unpatch(model)
    torch.testing.assert_close(model(x), rounded)
    fused = make(in_bitsandbytes())
    lk.patch(fused)
    assert "1 ok" in str(lk.verify(fused)), "held to what it computes in training"
    with pytest.raises(ValueError, match='int8_eval must be "peft" or "exact"'):
        lk.patch(model, int8_eval="both")


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_layers_without_an_adapter(kind):
    """torchao's tensors are in plain linear layers."""
    net = nn.Sequential(LAYERS[kind]()).train().requires_grad_(False)
    original, x = type(net[0]), torch.randn(9, K)
    weight = decoded(net[0], torch.float32)
    theirs = net(x)
    report = lk.patch(net, frozen_linears=True)
    assert report.fused == [("0", "frozen, packed")]
    lk.reset_stats()
    assert_as_accurate(net(x), theirs, nn.functional.linear(x.double(), weight.double(), net[0].bias.double()))
    assert [op for op, _ in lk.stats()["served"]] == ["linear_packed"]
    lk.unpatch(net)
    assert type(net[0]) is original


def test_the_statistics_are_read_where_they_are():
    """bitsandbytes moves them from the weight to the layer's state in its first own call."""
    layer = in_bitsandbytes().train()
    before = formats.from_module(layer).dequantize()
    layer(torch.randn(2, K))
    assert layer.weight.CB is None
    assert torch.equal(formats.from_module(layer).dequantize(), before)


# ------------------------------------------------------------------------------------------------------ own layers


@pytest.mark.parametrize(("name", "options"), [("int8", {}), ("float8", {}), ("float8", {"square": 32})], ids=str)
def test_own_layers(name, options):
    net = nn.Sequential(plain())
    report = lk.quantize_(net, name, **options)
    assert len(report.fused) == 1
    layer, x = net[0], torch.randn(5, K)
    weight = layer.quantized_weight()
    dense, bias = weight.dequantize(), layer.bias
    plain_y, exact = (
        nn.functional.linear(x, dense, bias),
        nn.functional.linear(x.double(), dense.double(), bias.double()),
    )
    assert_as_accurate(layer(x), plain_y, exact)
    other = nn.Sequential(nn.Linear(K, N))
    lk.quantize_(other, name, **options)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), layer(x))
    lk.inject(net, ["0"], r=3, alpha=6)
    nn.init.normal_(layer.lora_B, std=0.1)
    before = layer(x)
    assert 0 < layer.merge(keep_base=True) < 1
    layer.unmerge()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("shape", "square"), [((192, 192), 96), ((200, 100), 128), ((256, 64), 128)], ids=str)
def test_squares_survive_a_state_dict(shape, square):
    """Kills: a side that is guessed from how many squares there are."""
    layers = [nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)) for _ in range(2)]
    layers[0][0].weight.data *= torch.logspace(-2, 2, shape[0])[:, None] * torch.logspace(-2, 2, shape[1])
    for layer in layers:
        lk.quantize_(layer, "float8", square=square)
    layers[1].load_state_dict(layers[0].state_dict())
    first, second = (layer[0].quantized_weight().dequantize() for layer in layers)
    assert torch.equal(first, second)


def test_scales_of_torchao_survive_a_state_dict():
    weight = formats.from_module(LAYERS["torchao int8"]())
    layer, other = lk.QuantizedLinear(weight), lk.QuantizedLinear(FORMATS["int8"].quantize(some_weight()))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.quantized_weight().dequantize(torch.float32), weight.dequantize())


def test_int8_state_is_bitsandbytes():
    net = nn.Sequential(plain())
    lk.quantize_(net, "int8")
    theirs = in_bitsandbytes()
    ours, other = net.state_dict(prefix=""), theirs.state_dict()
    assert {key.removeprefix("0.") for key in ours} == other.keys()
    for key in other.keys() - {"bias"}:
        assert torch.equal(ours[f"0.{key}"], other[key]), key
