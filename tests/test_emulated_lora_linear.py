"""The CUDA kernel of lora_linear, its source compiled for the host and run by the emulator (csrc/emu)."""

from __future__ import annotations

import emulator
import pytest
import torch
from covering import covering_pairs
from numerics import assert_as_accurate

from lora_kernels import philox

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEED = -987654321012345
EVERY_SM_BUSY = 1  # sms=1: any problem of more than 64 rows gets the large tile


def operands(m, n, k, rank, dtype, *, bias=False):
    x = torch.randn(m, k).to(dtype)
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    lora_A = (torch.randn(rank, k) / k**0.5).to(dtype)
    lora_B = (torch.randn(n, rank) / rank**0.5).to(dtype)  # the branch must not drown the base product
    return x, weight, lora_A, lora_B, torch.randn(n).to(dtype) if bias else None


def run(name, x, weight, lora_A, lora_B, bias, *, scaling=1.7, p=0.0, sms=EVERY_SM_BUSY, **options):
    """(y, s, report of the emulator); the counters must be zero again."""
    seed = SEED if p > 0 else None
    arrays = [None if t is None else emulator.bits(t) for t in (x, weight, lora_A, lora_B, bias)]
    options = {"seed": 0, "resident_blocks": 3, **options}
    y, s, counters, report = emulator.load().lora_linear(name, *arrays, scaling, p, seed, sms, options)
    assert not counters.any()
    return emulator.values(y, x.dtype), emulator.values(s, x.dtype), report


def unfused(x, weight, lora_A, lora_B, bias, scaling, keep, scale):
    """What separate torch calls compute, in the dtype of the arguments."""
    dropped = x if keep is None else torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype))
    s = dropped @ lora_A.t()
    return torch.nn.functional.linear(x, weight, bias) + (s @ lora_B.t()) * scaling, s


def check(name, args, *, scaling=1.7, p=0.0, **options):
    """Run and compare with float64 and with torch's separate calls; returns (y, s, report)."""
    x = args[0]
    keep = philox.keep_mask(torch.tensor([SEED]), *x.shape, p) if p > 0 else None
    scale = philox.keep_scale(p)
    exact_args = [None if t is None else t.double() for t in args]
    exact_y, exact_s = unfused(*exact_args, scaling, keep, scale)
    torch_y, torch_s = unfused(*args, scaling, keep, scale)
    y, s, report = run(name, *args, scaling=scaling, p=p, **options)
    assert_as_accurate(s, torch_s, exact_s, "s")
    assert_as_accurate(y, torch_y, exact_y, "y")
    return y, s, report


# Shapes that make the choice: (tile's rows, aligned, rank tile) -> m, n, k, rank, sms.
SHAPES = {
    (128, True, 16): dict(m=(65, 150, 256), n=(8, 136), k=(24, 264), rank=(8, 16), sms=(EVERY_SM_BUSY,)),
    (128, True, 64): dict(m=(65, 150, 256), n=(8, 136), k=(24, 264), rank=(24, 64, 256), sms=(EVERY_SM_BUSY,)),
    (64, True, 16): dict(m=(1, 64, 150), n=(8, 72), k=(24, 264), rank=(8, 16), sms=(1000,)),
    (64, True, 64): dict(m=(1, 64, 150), n=(8, 72), k=(24, 264), rank=(24, 64, 256), sms=(1000,)),
    (64, False, 16): dict(m=(1, 64, 150), n=(1, 75), k=(1, 70, 263), rank=(1, 7, 16), sms=(1,)),
    (64, False, 64): dict(m=(1, 64, 150), n=(1, 75), k=(1, 70, 263), rank=(17, 64, 255), sms=(1,)),
}
CASES = [
    (variant, case)
    for variant, shapes in SHAPES.items()
    for case in covering_pairs(**shapes, name=("bf16", "fp16"), p=(0.0, 0.3), bias=(False, True))
]


@pytest.mark.parametrize(
    ("variant", "case"),
    CASES,
    ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()) if isinstance(c, dict) else str(c),
)
def test_forward_is_as_accurate_as_torch(variant, case):
    m, n, k, rank = case["m"], case["n"], case["k"], case["rank"]
    rows, aligned, rank_tile = variant
    chosen = emulator.load().lora_linear_config(m, n, rank, aligned, case["sms"], 99 << 10)
    assert (chosen["rows"], chosen["rank_tile"]) == (rows, rank_tile)
    assert (n % 8 == k % 8 == rank % 8 == 0) == aligned
    args = operands(m, n, k, rank, DTYPES[case["name"]], bias=case["bias"])
    check(case["name"], args, p=case["p"], sms=case["sms"])


