"""The CUDA kernels of ``multi_lora_linear``'s branch, each half by itself, and their binding, run by the emulator."""

from __future__ import annotations

import pytest
import torch
from covering import case_id, covering_pairs
from emulated import DTYPES
from emulated_multi import FACTORS, names, steered
from many_adapters import scattered
from numerics import assert_as_accurate

from lora_kernels.functional.multi_branch import row_order

MANY = 1000  # SMs: more than there are tiles
RANKS = {"mixed": (8, 3, 0, 24, 1), "ragged": (5, 7, 2), "wide": (72, 16, 65), "equal": (16, 16)}
CASES = covering_pairs(
    rows=(1, 17, 65, 140), ranks=tuple(RANKS), sizes=((72, 136), (264, 64)), name=tuple(DTYPES), sms=(1, MANY),
    float_adapters=(False, True), ordered=(False, True), integer=(torch.int32, torch.int64), in_columns=(False, True),
)  # fmt: skip


def shrink(x, lora_A, ids, ranks, order, **options):
    native = steered(**options)
    s = torch.ops.lora_kernels_emulated_multi.multi_lora_shrink(x, lora_A, ids, ranks, *order, "auto")
    return s, names(native.launches())


def expand_(y, s, lora_B, ids, ranks, scalings, order, scaling=0.5, **options):
    native = steered(**options)
    op = torch.ops.lora_kernels_emulated_multi.multi_lora_expand_
    op(y, s, lora_B, ids, ranks, scalings, scaling, *order, "auto")
    return names(native.launches())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_halves(case):
    """Kills: a slice of s or y taken for the whole; a look-up although the order is known, or none where it is not; a
    row of no adapter written to; ranks that are not an adapter's, which hold NaN.
    """
    rows, own, (k, n), dtype = case["rows"], RANKS[case["ranks"]], case["sizes"], DTYPES[case["name"]]
    adapter_dtype = torch.float32 if case["float_adapters"] else dtype
    most, count = max(own), len(own)
    ids = torch.tensor(scattered(rows, count), dtype=case["integer"])
    ranks, factors = torch.tensor(own, dtype=case["integer"]), torch.tensor(FACTORS[:count])
    lora_A = (torch.randn(count, most, k) / k**0.5).to(adapter_dtype)
    lora_B = (torch.randn(count, n, most) / most**0.5).to(adapter_dtype)
    for slot, rank in enumerate(own):
        lora_A[slot, rank:], lora_B[slot, :, rank:] = torch.nan, torch.nan
    order = tuple(row_order(ids, count)) if case["ordered"] else (None, None)
    looks_up = [] if case["ordered"] else ["order"]

    x = torch.randn(rows, k).to(dtype)
    s, launched = shrink(x, lora_A, ids, ranks, order, sms=case["sms"])
    assert launched == [*looks_up, "shrink"]
    wide_s = torch.full((rows, most + 3), torch.nan, dtype=dtype)
    wide_s[:, :most] = s
    wide_y = torch.randn(rows, n + 16).to(dtype)
    y = wide_y[:, 8 : 8 + n] if case["in_columns"] else wide_y[:, :n].contiguous()
    base, before = y.clone(), wide_y.clone()
    given = wide_s[:, :most] if case["in_columns"] else s
    assert expand_(y, given, lora_B, ids, ranks, factors, order, sms=case["sms"]) == [*looks_up, "expand"]

    def loop(dtype):
        inner, out = torch.zeros(rows, most, dtype=dtype), base.to(dtype)
        for m, slot in enumerate(ids.tolist()):
            if slot >= 0:
                r = own[slot]
                inner[m, :r] = x[m].to(dtype) @ lora_A[slot, :r].to(dtype).t()
                out[m] += 0.5 * FACTORS[slot] * (s[m, :r].to(dtype) @ lora_B[slot, :, :r].to(dtype).t())
        return inner, out

    # tf32 keeps as many bits of an operand as fp16.
    rounding = dtype if dtype != torch.float32 else torch.float16
    for name, ours, plain, exact in zip(("s", "y"), (s, y), loop(rounding), loop(torch.float64)):
        assert_as_accurate(ours.to(rounding), plain, exact, name)
    assert torch.equal(y[ids < 0], base[ids < 0])
    if case["in_columns"]:
        assert torch.equal(wide_y[:, :8], before[:, :8])
        assert torch.equal(wide_y[:, 8 + n :], before[:, 8 + n :])


def test_the_order_is_the_one_that_is_given():
    x, lora_A = torch.randn(70, 64).bfloat16(), torch.randn(2, 8, 64).bfloat16()
    ids = torch.zeros(70, dtype=torch.int32)
    theirs, _ = shrink(x, lora_A, ids, None, row_order(torch.ones_like(ids), 2))
    other, _ = shrink(x, lora_A, ids + 1, None, (None, None))
    assert torch.equal(theirs, other)


def test_no_rows():
    lora_A, lora_B, ids = torch.randn(2, 8, 64), torch.randn(2, 64, 8), torch.zeros(0, dtype=torch.int32)
    s, launched = shrink(torch.zeros(0, 64), lora_A, ids, None, (None, None))
    assert s.shape == (0, 8)
    assert launched == expand_(torch.zeros(0, 64), s, lora_B, ids, None, None, (None, None)) == []


@pytest.mark.parametrize(
    ("message", "half", "changed"),
    [
        ("chunks of 16 bytes", shrink, {"x": torch.ones(3, 6), "lora_A": torch.ones(2, 4, 6)}),
        ("bfloat16, float16", shrink, {"x": torch.ones(3, 8).double(), "lora_A": torch.ones(2, 4, 8).double()}),
        (r"order must be int32 \[rows\]", shrink, {"order": (torch.zeros(2).int(), torch.zeros(2).int())}),
        (r"ends must be int32 \[adapters\]", shrink, {"order": (torch.zeros(3).int(), torch.zeros(4).int()[::2])}),
        ("y must be a matrix in memory", expand_, {"y": torch.ones(3, 9)[:, 1:]}),
        ("s must be", expand_, {"s": torch.ones(3, 5)}),
    ],
)
def test_operands_that_are_refused(message, half, changed):
    ids = torch.zeros(3, dtype=torch.int32)
    given = {"adapter_ids": ids, "ranks": None, "order": (None, None)}
    if half is shrink:
        x, lora_A, *rest = ({"x": torch.ones(3, 8), "lora_A": torch.ones(2, 4, 8)} | given | changed).values()
        with pytest.raises(RuntimeError, match=message):
            shrink(x, lora_A, *rest)
    else:
        base = {"y": torch.ones(3, 8), "s": torch.ones(3, 4), "lora_B": torch.ones(2, 8, 4)}
        y, s, lora_B, ids, ranks, order = (base | given | changed).values()
        with pytest.raises(RuntimeError, match=message):
            expand_(y, s, lora_B, ids, ranks, None, order)
