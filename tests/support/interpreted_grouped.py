"""The Triton kernels of rows in groups in Triton's interpreter. Run by test_triton_grouped.py. Not in bfloat16."""

from __future__ import annotations

import grouped
import pytest
import torch
from covering import case_id, covering_pairs
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels import grouped_lora_linear
from lora_kernels.triton_kernels.launching import Device

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
ONE_SM, MANY_SMS = 1, 10**6


@pytest.fixture
def pretend(monkeypatch):
    """pretend(target, sms): kernels are configured as for this GPU."""

    def choose(target, sms):
        for module in (grouped_lora_linear, _triton):
            monkeypatch.setattr(module, "device_of", lambda _: Device(target, sms))

    return choose


def fused(sizes, p):
    def function(x, weight, lora_A, lora_B, bias):
        with lk.use_backend("triton"):
            return lk.grouped_lora_linear(
                x, weight, lora_A, lora_B, grouped.offsets_of(sizes), bias, scaling=grouped.SCALING, dropout_p=p,
                training=True, seed=grouped.SEED,
            )  # fmt: skip

    return function


def check(sizes, dtype, adapter_dtype, p=0.0, *, shared=False, bias=None, in_columns=False):
    """Values and gradients against float64, per group."""
    problem = grouped.make_problem(sizes, dtype, adapter_dtype, shared=shared, bias=bias)
    if in_columns:
        problem["weight"] = problem["weight"].mT.contiguous().mT

    def looped(x, weight, lora_A, lora_B, bias):
        return grouped.looped(x, weight, lora_A, lora_B, bias, sizes, p)

    ours = grouped.run(problem, dtype, adapter_dtype, fused(sizes, p))
    exact = grouped.run(problem, FP64, FP64, looped)
    torch_code = grouped.run(problem, dtype, dtype, looped)
    for name, a, b, c in zip(("y", "dx", "dA", "dB"), ours, torch_code, exact):
        assert a.dtype == (adapter_dtype if name in ("dA", "dB") else dtype)
        assert_as_accurate(a, b, c, name)
        for g, count in enumerate(sizes.rows):
            assert name not in ("dA", "dB") or count == 0 or a[g].any()
    assert set(lk.stats()["served"]) == {
        ("grouped_lora_linear", "triton"), ("grouped_lora_linear_backward", "triton")
    }  # fmt: skip
    return ours


AXES = {
    "sizes": tuple(grouped.SIZES),
    "dtypes": ((FP16, FP16), (FP16, FP32), (FP32, FP32)),
    "p": (0.0, 0.3),
    "target": ("sm_80", "sm_90", "gfx942"),
    "sms": (ONE_SM, MANY_SMS),
    "shared": (False, True),
    "bias": (None, "one", "each"),
    "in_columns": (False, True),
}
CASES = covering_pairs(**AXES)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case, pretend):
    """Kills: a group's number, begin or end off by one; a step of one operand taken for another's; rows of nobody, or
    gradients of groups without rows, left as they were."""
    pretend(case["target"], case["sms"])
    options = {name: case[name] for name in ("shared", "bias", "in_columns")}
    check(case["sizes"], *case["dtypes"], case["p"], **options)


LARGE = grouped.Sizes((300, 0, 150), 160, 272, 24, behind=20)


@pytest.mark.parametrize(("target", "tile"), [("sm_80", (128, 128)), ("sm_90", (128, 128)), ("gfx942", (128, 128))])
def test_large_tiles(target, tile, pretend, monkeypatch):
    launched = []
    monkeypatch.setattr(
        grouped_lora_linear, "run_all",
        lambda launches, gpu, run=grouped_lora_linear.run_all: (launched.extend(launches), run(launches, gpu)),
    )  # fmt: skip
    pretend(target, ONE_SM)
    check(LARGE, FP16, FP16, 0.3)
    assert {(c["BLOCK_ROWS"], c["BLOCK_COLUMNS"]) for c in (launched[0].constants, launched[-3].constants)} == {tile}


