"""The CUDA kernel of few rows by a packed weight, and its binding, emulated: values, orders of blocks, what is missed
when it is taken out."""

from __future__ import annotations

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from numerics import assert_as_accurate
from packed import decoded, random_packed, random_scaled, with_part

from lora_kernels.ops.lora_linear_packed import SPEC

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 1.7


@pytest.fixture(scope="module", autouse=True)
def native():
    """The module that the tests steer the launches with."""
    library = torch.library.Library("lora_kernels_emulated_packed", "DEF")
    arguments, returns = SPEC.schema.split(" -> ")
    library.define(f"{SPEC.name}{arguments[:-1]}, str schedule) -> {returns}")
    yield emulator.load_lora_linear_packed()
    library._destroy()


def make(m=3, n=40, k=192, rank=8, dtype=BF16, adapter=None, *, block=64, nested=True, bias=True):
    """(x, packed, lora_A, lora_B, bias); codes in no order, and scales of any sign."""
    packed = with_part(random_packed(n, k, block, nested).to(dtype=dtype), 2, torch.randn(16))
    if nested:
        packed = with_part(packed, 5, torch.zeros(()))
    lora_A = (torch.randn(rank, k) / k**0.5).to(adapter or dtype)
    lora_B = (torch.randn(n, rank) / rank**0.5).to(adapter or dtype)
    return torch.randn(m, k).to(dtype), packed, lora_A, lora_B, torch.randn(n).to(dtype) if bias else None


def run(x, packed, lora_A, lora_B, bias, seed=None, **options):
    emulator.load_lora_linear_packed().set_options({"resident_blocks": 3, **options})
    op = torch.ops.lora_kernels_emulated_packed.lora_linear_packed
    return op(x, *packed.args, lora_A, lora_B, bias, seed, SCALING, 0.0, "decode")


def unfused(x, weight, lora_A, lora_B, bias, s=None):
    """(y, s) by separate torch calls; y from ``s`` where one is given."""
    own = x @ lora_A.to(x.dtype).t()
    branch = (own if s is None else s) @ lora_B.to(x.dtype).t()
    return torch.nn.functional.linear(x, weight, bias) + branch * SCALING, own


def check(x, packed, lora_A, lora_B, bias, **options):
    """Against the decoded weight in float64; y and s are NaN before."""
    y, s = run(x, packed, lora_A, lora_B, bias, **options)
    assert y.dtype == s.dtype == x.dtype
    operands = x, decoded(packed), lora_A, lora_B, bias
    exact = unfused(*(None if t is None else t.double() for t in operands))
    for ours, theirs, true, name in zip((y, s), unfused(*operands), exact, "ys"):
        assert_as_accurate(ours, theirs, true, name)
    return y, s


