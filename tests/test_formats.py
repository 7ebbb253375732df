"""Formats of quantised weights: the bits of the libraries that they come from, and what is refused by name."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels import formats
from lora_kernels.formats import FORMATS, LAYOUTS, codes4
from lora_kernels.functional.dora import norm

bnb = pytest.importorskip("bitsandbytes", reason="the formats' own library is the oracle")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def some_weight(n, k, dtype=torch.float32, *, seed=0):
    """Rows of very different scales, one block of zeros, one value far from the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.logspace(-4, 1, n)[:, None]
    weight[0, :64] = 0.0
    weight[-1, -1] = 40.0
    return weight.to(dtype)


def theirs(weight, name, block, nested):
    """The parts that bitsandbytes makes, in our order."""
    data, state = bnb.functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=name)
    parts = [data.view(-1), state.absmax, state.code]
    if nested:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    return parts, data, state


# ---------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_quantising_gives_bitsandbytes_bits(name, dtype, block, nested):
    """Kills: a nearest code without the grid of 65536 shares, a division in place of the product with 1/absmax, FP4's
    codes looked up in ascending order, nibbles swapped, an offset that is not the mean."""
    weight = some_weight(19, 4096, dtype, seed=block + nested)
    ours = FORMATS[name].quantize(weight, block=block, double_quant=nested)
    expected, *_ = theirs(weight, name, block, nested)
    assert len(ours.parts) == len(expected)
    for part, other in zip(ours.parts, expected):
        assert part.dtype == other.dtype
        assert torch.equal(part.view(-1), other.view(-1))
    assert (ours.shape, ours.block, ours.dtype) == ((19, 4096), block, dtype)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_decoding_gives_bitsandbytes_bits(name, dtype, nested, backend):
    """Kills: a scale by one FMA, a weight rounded twice, scales of the wrong block."""
    parts, data, state = theirs(some_weight(23, 320), name, 64, nested)
    state.dtype = dtype
    expected = bnb.functional.dequantize_4bit(data, state)
    weight = lk.QuantizedWeight(name, "codes4", tuple(parts), (23, 320), 64, dtype)
    with lk.use_backend(backend):
        assert torch.equal(weight.dequantize(), expected)


def test_scales_of_scales_may_be_negative():
    """Where rows differ much, a scale that was quantised itself decodes to something below zero: it stays so."""
    weights = []
    for large in range(1, 32):  # so many rows; the mean of all scales is what is added
        rows = torch.full((64, 1), 1e-3)
        rows[:large] = 1.0
        weights.append(FORMATS["nf4"].quantize(torch.randn(64, 64) * rows))
    weight = next(weight for weight in weights if (codes4.scales(weight.parts) < 0).any())
    with lk.use_backend("reference"):
        expected = weight.dequantize()
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_blocks_of_rows_decode_to_the_same_bits(rows):
    """Kills: scales of scales that are taken from the first row on in every block."""
    weight = FORMATS["nf4"].quantize(some_weight(37, 192))
    blocks = weight.split(rows)
    assert [block.shape[0] for block in blocks] == [len(part) for part in torch.empty(37, 0).split(rows)]
    assert torch.equal(torch.cat([block.dequantize() for block in blocks]), weight.dequantize())


