"""The Triton kernels of rows that have adapters in pools in Triton's interpreter. Run by test_triton_multi.py. Not in
bfloat16.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from covering import case_id, covering_pairs
from many_adapters import BATCHES, SCALINGS, SEED, Batch, looped, make_problem, scattered
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels import configs, multi_lora_linear
from lora_kernels.triton_kernels.launching import Device

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
ONE_SM, MANY_SMS = 1, 10**6


@pytest.fixture
def pretend(monkeypatch):
    """pretend(target, sms): kernels are configured as for this GPU."""

    def choose(target, sms):
        for module in (multi_lora_linear, _triton):
            monkeypatch.setattr(module, "device_of", lambda _: Device(target, sms))

    return choose


def run(problem, dtype, adapter_dtype, function):
    """[y, dx, dA, dB] of ``function`` in these dtypes."""
    cast = {k: None if v is None else v.to(adapter_dtype if "lora" in k else dtype) for k, v in problem.items()}
    grad_y = cast.pop("grad_y")
    leaves = [cast[k].requires_grad_() for k in ("x", "lora_A", "lora_B")]
    y = function(**cast)
    grads = torch.autograd.grad(y, leaves, grad_y, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


def fused(batch, p, wide=True):
    integer = torch.int64 if wide else torch.int32

    def function(x, weight, lora_A, lora_B, bias):
        with lk.use_backend("triton"):
            return lk.multi_lora_linear(
                x, weight, lora_A, lora_B, batch.ids_tensor(integer), bias,
                scaling=torch.tensor(SCALINGS[: len(batch.ranks)]), ranks=torch.tensor(batch.ranks, dtype=integer),
                dropout_p=p, training=True, seed=SEED,
            )  # fmt: skip

    return function


def check(batch, dtype, adapter_dtype, p=0.0, *, bias=False, wide=True):
    """Values and gradients against float64."""
    problem = make_problem(batch, dtype, adapter_dtype, bias)

    def torch_code(**tensors):
        return looped(**tensors, batch=batch, p=p)

    ours = run(problem, dtype, adapter_dtype, fused(batch, p, wide))
    exact, unfused = run(problem, FP64, FP64, torch_code), run(problem, dtype, dtype, torch_code)
    for name, a, b, c in zip(("y", "dx", "dA", "dB"), ours, unfused, exact):
        assert a.dtype == (adapter_dtype if name in ("dA", "dB") else dtype)
        assert_as_accurate(a, b, c, name)
    for slot, rank in enumerate(batch.ranks):
        rows = rank > 0 and slot in batch.ids
        assert rows == bool(ours[2][slot].any())
        assert not ours[2][slot, rank:].any()
        assert not ours[3][slot, :, rank:].any()
    served = {("multi_lora_linear", "triton"), ("multi_lora_linear_backward", "triton")}
    assert set(lk.stats()["served"]) == served
    return ours


AXES = {
    "batch": (*BATCHES, Batch(scattered(150, 5), (16, 8, 0, 24, 3), 72, 136)),
    "dtypes": ((FP16, FP16), (FP16, FP32), (FP32, FP32)),
    "p": (0.0, 0.3),
    "target": ("sm_80", "sm_90", "gfx942"),
    "sms": (ONE_SM, MANY_SMS),
    "bias": (False, True),
    "wide": (False, True),
}


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_values_and_gradients(case, pretend):
    """Kills: a row's adapter, rank or factor taken of another; ranks that the adapter does not use (they hold NaN); a
    mask of the row's place in the order; gradients of adapters without rows left as they were."""
    pretend(case["target"], case["sms"])
    check(case["batch"], *case["dtypes"], case["p"], bias=case["bias"], wide=case["wide"])


@pytest.mark.parametrize("few", [0, 1000])
def test_a_row_has_the_same_bits_whatever_others_have(few, pretend, monkeypatch):
    """Kills: rows without an adapter to which zeros are added; tiles that mix adapters. By row and by adapter."""
    monkeypatch.setattr(configs, "FEW_ROWS", few)
    pretend("sm_80", MANY_SMS)
    m, ranks, n, k = 40, (8, 8, 8), 40, 48
    ids = scattered(m, 3)
    problem = make_problem(Batch(ids, ranks, k, n), FP16, FP16, True)
    cast = {name: t.half() for name, t in problem.items()}
    grad_y, x = cast.pop("grad_y"), cast.pop("x").requires_grad_()

    def results(others):
        """y and dx."""
        y = fused(Batch(tuple(others), ranks, k, n), 0.3)(x, **cast)
        return y.detach(), *torch.autograd.grad(y, x, grad_y)

    def bits(t, rows):
        return t[rows].view(torch.int16)

    first, base = results(ids), results([-1] * m)
    none = torch.tensor(ids) < 0
    for a, b in zip(first, base):
        assert torch.equal(bits(a, none), bits(b, none))
    for slot in range(3):
        mine = torch.tensor(ids) == slot
        for others in (-1, (slot + 1) % 3, slot):
            for a, b in zip(first, results([i if i == slot else others for i in ids])):
                assert torch.equal(bits(a, mine), bits(b, mine))