def inside(t, columns):
    """``t`` as part of a wider matrix of NaN."""
    wide = torch.full((t.shape[0], columns), float("nan"), dtype=t.dtype)
    wide[:, 16 : 16 + t.shape[1]] = t
    return wide[:, 16 : 16 + t.shape[1]]


@pytest.mark.parametrize("columns", [101, 104], ids=["unaligned", "aligned"])
def test_strided_rows(columns):
    x, weight, lora_A, lora_B, _ = operands(140, 64, 40, 8, torch.bfloat16)
    check("bf16", (*(inside(t, columns) for t in (x, weight, lora_A, lora_B)), None))


def test_the_comparison_sees_a_missing_base_product():
    x, weight, lora_A, lora_B, _ = operands(256, 136, 272, 200, torch.bfloat16)
    exact, _ = unfused(x.double(), weight.double(), lora_A.double(), lora_B.double(), None, 1.7, None, 1.0)
    torch_y, _ = unfused(x, weight, lora_A, lora_B, None, 1.7, None, 1.0)
    branch, _ = unfused(x, torch.zeros_like(weight), lora_A, lora_B, None, 1.7, None, 1.0)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(branch, torch_y, exact)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_order_of_blocks_and_warps_does_not_change_a_bit(p):
    args = operands(150, 200, 136, 24, torch.bfloat16)
    first = run("bf16", *args, p=p, seed=1, resident_blocks=1)
    for seed, resident in ((2, 2), (3, 5), (4, 100)):
        again = run("bf16", *args, p=p, seed=seed, resident_blocks=resident, stall_release=seed % 2 == 0)
        for ours, reference in zip(again[:2], first[:2], strict=True):
            assert torch.equal(ours.view(torch.int16), reference.view(torch.int16))


def test_everything_dropped_gives_the_base_layer():
    args = operands(65, 64, 64, 16, torch.bfloat16)
    y, s, _ = run("bf16", *args, p=1.0)
    assert not s.float().any()
    base, _, _ = run("bf16", *args[:3], torch.zeros_like(args[3]), None)
    assert torch.equal(y.view(torch.int16), base.view(torch.int16))


def test_nan_in_a_row_stays_in_that_row():
    x, *rest = operands(130, 72, 40, 16, torch.bfloat16)
    x[129] = float("nan")
    y, _, _ = run("bf16", x, *rest)
    assert y[129].isnan().all()
    assert not y[:129].isnan().any()


def test_no_redundant_multiply_adds():
    m, n, k, rank = 256, 256, 128, 16
    *_, report = run("bf16", *operands(m, n, k, rank, torch.bfloat16))
    assert report.multiply_adds * 16 * 8 * 16 == m * k * (n + rank) + m * n * rank


# What each mutation breaks must be noticed: by the emulator's checks or by the comparison of results.


def survives(**fault):
    """Whether a faulty kernel still passes every check under a few schedules."""
    try:
        for seed in range(3):
            run_mutated(seed, **fault)
    except (AssertionError, RuntimeError):
        return False
    return True


def run_mutated(seed=0, **fault):
    """One launch that needs every barrier; returns the emulator's report.

    There are two batches of ranks, dropout, several blocks of rows, and nine k-tiles for four stages: the last one lies
    where the result is staged.
    """
    torch.manual_seed(0)
    args = operands(256, 136, 272, 200, torch.bfloat16)
    return check("bf16", args, p=0.3, seed=seed, resident_blocks=4, stall_release=True, **fault)[2]


def test_the_unchanged_kernel_survives():
    assert survives()


def test_every_missing_barrier_is_caught():
    sites = run_mutated().barrier_sites
    assert len(sites) >= 10
    assert not [site for i, site in enumerate(sites) if survives(drop_barrier=i)]


def test_every_missing_wait_for_copies_is_caught():
    sites = run_mutated().async_wait_sites
    assert len(sites) >= 2
    assert not [site for i, site in enumerate(sites) if survives(drop_async_wait=i)]


@pytest.mark.parametrize("fault", ["drop_acquire", "drop_release_order"])
def test_a_missing_order_between_blocks_is_caught(fault):
    assert not survives(**{fault: True})