def test_size():
    weight = FORMATS["nf4"].quantize(torch.randn(1024, 1024))
    assert weight.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=0.02)
    assert FORMATS["nf4"].quantize(torch.randn(1024, 1024), double_quant=False).bits_per_weight == pytest.approx(
        4.5, abs=1e-3
    )


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 2}, "3 parts are expected"),
        ({"block": 48}, "multiple of an even block"),
        ({"shape": (23, 384)}, "data must be torch.uint8 of 4416 elements"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16"),
        ({"layout": "codes3"}, "unknown layout 'codes3'"),
        ({"scales": torch.float16}, "scales must be torch.float32 of 115 elements"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts, *_ = theirs(some_weight(23, 320), "nf4", 64, False)
    given = {"layout": "codes4", "shape": (23, 320), "block": 64, "dtype": torch.float32} | change
    if "parts" in given:
        parts = parts[: given.pop("parts")]
    if "scales" in given:
        parts[1] = parts[1].to(given.pop("scales"))
    with pytest.raises((TypeError, ValueError), match=message):
        lk.QuantizedWeight("nf4", given["layout"], tuple(parts), given["shape"], given["block"], given["dtype"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 7}, "multiple of an even block"),
        ({"group": 64}, "block and double_quant are known, got group"),
    ],
    ids=str,
)
def test_quantising_options_are_checked(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FORMATS["nf4"].quantize(torch.randn(4, 128), **arguments)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        FORMATS["nf4"].quantize(torch.randn(4, 128, dtype=torch.float64))


def test_every_format_has_a_layout_that_is_known():
    assert {fmt.layout.name for fmt in FORMATS.values()} <= LAYOUTS.keys()


# ------------------------------------------------------------------------------------------------------- modules


def linear4bit(n=48, k=128, **options):
    options = {"quant_type": "nf4", "compute_dtype": torch.float32, "bias": False} | options
    return bnb.nn.Linear4bit(k, n, **options).to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_layer_of_bitsandbytes_is_read(nested, storage):
    """Kills: bytes that are converted instead of viewed."""
    layer = linear4bit(compress_statistics=nested, quant_storage=storage)
    weight = formats.from_module(layer)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
    assert torch.equal(weight.dequantize(), expected)
    assert weight.parts[0].untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


def test_a_plain_parameter_beside_the_layers_state_is_read():
    """What FSDP leaves of a Params4bit."""
    layer = linear4bit()
    expected = formats.from_module(layer).dequantize()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(formats.from_module(layer).dequantize(), expected)


def break_repacked(layer):
    layer.weight.quant_state.packing_format_for_cpu = True


def break_format(layer):
    layer.weight.quant_state.quant_type = "int4"


def break_blocks(layer):
    layer.weight.quant_state.state2.blocksize = 128


def break_sharded(layer):
    layer.weight.data = layer.weight.data[: len(layer.weight) // 2]


def break_statistics(layer):
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.to("meta")


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (break_repacked, lk.Reason.REPACKED),
        (break_format, lk.Reason.FORMAT),
        (break_blocks, lk.Reason.BLOCKS),
        (break_sharded, lk.Reason.DISPLACED),
        (break_statistics, lk.Reason.DEVICES),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_read_has_a_reason(breaking, reason):
    layer = linear4bit()
    breaking(layer)
    assert formats.from_module(layer) is reason


def test_rows_that_share_a_block_are_refused():
    assert formats.from_module(linear4bit(n=64, k=96)) is lk.Reason.BLOCKS


def test_plain_layers_have_no_packed_weight():
    assert formats.from_module(nn.Linear(4, 4)) is None
    assert formats.from_module(nn.LayerNorm(4)) is None
    assert formats.from_module(bnb.nn.Linear4bit(64, 8)) is None, "not quantised yet"


# -------------------------------------------------------------------------------------------------- QuantizedLinear


def quantized(n=48, k=128, name="nf4", bias=True, **options):
    plain = nn.Linear(k, n, bias=bias)
    model = nn.Sequential(plain)
    lk.quantize_(model, name, **options)
    return model[0]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_our_state_dict_is_bitsandbytes(name, double_quant):
    """Kills: another name or another JSON than theirs; a loss of the offset's last bit."""
    layer = quantized(name=name, double_quant=double_quant)
    state = layer.state_dict()
    other = bnb.nn.Linear4bit(128, 48, quant_type=name, compute_dtype=torch.float32)
    stats = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    other.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    other.bias = layer.bias
    assert torch.equal(
        bnb.functional.dequantize_4bit(other.weight.data, other.weight.quant_state),
        layer.quantized_weight().dequantize(),
    )
    again = other.state_dict()
    assert state.keys() == again.keys()
    mine, others = (json.loads(bytes(s[f"weight.quant_state.bitsandbytes__{name}"].tolist())) for s in (state, again))
    assert mine == others


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_their_state_dict_is_ours(nested):
    theirs = linear4bit(compress_statistics=nested, bias=True)
    ours = quantized(double_quant=not nested)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.quantized_weight().dequantize(), formats.from_module(theirs).dequantize())
    assert torch.equal(ours.bias, theirs.bias)


def test_a_state_dict_of_another_kind_is_refused():
    layer, before = quantized(), torch.randn(3, 128)
    expected = layer(before)
    with pytest.raises(RuntimeError, match="has no packed weight"):
        layer.load_state_dict(nn.Linear(128, 48).state_dict())
    with pytest.raises(RuntimeError, match=r"a weight of \(32, 128\) for a layer of \(48, 128\)"):
        layer.load_state_dict(quantized(n=32).state_dict())
    broken = layer.state_dict()
    broken["weight.absmax"] = broken["weight.absmax"][:-1]
    with pytest.raises(RuntimeError, match="do not fit together"):
        layer.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": layer.bias})
    assert torch.equal(layer(before), expected), "nothing was loaded in part"


def test_a_quantised_layer_moves_copies_and_pickles():
    """Kills: scales that a move to a dtype rounds."""
    layer, x = quantized(), torch.randn(3, 128)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    half = copy.deepcopy(layer).bfloat16()
    assert half.bias.dtype == torch.bfloat16
    assert half.quantized_weight().dtype == torch.bfloat16
    assert torch.equal(half.quantized_weight().dequantize(), layer.quantized_weight().dequantize().bfloat16())
    meta = copy.deepcopy(layer).to("meta")
    assert {part.device.type for part in meta.quantized_weight().parts} == {"meta"}
    assert "48, bias=True, nf4" in repr(layer)


def test_quantize_leaves_what_it_cannot_take():
    model = nn.ModuleDict(
        {"a": nn.Linear(128, 8), "b": nn.Linear(96, 8), "lm_head": nn.Linear(8, 128), "n": nn.LayerNorm(8)}
    )
    report = lk.quantize_(model, "nf4")
    assert [name for name, _ in report.fused] == ["a"]
    assert report.kept == [("b", lk.Reason.BLOCKS)]
    assert type(model["lm_head"]) is nn.Linear
    assert "1 of 2 linear layers packed" in str(report)
    with pytest.raises(ValueError, match="unknown format 'nf3', expected one of nf4, fp4"):
        lk.quantize_(model, "nf3")
    with pytest.raises(TypeError, match="got blocks"):
        lk.quantize_(nn.Sequential(nn.Linear(128, 8)), "nf4", blocks=64)


def test_quantize_changes_nothing_when_it_raises():
    model = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(128, 8, dtype=torch.float64)})
    lk.quantize_(model, "nf4", modules=["a"])
    other = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(128, 8)})
    with pytest.raises(ValueError, match="even block"):
        lk.quantize_(other, "nf4", block=0)
    assert all(type(layer) is nn.Linear for layer in other.values())


# -------------------------------------------------------------------------------------------------------- DoRA


def test_norm_of_a_packed_weight():
    weight = FORMATS["nf4"].quantize(torch.randn(37, 256))
    A, B = torch.randn(4, 256), torch.randn(37, 4)
    assert torch.allclose(norm(weight, A, B, 0.5), norm(weight.dequantize(), A, B, 0.5), rtol=1e-6)
    zero = torch.zeros_like(B)
    assert torch.equal(norm(weight, A, zero, 0.5), torch.linalg.vector_norm(weight.dequantize(), dim=1))
