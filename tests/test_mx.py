"""Formats mxfp4 and nvfp4: torchao's bits, compressed-tensors' names, and training over them."""

import peft
import pytest
import torch
from numerics import assert_as_accurate
from torch import nn

import lora_kernels as lk
from lora_kernels import formats
from lora_kernels.formats import FORMATS

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is the oracle")
nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is the oracle")
K, N = 192, 40
DTYPES = (torch.float32, torch.bfloat16)


def some_weight(dtype=torch.float32, seed=0):
    """Rows of very different scales, one of zeros, and one of numbers that lie between two of e2m1's."""
    torch.manual_seed(seed)
    weight = torch.randn(N, K) * torch.logspace(-30 if seed == 1 else -3, 1, N)[:, None]
    weight[5] = 0.0
    weight[6] = torch.tensor([0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 6.0]).repeat(K // 8)
    return weight.to(dtype)


def theirs(name, weight, *, with_factor=True):
    if name == "mxfp4":
        return mx_tensor.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    factor = nvfp4_tensor.per_tensor_amax_to_scale(weight.float().abs().amax()) if with_factor else None
    return nvfp4_tensor.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=factor)


def layer_of(tensor):
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_quantising_gives_torchao_s_bits(name, dtype, seed):
    """Kills: ties away from zero, nibbles swapped, a division in place of the product with the inverse, an exponent
    that is rounded."""
    weight = some_weight(dtype, seed)
    ours, other = FORMATS[name].quantize(weight), theirs(name, weight)
    assert torch.equal(ours.parts[0], other.qdata.view(torch.uint8))
    assert torch.equal(ours.parts[1].view(-1), other.scale.view(torch.uint8).view(-1))
    assert torch.equal(ours.dequantize(torch.float32), other.dequantize(torch.float32))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("decoded_to", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "with_factor"), [("mxfp4", True), ("nvfp4", True), ("nvfp4", False)], ids=str)
def test_reading_gives_torchao_s_bits(name, with_factor, decoded_to, backend):
    tensor = theirs(name, some_weight(), with_factor=with_factor)
    weight = formats.from_module(layer_of(tensor))
    with lk.use_backend(backend):
        assert torch.equal(weight.dequantize(decoded_to), tensor.dequantize(decoded_to))
    blocks = weight.split(7)
    assert torch.equal(torch.cat([block.dequantize() for block in blocks]), weight.dequantize())


def test_what_is_not_served_has_a_reason():
    other = mx_tensor.MXTensor.to_mx(some_weight(), torch.float8_e4m3fn, 32)
    assert formats.from_module(layer_of(other)) is lk.Reason.FORMAT
    swizzled = mx_tensor.MXTensor.to_mx(some_weight(), torch.float4_e2m1fn_x2, 32, is_swizzled_scales=True)
    assert formats.from_module(layer_of(swizzled)) is lk.Reason.LAYOUT


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_compressed_tensors_names_are_read(name):
    """compressed-tensors divides by its factor, where torchao multiplies."""
    weight = FORMATS[name].quantize(some_weight())
    layer = nn.Module()
    layer.weight_packed = nn.Parameter(weight.parts[0].view(N, K // 2), requires_grad=False)
    scales = weight.parts[1].view(N, -1)
    if name == "nvfp4":
        scales = scales.view(torch.float8_e4m3fn)
        layer.weight_global_scale = nn.Parameter(torch.tensor([37.5]), requires_grad=False)
    layer.weight_scale = nn.Parameter(scales, requires_grad=False)
    found = formats.from_module(layer)
    assert (found.format, found.shape) == (name, (N, K))
    decoded = found.dequantize()
    if name == "mxfp4":
        assert torch.equal(decoded, weight.dequantize())
        return
    codes = weight.parts[2]
    data = weight.parts[0].view(N, K // 2)
    numbers = torch.stack((codes[(data & 15).int()], codes[(data >> 4).int()]), dim=2).view(N, K)
    assert torch.equal(decoded, numbers * (scales.float() / 37.5).repeat_interleave(16, dim=1))


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("rows", [1, 9, 90])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_training_over_it(name, rows):
    """PEFT's layer over torchao's tensor, patched, against the decoded weight in float64."""
    tensor = theirs(name, some_weight())
    net = nn.ModuleDict({"lin": layer_of(tensor)})
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["lin"], init_lora_weights=False))
    report = lk.patch(model)
    assert report.kept == []
    layer, x = model.base_model.model.lin, torch.randn(rows, K, requires_grad=True)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = layer(x)
    ours = [y, *torch.autograd.grad(y.square().sum(), [x, A, B])]

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
        xs, a, b = leaves
        y = nn.functional.linear(xs, tensor.dequantize(torch.float32).to(dtype), layer.base_layer.bias.to(dtype))
        y = y + layer.scaling["default"] * xs @ a.t() @ b.t()
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for result, bound, value in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_as_accurate(result, bound, value)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_own_layers(name):
    net = nn.Sequential(nn.Linear(K, N))
    lk.quantize_(net, name)
    layer, x = net[0], torch.randn(5, K)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.quantized_weight().dequantize(), layer.bias))
    other = nn.Sequential(nn.Linear(K, N))
    lk.quantize_(other, name)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match="multiple of"):
        FORMATS[name].quantize(torch.randn(4, 24))
    with pytest.raises(TypeError, match="no option is known, got block"):
        FORMATS[name].quantize(torch.randn(4, 32), block=32)


def test_tables_serve_training_after_inference():
    """Kills: a table that was first made in inference mode, which autograd cannot save."""
    formats.mx._codes.cache_clear()
    formats.mx._powers.cache_clear()
    layer = layer_of(theirs("mxfp4", some_weight()))
    with torch.inference_mode():
        formats.from_module(layer)
    weight = formats.from_module(layer)
    x = torch.randn(3, K, requires_grad=True)
    lk.frozen_linear(x, weight).sum().backward()
    assert x.grad.any()
