"""The CUDA kernels of dequantize and their binding, emulated: bits, addresses, orders, missing stores and waits."""

from __future__ import annotations

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from packed import decoded, random_packed, random_scaled, with_part

from lora_kernels.formats.codes4 import scales as scales_of
from lora_kernels.ops.dequantize import SPEC

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BITS = {BF16: torch.int16, FP16: torch.int16, FP32: torch.int32}


@pytest.fixture(scope="module", autouse=True)
def native():
    """The module that the tests steer the launches with."""
    library = torch.library.Library("lora_kernels_emulated_dequantize", "DEF")
    arguments, returns = SPEC.schema.split(" -> ")
    library.define(f"{SPEC.name}{arguments[:-1]}, str schedule) -> {returns}")
    library.define(f"decode_runs{arguments[:-1]}, int begin, int end, bool columns) -> {returns}")
    yield emulator.load_dequantize()
    library._destroy()


def make(n, k, block, dtype, *, nested=True, layout="codes4"):
    """Codes in no order, and scales of any sign: nothing may depend on either."""
    packed = with_part(random_packed(n, k, block, nested, layout=layout).to(dtype=dtype), 2, torch.randn(16))
    return with_part(packed, 5, torch.randn(())) if nested else with_part(packed, 1, torch.randn(n * k // block))


def make_scaled(n, k, layout, block, rows, dtype):
    """Scales of any sign."""
    packed = random_scaled(n, k, layout, block, rows, special=True).to(dtype=dtype)
    return with_part(packed, 1, torch.randn_like(packed.parts[1]))


def run(packed, **options):
    emulator.load_dequantize().set_options({"resident_blocks": 3, **options})
    return torch.ops.lora_kernels_emulated_dequantize.dequantize(*packed.args, "")


def check(packed, **options):
    """Outputs are NaN before: an element that is not written is noticed."""
    weight = run(packed, **options)
    assert weight.dtype == packed.dtype
    assert weight.is_contiguous()
    bits, expected = (t.view(BITS[t.dtype]) for t in (weight, decoded(packed)))
    is_number = ~decoded(packed).isnan()
    assert torch.equal(weight.isnan(), ~is_number)
    assert torch.equal(bits[is_number], expected[is_number])


def off_16_bytes(data, by=1):
    return torch.cat([data.new_empty(by), data.view(-1)])[by:]


CASES = covering_pairs(
    layout=["codes4", "codes4_low"],
    dtype=[BF16, FP16, FP32],
    nested=[False, True],
    block=[2, 6, 16, 32, 48, 64, 256, 4096],
    blocks=[1, 3, 7],  # of a row
    n=[1, 2, 5],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bits(native, case):
    n, k, block = case["n"], case["blocks"] * case["block"], case["block"]
    check(make(n, k, block, case["dtype"], nested=case["nested"], layout=case["layout"]))
    assert native.last_launch()[0] == (block in (16, 32, 64, 256, 4096))


SCALED = covering_pairs(
    layout=["int8", "e4m3"],
    dtype=[BF16, FP16, FP32],
    rows=["each", "squares", "all"],
    block=[None, 1, 8, 12, 128],
    n=[1, 2, 131, 300],
    k=[1, 8, 100, 136, 1032],
)
SCALED.append({"layout": "int8", "dtype": BF16, "rows": "squares", "block": 12, "n": 131, "k": 8})


@pytest.mark.parametrize("case", SCALED, ids=case_id)
def test_bits_of_eight_bit_layouts(native, case):
    """Kills: a scale of another row, column or square; one that a row's end has not; a lane that does not go on to the
    next row, or by one only.
    """
    n, k, block = case["n"], case["k"], case["block"] or case["k"]
    check(make_scaled(n, k, case["layout"], block, case["rows"], case["dtype"]))
    squares_fit = case["rows"] != "squares" or block >= n or block in (1, 8, 128)
    assert native.last_launch()[0] == (k % 8 == 0 and (block >= k or block in (8, 128)) and squares_fit)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
def test_every_number_of_eight_bits(layout, dtype, aligned):
    """Kills: a sign, an exponent or a subnormal number that is taken for another; a NaN for 480. In every byte of a
    word.
    """
    data = torch.stack([torch.arange(256, dtype=torch.uint8).roll(i) for i in range(4)])
    packed = with_part(make_scaled(4, 256, layout, 256, "each", dtype), 0, data)
    check(packed if aligned else with_part(packed, 0, off_16_bytes(data)))
    whole = with_part(packed, 1, torch.tensor([[1.0], [-1.0], [2.0**-120], [0.0]]))
    check(whole if aligned else with_part(whole, 0, off_16_bytes(data)))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("n", [31, 32, 33])
def test_the_last_warp_has_what_is_left(native, dtype, n):
    """Kills: a warp that reads or writes behind the last weight, a scale of the second level for the wrong 256."""
    check(make(n, 1024, 32, dtype))
    assert native.last_launch()[:2] == (True, -(-n * 1024 // 16384))
    check(make(n, 1040, 16, dtype))  # whose last 16 packed bytes are eight
    check(make_scaled(n, 1032, "e4m3", 8, "each", dtype))
    assert native.last_launch()[:2] == (True, -(-n * 1032 // 8192))


def make_any(n, k, layout, block, dtype):
    if layout.startswith("codes4"):
        return make(n, k, block, dtype, layout=layout)
    return make_scaled(n, k, layout, block, "each", dtype)


RUNS = covering_pairs(
    layout=["codes4", "codes4_low", "int8", "e4m3"],
    dtype=[BF16, FP16, FP32],
    columns=[False, True],
    where=[(0, 2), (1, 2), (1, 3), (2, 4)],  # quarters of the weight
    block=[16, 48, 64, 2048, 4096],
    k=[4 * 2048, 4 * 4096, 4 * 768],
)  # fmt: skip


@pytest.mark.parametrize("case", [case for case in RUNS if case["k"] % case["block"] == 0], ids=case_id)
def test_bits_of_some_rows_or_columns(native, case):
    """Kills: a scale or a packed byte of another row or column, a result that is written where the whole weight's
    would be, a run that is taken to be longer than it is."""
    k, columns, (begin, end) = case["k"], case["columns"], case["where"]
    packed = make_any(8, k, case["layout"], case["block"], case["dtype"])
    quarter = k // 4 if columns else 2
    native.set_options({"resident_blocks": 3})
    begin, end = begin * quarter, end * quarter
    got = torch.ops.lora_kernels_emulated_dequantize.decode_runs(*packed.args, begin, end, columns)
    whole = decoded(packed)
    expected = whole[:, begin:end] if columns else whole[begin:end]
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert native.last_launch()[0] == (case["block"] != 48)


@pytest.mark.parametrize("layout", ["codes4", "int8"])
@pytest.mark.parametrize(("k", "begin", "end"), [(96, 32, 64), (80, 32, 64), (96, 16, 64), (160, 0, 100), (96, 96, 96)])
def test_columns_between_chunks(native, layout, k, begin, end):
    """Those that do not begin at 16 packed bytes, or do so in the first row only, are read byte by byte."""
    packed = make_any(5, k, layout, 16, BF16)
    got = torch.ops.lora_kernels_emulated_dequantize.decode_runs(*packed.args, begin, end, True)
    assert torch.equal(got.nan_to_num(), decoded(packed)[:, begin:end].nan_to_num())
    step = 32 if layout == "codes4" else 16
    assert native.last_launch()[0] == (k % step == 0 and begin % step == 0 and (end - begin) % 8 == 0)


@pytest.mark.parametrize("by", [1, 2, 8])
@pytest.mark.parametrize("layout", ["codes4", "int8"])
def test_packed_weights_off_16_bytes(native, layout, by):
    """A slice of a file's memory."""
    packed = make(3, 192, 64, BF16) if layout == "codes4" else make_scaled(3, 192, layout, 64, "each", BF16)
    check(with_part(packed, 0, off_16_bytes(packed.parts[0], by)))
    assert native.last_launch()[:2] == (False, 2 if layout == "codes4" else 3)


@pytest.mark.parametrize(("dtype", "largest"), [(FP16, 1e5), (FP16, 1e-6), (BF16, 3e38), (BF16, 1e-39), (FP32, 1e-39)])
def test_weights_at_the_ends_of_the_range(dtype, largest):
    """Kills: a rounding that does not know of subnormal numbers or infinity."""
    packed = make(4, 256, 64, dtype, nested=False)
    check(with_part(packed, 1, packed.parts[1] * largest))


def test_scales_of_two_levels_are_rounded_twice():
    """Kills: a fused multiply-add; what it would give is in float64, whose one rounding hides no other here."""
    packed = make(64, 256, 32, FP32)
    _, scales, _, scales2, code2, offset = packed.parts
    fused = code2[scales.long()].double() * scales2.repeat_interleave(256).double() + offset.double()
    assert (fused.float() != scales_of(packed.parts)).float().mean() > 0.01
    check(packed)


@pytest.mark.parametrize("layout", ["codes4", "e4m3"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("weights", [2**31, 2**33])
def test_weights_behind_what_32_bits_count(native, layout, aligned, weights):
    """Kills: an offset reckoned in 32 bits. Only the last two blocks of threads run: what is in front is not there."""
    k, per_block = (1024, 16384) if aligned else (256, 512)
    per_block //= 1 if layout == "codes4" else 2
    n = per_block // k + 1
    make_one = make if layout == "codes4" else lambda *a, nested: make_scaled(*a[:2], layout, a[2], "each", a[3])
    packed = make_one(n, k, 64, BF16, nested=False)
    out, code = torch.empty(n, k, dtype=BF16), torch.empty(16) if layout == "e4m3" else packed.parts[2]
    addresses = (t.data_ptr() for t in (*packed.parts[:2], code, out))
    native.dequantize_behind(weights // k, layout, aligned, *addresses, n, k, 64)
    assert native.last_launch()[:2] == (aligned, 2)
    assert torch.equal(out.isnan(), decoded(packed).isnan())
    assert torch.equal(out.nan_to_num(), decoded(packed).nan_to_num())


@pytest.mark.parametrize("block", [64, 48])
def test_the_same_bits_in_every_order(block):
    packed = make(40, 960, block, BF16)
    for seed in range(4):
        check(packed, seed=seed, resident_blocks=1 + seed)
        check(make_scaled(40, 960, "int8", 3 * block, "each", FP16), seed=seed, resident_blocks=1 + seed)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("block", [64, 48])
@pytest.mark.parametrize("layout", ["codes4", "int8"])
def test_a_missing_store_is_noticed(native, layout, dtype, block):
    packed = make(4, 960, block, dtype) if layout == "codes4" else make_scaled(4, 960, layout, block, "each", dtype)
    weight = run(packed)
    sites = len(native.last_launch()[2].global_store_sites)
    assert sites >= 1
    for site in range(sites):
        assert not torch.equal(run(packed, drop_global_store=site), weight)


@pytest.mark.parametrize("layout", ["codes4", "int8"])
def test_a_missing_wait_is_noticed(native, layout):
    packed = make(4, 960, 64, BF16) if layout == "codes4" else make_scaled(4, 960, layout, 64, "each", BF16)
    run(packed)
    assert len(native.last_launch()[2].async_wait_sites) == 1
    with pytest.raises(RuntimeError, match="is under way"):
        run(packed, drop_async_wait=0)


def test_no_weights(native):
    check(make(0, 128, 64, BF16))
    assert native.last_launch()[1] == 0


def test_the_launch_goes_to_the_callers_stream(native):
    native.set_stream(0x77)
    run(make(1, 64, 64, BF16, nested=False))
    assert native.last_launch()[3] == 0x77
    native.set_stream(0)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda data: data[:-1], r"data must be contiguous uint8 \[n \* k / 2\]"),
        (0, lambda data: data.view(torch.int8), "data must be"),
        (0, lambda data: data.repeat_interleave(2)[::2], "data must be"),
        (0, lambda data: data.to("meta"), "must be on one device"),
        (1, lambda scales: scales.float(), "scales must be"),
        (2, lambda code: code[:8], "code must be"),
        (3, lambda scales2: scales2.repeat(2), "scales2 must be"),
        (4, lambda code2: code2.double(), "code2 must be"),
        (5, lambda offset: offset.repeat(2), "offset must be"),
    ],
)
def test_parts_that_do_not_fit(index, change, message):
    packed = make(4, 128, 64, BF16)
    with pytest.raises(RuntimeError, match=message):
        run(with_part(packed, index, change(packed.parts[index])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(parts=5), "has 3 parts, or 6"),
        (dict(parts=3), "scales must be"),
        (dict(layout="int8_rows"), "layout is not known: int8_rows"),
        (dict(n=2**31), "n and k must be sizes of 32 bits"),
        (dict(n=2**31 + 4, k=-(2**33)), "n and k must be sizes of 32 bits"),
        (dict(block=0), "block must be even, and k a multiple of it"),
        (dict(block=48), "block must be even, and k a multiple of it"),
        (dict(k=123, block=41), "block must be even, and k a multiple of it"),
        (dict(dtype=torch.float64), "dtype must be float32, bfloat16 or float16"),
    ],
    ids=str,
)
def test_what_else_is_refused(change, message):
    named = dict(zip(("parts", "layout", "n", "k", "block", "dtype"), make(4, 128, 64, BF16).args, strict=True))
    args = {**named, **change, "parts": named["parts"][: change.get("parts", 6)]}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lora_kernels_emulated_dequantize.dequantize(*args.values(), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(parts=1), "has 2 parts"),
        (dict(block=0), "block must be at least 1"),
        (dict(block=48), "with a column for each block of columns"),
        (dict(n=5), r"data must be contiguous uint8 \[n, k\]"),
        (dict(data=lambda data: data.view(torch.int8)), "data must be"),
        (dict(data=lambda data: data.repeat_interleave(2, 1)[:, ::2]), "data must be"),
        (dict(scales=lambda scales: scales.flatten()), "scales must have a row"),
        (dict(scales=lambda scales: scales[:3]), "scales must have a row"),
        (dict(scales=lambda scales: scales.double()), "scales must be contiguous float32"),
        (dict(scales=lambda scales: scales.t().contiguous().t()), "scales must be contiguous float32"),
        (dict(data=lambda data: data.to("meta")), "must be on one device"),
    ],
    ids=[
        "one part",
        "no block",
        "blocks that do not divide",
        "rows",
        "int8",
        "strided",
        "flat",
        "few rows of scales",
        "float64",
        "scales in columns",
        "devices",
    ],
)
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
def test_eight_bit_parts_that_do_not_fit(layout, change, message):
    parts, _, n, k, block, dtype = random_scaled(4, 256, layout, 64).to(dtype=BF16).args
    parts = [change.get(name, lambda part: part)(part) for name, part in zip(("data", "scales"), parts)]
    parts = parts[: change.get("parts", 2)]
    sizes = change.get("n", n), k, change.get("block", block)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lora_kernels_emulated_dequantize.dequantize(parts, layout, *sizes, dtype, "")