CASES = covering_pairs(
    dtypes=[(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)], m=[1, 7, 8, 9, 16, 17, 32, 33, 64], n=[1, 16, 40],
    k=[128, 384, 2176, 4224], rank=[1, 16, 17, 64], block=[64, 128], nested=[False, True], bias=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values(native, case):
    """K: less than a warp each, no whole stage, two parts of s and a warp with a second stage, three and four."""
    dtype, adapter = case["dtypes"]
    sizes = {name: case[name] for name in ("m", "n", "k", "rank", "block", "nested", "bias")}
    check(*make(dtype=dtype, adapter=adapter, **sizes))
    row_tiles, columns = (-(-case["m"] // 32), 32) if case["m"] > 16 else (1, 16)
    per_row_tile = -(-case["rank"] // 16) * max(1, case["k"] // 1024) + -(-case["n"] // columns)
    assert native.last_launch()[1] == row_tiles * per_row_tile


@pytest.mark.parametrize("m", [1, 33])
def test_one_row_by_one_code(m):
    """Kills: a nibble, or a byte of a code, that is taken for another; a scale for another block's. Exact."""
    n, k = 16, 256
    packed = with_part(random_packed(n, k).to(dtype=BF16), 2, torch.arange(-8.0, 8.0) + 1 / 16)
    packed = with_part(packed, 1, 2.0 ** torch.randint(-3, 3, (n * k // 64,)))
    zero = torch.zeros(1, k, dtype=BF16), torch.zeros(n, 1, dtype=BF16)
    for column in torch.randint(k, (20,)).tolist():
        x = torch.zeros(m, k, dtype=BF16)
        x[-1, column] = 1
        y, _ = run(x, packed, *zero, None)
        assert torch.equal(y[-1], decoded(packed)[:, column])
        assert not y[:-1].any()


@pytest.mark.parametrize("m", [9, 40])
def test_the_same_bits_in_every_order(m):
    operands = make(m, 40, 2176, 24)
    first = run(*operands)
    for seed in range(5):
        results = run(*operands, resident_blocks=1 + seed, stall_release=seed % 2 == 1)
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_strided_rows_and_leading_sizes(native):
    x, *rest = make(6, 40, 192, 8)
    wide = torch.nn.functional.pad(x, (8, 8), value=float("nan"))[:, 8:-8]
    expected = run(x, *rest)
    for same in (wide, x.view(2, 3, 192), torch.cat([x.new_empty(1), x.flatten()])[1:].view(6, 192)):
        y, s = run(same, *rest)
        assert torch.equal(y.view(6, 40), expected[0])
        assert torch.equal(s.view(6, 8), expected[1])
        assert y.shape[:-1] == s.shape[:-1] == same.shape[:-1]


def test_the_launch_goes_to_the_callers_stream(native):
    native.set_stream(0x77)
    run(*make())
    assert native.last_launch()[3] == 0x77
    native.set_stream(0)


SLOW_TO_RELEASE = {"stall_release": True, "resident_blocks": 8}


def fails(operands, **options):
    try:
        y, s = run(*operands, **options)
    except RuntimeError as error:
        return str(error)
    expected = run(*operands)
    return not all(torch.equal(a, b) for a, b in zip((y, s), expected, strict=True))


@pytest.mark.parametrize("m", [9, 40])
def test_everything_that_orders_is_needed(native, m):
    """Kills: each barrier, wait, store and order between blocks, by the launch without it."""
    operands = make(m, 40, 4224, 24)
    run(*operands)
    report = native.last_launch()[2]
    assert len(report.barrier_sites) >= 4
    assert len(report.async_wait_sites) == 1
    assert len(report.global_store_sites) >= 3
    for name, sites in (("drop_async_wait", report.async_wait_sites), ("drop_global_store", report.global_store_sites)):
        for i, site in enumerate(sites):
            if "between_blocks.cuh" in site:
                continue  # a counter that nobody reads again is set back
            assert fails(operands, **{name: i}), (name, site)
    for i, site in enumerate(report.barrier_sites):
        assert any(fails(operands, drop_barrier=i, seed=seed, **SLOW_TO_RELEASE) for seed in range(20)), site
    for fault in ("drop_acquire", "drop_release_order", "early_release"):
        assert any(fails(operands, **{fault: True}, seed=seed, **SLOW_TO_RELEASE) for seed in range(5)), fault


@pytest.mark.parametrize(
    "change",
    [dict(m=65), dict(m=0), dict(k=96, block=32), dict(k=192, block=192), dict(rank=65), dict(dtype=FP32)],
    ids=str,
)
def test_what_is_refused(change):
    with pytest.raises(RuntimeError, match="the CUDA kernel serves"):
        run(*make(**change))


def test_dropout_and_packed_weights_off_16_bytes_are_refused():
    x, packed, *rest = make()
    with pytest.raises(RuntimeError, match="without dropout"):
        run(x, packed, *rest, seed=torch.tensor([1]))
    data = packed.parts[0].view(-1)
    with pytest.raises(RuntimeError, match="the CUDA kernel serves"):
        run(x, with_part(packed, 0, torch.cat([data.new_empty(1), data])[1:]), *rest)
    with pytest.raises(RuntimeError, match=r"x must be \[..., k\]"):
        run(x[:, :64], packed, *rest)
    with pytest.raises(RuntimeError, match="the CUDA kernel serves layout codes4"):
        run(x, random_scaled(40, 192).to(dtype=BF16), *rest)