def test_an_adapter_that_holds_nan_spoils_its_own_rows(pretend):
    pretend("sm_80", ONE_SM)
    batch = Batch(scattered(90, 4), (8,) * 4, 48, 40)
    problem = make_problem(batch, FP16, FP16, False)
    clean = run(problem, FP16, FP16, fused(batch, 0.0))
    problem["lora_A"][2], problem["lora_B"][2] = torch.nan, torch.nan
    spoilt = run(problem, FP16, FP16, fused(batch, 0.0))
    mine = torch.tensor(batch.ids) == 2
    for a, b in zip(spoilt[:2], clean[:2]):
        assert a[mine].isnan().all()
        assert torch.equal(a[~mine], b[~mine])
    for a, b in zip(spoilt[2:], clean[2:]):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])


def test_rows_of_adapters_in_shares(pretend):
    """Two adapters of several shares each, the same bits twice. Kills: shares of one in another's place."""
    pretend("sm_80", MANY_SMS)
    batch = Batch(tuple(0 if i % 3 else 1 for i in range(900)) + (-1,) * 9, (16, 9), 80, 48)
    rows = configs.grouped_reduce("sm_80", MANY_SMS, len(batch.ids), batch.k, batch.rank, None, True).rows
    assert batch.ids.count(1) > rows
    torch.manual_seed(1)
    first = check(batch, FP16, FP16, 0.3)
    torch.manual_seed(1)
    again = run(make_problem(batch, FP16, FP16, False), FP16, FP16, fused(batch, 0.3))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


OUTSIDE = {
    torch.int32: ((4, 7, -3, 2**31 - 1), (4, 4, 0, 4)),
    torch.int64: ((2**40, 3, 3 - 2**32, 1 - 2**63), (4, 3, 0, 0)),
}


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize(("dtype", "ranks"), OUTSIDE.items(), ids=str)
def test_ranks_outside_of_the_pools(dtype, ranks, few, pretend, monkeypatch):
    """A GPU's ranks are looked at by nobody: one below zero is none, one that is too many is all. Kills: a rank of
    ``rank_of`` that is not clamped from above, whose columns are those of other rows and adapters, or not from below,
    where 64 bits that are cut to 32 are a rank again. By row and by adapter.
    """
    monkeypatch.setattr(configs, "FEW_ROWS", few)
    pretend("sm_80", MANY_SMS)
    batch = Batch(scattered(23, 4), (4, 4, 4, 4), 40, 24)
    problem = make_problem(batch, FP16, FP16, True)

    def function(of):
        def call(x, weight, lora_A, lora_B, bias):
            with lk.use_backend("triton"):
                return lk.multi_lora_linear(
                    x, weight, lora_A, lora_B, batch.ids_tensor(), bias, ranks=torch.tensor(of, dtype=dtype)
                )

        return call

    given, meant = (run(problem, FP16, FP16, function(of)) for of in ranks)
    for name, a, b in zip(("y", "dx", "dA", "dB"), given, meant):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


@pytest.mark.parametrize("few", [0, 1000])
def test_ids_outside_of_the_pools(few, pretend, monkeypatch):
    """Nor are its ids: one that no adapter has is that of the base alone. Kills: an id that is compared with zero, or
    with the adapters' count, alone; adapters read behind the last one. By row and by adapter.
    """
    monkeypatch.setattr(configs, "FEW_ROWS", few)
    pretend("sm_80", MANY_SMS)
    batch = Batch(scattered(23, 4), (4, 4, 4, 4), 40, 24)
    problem = make_problem(batch, FP16, FP16, True)
    outside = itertools.cycle((4, 5, -2, 2**31 - 1, -(2**31)))
    strange = batch._replace(ids=tuple(next(outside) if i < 0 else i for i in batch.ids))
    for a, b in zip(*(run(problem, FP16, FP16, fused(one, 0.3)) for one in (strange, batch))):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_B")])
def test_needs_input_grad_is_honoured(wanted, pretend):
    pretend("sm_80", MANY_SMS)
    batch = BATCHES[0]
    problem = make_problem(batch, FP16, FP16, True)
    everything = dict(zip(("x", "lora_A", "lora_B"), run(problem, FP16, FP16, fused(batch, 0.3))[1:]))
    t = {name: v if v is None else v.half().requires_grad_(name in wanted) for name, v in problem.items()}
    grad_y = t.pop("grad_y")
    fused(batch, 0.3)(**t).backward(grad_y)
    for name, grad in everything.items():
        assert torch.equal(t[name].grad, grad) if name in wanted else t[name].grad is None


def test_why_and_refusals():
    x, weight, ids = torch.zeros(5, 40).half(), torch.zeros(24, 40).half(), torch.zeros(5, dtype=torch.int64)
    with lk.use_backend("triton"):
        A, B = torch.zeros(3, 8, 40).half(), torch.zeros(3, 24, 8).half()
        assert lk.why("multi_lora_linear", x, weight, A, B, ids)[:2] == ("triton", "by row")
        many = torch.zeros(500, 40).half(), weight, A, B, torch.zeros(500, dtype=torch.int64)
        assert lk.why("multi_lora_linear", *many)[:2] == ("triton", "by adapter")
        with pytest.raises(RuntimeError, match="rank above 256"):
            lk.multi_lora_linear(x, weight, torch.zeros(3, 257, 40).half(), torch.zeros(3, 24, 257).half(), ids)
        with pytest.raises(RuntimeError, match="32 bits"):
            lk.multi_lora_linear(x, weight, A[:1].expand(5000, 8, 40), B[:1].expand(5000, 24, 8), ids)
