"""The CUDA kernels of dequantize and their binding, emulated: bits, addresses, orders, missing stores and waits."""

from __future__ import annotations

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from packed import decoded, random_packed, with_part

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
    yield emulator.load_dequantize()
    library._destroy()


def make(n, k, block, dtype, *, nested=True):
    """Codes in no order, and scales of any sign: nothing may depend on either."""
    packed = with_part(random_packed(n, k, block, nested).to(dtype=dtype), 2, torch.randn(16))
    return with_part(packed, 5, torch.randn(())) if nested else with_part(packed, 1, torch.randn(n * k // block))


def run(packed, **options):
    emulator.load_dequantize().set_options({"resident_blocks": 3, **options})
    return torch.ops.lora_kernels_emulated_dequantize.dequantize(*packed.args, "")


def check(packed, **options):
    """Outputs are NaN before: an element that is not written is noticed."""
    weight = run(packed, **options)
    assert weight.dtype == packed.dtype
    assert weight.is_contiguous()
    assert torch.equal(weight.view(BITS[weight.dtype]), decoded(packed).view(BITS[weight.dtype]))


def off_16_bytes(data, by=1):
    return torch.cat([data.new_empty(by), data.view(-1)])[by:]


CASES = covering_pairs(
    dtype=[BF16, FP16, FP32],
    nested=[False, True],
    block=[2, 6, 32, 48, 64, 256, 4096],
    blocks=[1, 3, 7],  # of a row
    n=[1, 2, 5],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bits(native, case):
    n, k, block = case["n"], case["blocks"] * case["block"], case["block"]
    check(make(n, k, block, case["dtype"], nested=case["nested"]))
    assert native.last_launch()[0] == (block in (32, 64, 256, 4096))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("n", [31, 32, 33])
def test_the_last_warp_has_what_is_left(native, dtype, n):
    """Kills: a warp that reads or writes behind the last weight, a scale of the second level for the wrong 256."""
    check(make(n, 1024, 32, dtype))
    assert native.last_launch()[:2] == (True, -(-n * 1024 // 16384))


@pytest.mark.parametrize("by", [1, 2, 8])
def test_packed_weights_off_16_bytes(native, by):
    """A slice of a file's memory."""
    packed = make(3, 192, 64, BF16)
    check(with_part(packed, 0, off_16_bytes(packed.parts[0], by)))
    assert native.last_launch()[:2] == (False, 2)


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


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("weights", [2**31, 2**33])
def test_weights_behind_what_32_bits_count(native, aligned, weights):
    """Kills: an offset reckoned in 32 bits. Only the last two blocks of threads run: what is in front is not there."""
    n, k, block = (20, 1024, 64) if aligned else (3, 256, 64)
    packed = make(n, k, block, BF16, nested=False)
    out = torch.empty(n, k, dtype=BF16)
    addresses = (t.data_ptr() for t in (*packed.parts, out))
    native.dequantize_behind(weights // (16384 if aligned else 512), aligned, *addresses, n * k, block)
    assert native.last_launch()[:2] == (aligned, 2)
    assert torch.equal(out, decoded(packed))


@pytest.mark.parametrize("block", [64, 48])
def test_the_same_bits_in_every_order(block):
    packed = make(40, 960, block, BF16)
    for seed in range(4):
        check(packed, seed=seed, resident_blocks=1 + seed)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("block", [64, 48])
def test_a_missing_store_is_noticed(native, dtype, block):
    packed = make(4, 960, block, dtype)
    weight = run(packed)
    sites = len(native.last_launch()[2].global_store_sites)
    assert sites >= 1
    for site in range(sites):
        assert not torch.equal(run(packed, drop_global_store=site), weight)


def test_a_missing_wait_is_noticed(native):
    packed = make(4, 960, 64, BF16)
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
        (dict(layout="int8_rows"), "layout must be codes4"),
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