def test_rows_of_groups_in_shares(pretend, monkeypatch):
    """Two groups of several shares each. Kills: shares of a group in another one's place."""
    pretend("sm_80", MANY_SMS)
    sizes = grouped.Sizes((300, 0, 520, 40), 80, 48, 16)
    rows = grouped_lora_linear.configs.grouped_reduce("sm_80", MANY_SMS, sizes.m, sizes.k, sizes.r, None, True).rows
    assert min(300, 520) > rows
    torch.manual_seed(1)
    first = check(sizes, FP16, FP16, 0.3)
    torch.manual_seed(1)
    again = grouped.run(grouped.make_problem(sizes, FP16, FP16), FP16, FP16, fused(sizes, 0.3))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_schedules_agree_bit_for_bit(pretend):
    pretend("sm_80", ONE_SM)
    t = {name: v if v is None else v.half() for name, v in grouped.make_problem(LARGE, FP16, FP16, bias="each").items()}
    args = (
        *(t[name] for name in ("x", "weight", "lora_A", "lora_B")),
        grouped.offsets_of(LARGE),
        t["bias"],
        None,
        1.7,
        0.0,
    )
    ticketed, split = (grouped_lora_linear.forward(schedule, *args) for schedule in ("ticketed", "split"))
    for a, b in zip(ticketed, split):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


ENDS = {
    "behind the last row": ((5, 1000, 2**31 - 1, 100), (5, 100, 100, 100)),
    "before the first row": ((-1000, 40, 90, 95), (0, 40, 90, 95)),
    "by less than a block": ((-5, 101, 100, 100), (0, 100, 100, 100)),
    "of nobody at all": ((-(2**31), -1, -1, 0), (0, 0, 0, 0)),
}


@pytest.mark.parametrize("sms", [ONE_SM, MANY_SMS])
@pytest.mark.parametrize(("given", "meant"), ENDS.values(), ids=ENDS)
def test_ends_outside_of_the_rows(given, meant, sms, pretend):
    """A GPU's offsets are looked at by nobody: what they say of rows that are not there is as if they said the first or
    the last. Kills: an end that is not clamped from below or above, in ``_first_row`` or in the blocks' numbers, where
    groups without rows would keep the gradients that memory holds, or rows outside of x would be read and written; ends
    read behind the last group's.
    """
    pretend("sm_80", sms)
    sizes = grouped.Sizes((0, 0, 0, 0), 40, 24, 4, behind=100)
    problem = {k: None if v is None else v.half() for k, v in grouped.make_problem(sizes, FP16, FP16).items()}
    x, weight, lora_A, lora_B, grad_y = (problem[name] for name in ("x", "weight", "lora_A", "lora_B", "grad_y"))

    def results(ends):
        offsets = torch.tensor(ends, dtype=torch.int32)
        common = weight, lora_A, lora_B, offsets
        y, s = grouped_lora_linear.forward("ticketed", x, *common, None, None, 1.7, 0.0)
        needs = True, True, True
        return y, s, *grouped_lora_linear.backward("ticketed", grad_y, x, s, *common, None, 1.7, 0.0, *needs)

    for name, a, b in zip(("y", "s", "dx", "dA", "dB"), results(given), results(meant)):
        assert not a.isnan().any(), name
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_B")])
def test_needs_input_grad_is_honoured(wanted, pretend):
    pretend("sm_80", MANY_SMS)
    sizes = grouped.Sizes((5, 0, 12), 48, 32, 8, behind=3)
    problem = grouped.make_problem(sizes, FP16, FP16)
    everything = dict(zip(("x", "lora_A", "lora_B"), grouped.run(problem, FP16, FP16, fused(sizes, 0.3))[1:]))
    t = {name: v if v is None else v.half().requires_grad_(name in wanted) for name, v in problem.items()}
    grad_y = t.pop("grad_y")
    fused(sizes, 0.3)(**t).backward(grad_y)
    for name, grad in everything.items():
        assert torch.equal(t[name].grad, grad) if name in wanted else t[name].grad is None


def test_why_and_refusals():
    sizes = grouped.SIZES[0]
    t = {name: v if v is None else v.half() for name, v in grouped.make_problem(sizes, FP16, FP16).items()}
    args = *(t[name] for name in ("x", "weight", "lora_A", "lora_B")), grouped.offsets_of(sizes)
    with lk.use_backend("triton"):
        assert lk.why("grouped_lora_linear", *args)[:2] == ("triton", "ticketed")
        with pytest.raises(RuntimeError, match="rank above 256"):
            lk.grouped_lora_linear(
                args[0], args[1], torch.zeros(3, 257, 40).half(), torch.zeros(3, 24, 257).half(), args[4]
            )
