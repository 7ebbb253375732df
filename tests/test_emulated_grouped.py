"""The CUDA kernels of grouped_lora_linear and its gradients, and their binding, run by the emulator."""

from __future__ import annotations

import contextlib
import types

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from emulated import DTYPES, matrices
from emulated import run_backward as run_one_backward
from emulated import run_forward as run_one
from emulated_grouped import check_backward, check_forward, problem, run_backward, run_forward, saved_s, steered
from pretended_gpu import pretend_gpu

import lora_kernels as lk
from lora_kernels import _native, dispatch
from lora_kernels.reasons import Reason
from lora_kernels.support import cuda, fits

MANY = 1000  # SMs: more than there are tiles

ROWS = {
    "ragged": ((70, 0, 1, 130), 9),
    "empty ends": ((0, 0, 65, 0), 0),
    "one of everything": ((200,), 0),
    "rows of nobody first": ((0, 0), 70),
    "single rows": ((1,) * 40, 0),
    "whole tiles": ((128, 64, 128), 64),
    "more groups than rows": ((0,) * 20 + (1,) + (0,) * 30 + (2,), 0),
}
"""Rows per group, and behind the last."""

CASES = covering_pairs(
    rows=tuple(ROWS), sizes=((72, 136), (136, 264)), rank=(5, 16, 24, 72, 200), name=tuple(DTYPES), p=(0.0, 0.3),
    shared=(False, True), in_columns=(False, True), bias=(None, "one", "each"), float_adapters=(False, True),
    sms=(1, MANY), schedule=("one launch", "cublas"),
)  # fmt: skip


def made(case):
    rows, behind = ROWS[case["rows"]]
    options = {name: case[name] for name in ("shared", "in_columns", "bias", "float_adapters")}
    return problem(rows, *case["sizes"], case["rank"], case["name"], behind=behind, **options)


def vendor_serves(case):
    return case["schedule"] == "cublas" and (case["shared"] or case["name"] == "bf16")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_is_as_accurate_as_torch(case):
    """Kills: the group's number, begin or end off by one; a step of one operand taken for another's; a mask of rows
    counted from the group's first; rows of nobody left as they were; groups without rows that have a number."""
    *_, (launch,) = check_forward(made(case), p=case["p"], sms=case["sms"], schedule=case["schedule"])
    assert launch["counters_were_zero"]
    assert launch["onto_y"] == vendor_serves(case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients_are_as_accurate_as_torch(case):
    """Kills: a group without rows whose gradients stay as they were; sums over another group's rows."""
    args = made(case)
    grads, launches = check_backward(args, p=case["p"], sms=case["sms"], schedule=case["schedule"])
    assert grads[1].dtype == grads[2].dtype == args[2].dtype
    assert all(launch["counters_were_zero"] for launch in launches)
    assert launches[0]["onto_y"] == vendor_serves(case)


@pytest.mark.parametrize("in_columns", [False, True])
@pytest.mark.parametrize("rank", [16, 24])
def test_large_tiles(rank, in_columns):
    """Groups that fill large tiles on few SMs; of the others, small ones lose less to what is empty."""
    args = problem((300, 129), 136, 264, rank, "bf16", behind=3, in_columns=in_columns)
    *_, launches = check_forward(args, p=0.3)
    assert launches[0]["tile_rows"] == 128
    _, launches = check_backward(args, p=0.3)
    assert launches[0]["tile_rows"] == 128
    *_, launches = check_forward(problem((64,) * 6, 136, 264, rank, "bf16"))
    assert launches[0]["tile_rows"] == 64


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("schedule", ["one launch", "cublas"])
def test_only_what_is_needed_is_computed(needs, schedule):
    args = problem((70, 0, 30), 72, 136, 16, "bf16", behind=5)
    _, launches = check_backward(args, p=0.3, needs=needs, schedule=schedule)
    assert len(launches) == (needs[0] or needs[1]) + (needs[1] or needs[2])


def test_no_rows_at_all():
    """Kills: gradients of groups that nobody writes where no kernel has a row."""
    args = problem((0, 0), 72, 136, 16, "bf16")
    y, s, launches = run_forward(args)
    assert (y.shape, s.shape, launches) == ((0, 72), (0, 16), [])
    check_backward(args)


def test_a_group_of_everything_is_the_plain_kernel():
    """Bit for bit, and as many multiply-adds."""
    x, weight, lora_A, lora_B, bias = matrices(200, 136, 264, 24, "bf16", bias=True)
    args = x, weight, lora_A[None], lora_B[None], torch.tensor([200], dtype=torch.int32), bias
    ours, one = run_forward(args, p=0.3), run_one(x, weight, lora_A, lora_B, bias, p=0.3, sms=1)
    for a, b in zip(ours[:2], one[:2]):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    assert ours[2][0]["report"].multiply_adds == one[3][0].multiply_adds
    grad_y, s = torch.randn(200, 136).bfloat16(), saved_s(args)
    (grad_x, *_), _, _ = run_backward(grad_y, s, args)
    (other, *_), _ = run_one_backward(grad_y, x, s, weight, lora_A, lora_B, sms=1)
    assert torch.equal(grad_x.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("sms", [1, MANY])
def test_bits_of_a_group_are_those_it_has_alone(sms):
    """Kills: tiles that mix groups. Row blocks begin where the group does, whoever is in front of it."""
    args = problem((70, 33, 1), 72, 136, 16, "bf16")
    y, *_ = run_forward(args, sms=sms)
    x, weight, lora_A, lora_B, *_ = args
    alone = x[70:103], weight[1:2], lora_A[1:2], lora_B[1:2], torch.tensor([33], dtype=torch.int32), None
    assert torch.equal(run_forward(alone, sms=sms)[0].view(torch.int16), y[70:103].view(torch.int16))


@pytest.mark.parametrize(("rank", "name"), [(16, "bf16"), (72, "bf16"), (16, "tf32")])
def test_order_of_blocks_and_warps_does_not_change_a_bit(rank, name):
    """Rows of two groups are split between blocks, whose sums are added in order. Kills: groups that share slots."""
    args = problem((300, 600, 0, 20), 72, 136, rank, name, behind=9)
    grad_y, s = torch.randn(len(args[0]), 72).to(DTYPES[name]), saved_s(args, 0.4)

    def run(**options):
        y, own_s, _ = run_forward(args, p=0.4, sms=MANY, **options)
        grads, _, launches = run_backward(grad_y, s, args, p=0.4, sms=MANY, **options)
        assert launches[1]["counters"] > 0
        return y, own_s, *grads

    first = run(seed=1, resident_blocks=1)
    for seed, resident in ((2, 2), (3, 5), (4, 100)):
        for ours, reference in zip(run(seed=seed, resident_blocks=resident, stall_release=seed % 2 == 0), first):
            assert torch.equal(ours.view(torch.int16), reference.view(torch.int16))


@pytest.mark.parametrize("offsets", [(90, 40, 60), (-5, 20, 300), (2**31 - 1, 0, 60), (-(2**31), 60, 60)])
def test_offsets_that_are_no_ends_touch_no_memory_of_others(offsets):
    """The emulator refuses every access outside of the operands. Kills: ends that are taken as they are. Where ends
    decrease, rows belong to two groups, which write them in no order."""
    x, weight, lora_A, lora_B, _, _ = problem((20, 20, 20), 72, 136, 16, "bf16")
    args = x, weight, lora_A, lora_B, torch.tensor(offsets, dtype=torch.int32), None
    grad_y, s = torch.randn(60, 72).bfloat16(), torch.randn(60, 16).bfloat16()
    rises = sorted(offsets) == list(offsets)
    for run in (lambda: run_forward(args), lambda: run_backward(grad_y, s, args)):
        with contextlib.nullcontext() if rises else pytest.raises(RuntimeError, match="unordered write"):
            run()


@pytest.mark.parametrize(
    ("capability", "rows", "shared", "name", "onto_y"),
    [
        (90, 1024, False, "bf16", True),
        (100, 1024, False, "bf16", True),
        (90, 1024, False, "fp16", False),
        (86, 1024, False, "bf16", False),
        (90, 1024, True, "fp16", True),
        (86, 1024, True, "bf16", False),
        (90, 32, False, "bf16", False),
        (86, 32, True, "bf16", True),
        (90, 32, True, "fp16", True),
    ],
)
def test_who_multiplies_by_the_weights(capability, rows, shared, name, onto_y):
    """The vendor's grouped product where it is a kernel, and not for a few rows of each group."""
    args = problem((rows, rows // 2, 0, rows // 2) * 2, 16, 16, 8, name, shared=shared)
    y, _, (launch,) = run_forward(args, schedule="auto", capability=capability)
    assert launch["onto_y"] == onto_y
    _, _, (launch, _) = run_backward(torch.randn_like(y), saved_s(args), args, schedule="auto", capability=capability)
    assert launch["onto_y"] == onto_y


def test_nan_of_a_group_stays_there():
    """Kills: products of rows past a group's end that are stored, or summed."""
    x, weight, lora_A, lora_B, offsets, _ = problem((70, 33, 40), 72, 136, 16, "bf16", behind=4)
    for t in (weight, lora_A, lora_B):
        t[1] = float("nan")
    x[70:103] = x[143:] = float("nan")
    args = x, weight, lora_A, lora_B, offsets, None
    y, *_ = run_forward(args)
    assert y[70:103].isnan().all()
    assert not torch.cat([y[:70], y[103:]]).isnan().any()
    grad_y = torch.randn(147, 72).bfloat16()
    grad_y[70:103] = grad_y[143:] = float("nan")
    (grad_x, grad_A, grad_B), _, _ = run_backward(grad_y, saved_s(args), args)
    assert not torch.cat([grad_x[:70], grad_x[103:]]).isnan().any()
    assert not grad_A[[0, 2]].isnan().any()
    assert not grad_B[[0, 2]].isnan().any()


@pytest.mark.parametrize(("name", "depth"), [("bf16", 16), ("tf32", 8)])
def test_no_redundant_multiply_adds(name, depth):
    """Blocks that have no rows multiply nothing. Kills: rows of nobody that are multiplied."""
    m, n, k, rank, rows = 256, 128, 256, 16, (64, 0, 128, 0)
    args = problem(rows, n, k, rank, name, behind=64)
    *_, (launch,) = run_forward(args, sms=MANY)
    assert launch["report"].multiply_adds * 16 * 8 * depth == (m - 64) * (k * (n + rank) + n * rank)
    grad_y = torch.randn(m, n).to(DTYPES[name])
    _, _, launches = run_backward(grad_y, saved_s(args), args, sms=MANY)
    assert sum(launch["report"].multiply_adds for launch in launches) * 16 * 8 * depth == (m - 64) * (
        n * (k + rank) + k * rank + k * rank + n * rank
    )


def test_strided_operands_are_read_in_place():
    """Kills: a stride taken for a number of columns; weights that begin at another group's."""
    x, weight, lora_A, lora_B, offsets, _ = problem((70, 1, 30), 72, 136, 16, "bf16", behind=4)
    wide = torch.full((3, 80, 160), float("nan")).bfloat16()
    wide[:, 8:, 16:152] = weight
    rows = torch.full((105, 168), float("nan")).bfloat16()
    rows[:, 8:144] = x
    adapters = [t.permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in (lora_A, lora_B)]
    check_forward((rows[:, 8:144], wide[:, 8:, 16:152], *adapters, offsets, None), p=0.3)
    check_backward((rows[:, 8:144], wide[:, 8:, 16:152], *adapters, offsets, None), p=0.3)


@pytest.mark.parametrize("fault", ["weight", "k", "n"])
def test_weights_that_are_not_whole_are_refused(fault):
    emulator.load_grouped_lora_linear()
    args = list(problem((7, 9), 75 if fault == "n" else 72, 70 if fault == "k" else 136, 8, "bf16"))
    if fault == "weight":
        args[1] = torch.randn(2 * 72 * 136 + 1).bfloat16()[1:].view(2, 72, 136)
    with pytest.raises(RuntimeError, match="chunks of 16 bytes"):
        run_forward(args)


@pytest.fixture
def _cuda_on_the_cpu(monkeypatch):
    """Tensors on the CPU are served by the CUDA backend, emulated."""
    steered()
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(_native, "cuda", types.SimpleNamespace())
    monkeypatch.setitem(dispatch._ORDER, "cpu", ("cuda", "reference"))
    for name in ("grouped_lora_linear", "grouped_lora_linear_backward"):
        monkeypatch.setitem(dispatch._native_ops, name, getattr(torch.ops.lora_kernels_emulated_grouped, name))


@pytest.mark.usefixtures("_cuda_on_the_cpu")
@pytest.mark.parametrize("scaling", [1.7, torch.tensor([0.5, 0.0, -2.0])], ids=["one", "each"])
def test_the_backend_serves_the_function(scaling):
    x, weight, lora_A, lora_B, offsets, bias = problem((20, 0, 30), 72, 136, 8, "bf16", behind=3, bias="each")
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    results = []
    for backend in ("cuda", "reference"):
        with lk.use_backend(backend):
            y = lk.grouped_lora_linear(x, weight, lora_A, lora_B, offsets, bias, scaling=scaling)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert lk.stats()["served"][("grouped_lora_linear", "cuda")] == 1
    assert lk.stats()["served"][("grouped_lora_linear_backward", "cuda")] == 1
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.usefixtures("_cuda_on_the_cpu")
@pytest.mark.parametrize(
    ("n", "k", "rank", "dtype", "reason"),
    [
        (72, 136, 8, torch.bfloat16, None),
        (75, 136, 8, torch.bfloat16, Reason.LAYOUT),
        (72, 70, 8, torch.bfloat16, Reason.LAYOUT),
        (72, 136, 257, torch.bfloat16, Reason.RANK),
        (72, 136, 8, torch.float64, Reason.DTYPE),
        (72, 136, 8, torch.float32, Reason.FP32_STRICT),
    ],
)
def test_verdicts(n, k, rank, dtype, reason):
    x, weight = torch.zeros(5, k, dtype=dtype), torch.zeros(3, n, k, dtype=dtype)
    for w in (weight, weight.mT.contiguous().mT, weight[0]):
        schedule, why = cuda.grouped_verdict(x, w, 3, rank)
        assert (schedule is None) == (reason is not None)
        assert reason is None or why == reason


@pytest.mark.usefixtures("_cuda_on_the_cpu")
def test_verdicts_on_how_weights_lie():
    """Kills: a weight that the binding refuses, or one that it would read in place and that is not offered to it."""
    flat = torch.zeros(3 * 80 * 160 + 8).bfloat16()
    x = torch.zeros(5, 136).bfloat16()
    for begin, strides, served in [
        (0, (80 * 160, 160, 1), True), (8, (80 * 160, 160, 1), True), (0, (80 * 160, 1, 80), True),
        (1, (80 * 160, 160, 1), False), (0, (80 * 160, 158, 1), False), (0, (80 * 160 - 4, 160, 1), False),
        (0, (80, 160, 2), False), (0, (0, 160, 1), True),
    ]:  # fmt: skip
        weight = flat.as_strided((3, 72, 136), strides, begin)
        assert (cuda.grouped_verdict(x, weight, 3, 8).schedule is not None) == served, (begin, strides)
        args = (
            x,
            weight,
            torch.zeros(3, 8, 136),
            torch.zeros(3, 72, 8),
            torch.tensor([1, 2, 5], dtype=torch.int32),
            None,
        )
        with contextlib.nullcontext() if served else pytest.raises(RuntimeError, match="chunks of 16 bytes"):
            run_forward(args)


FORWARD = {
    "x": torch.zeros(23, 128), "weight": torch.zeros(2, 72, 136), "lora_A": torch.zeros(3, 8, 128),
    "lora_B": torch.zeros(3, 64, 8), "offsets": torch.zeros(3, dtype=torch.int64), "bias": torch.zeros(2, 72),
    "seed": torch.zeros(1, dtype=torch.int32),
}  # fmt: skip
BACKWARD = {"grad_y": torch.zeros(23, 64), "s": torch.zeros(22, 8), **FORWARD}
del BACKWARD["bias"]


def misfit(name, replacement, given):
    """Arguments of the op, in which this one does not fit."""
    keep = replacement.dtype if name in ("offsets", "seed") else given[name].dtype
    return list((given | {name: replacement.to(keep)}).values())


def test_nothing_is_launched_on_what_does_not_fit():
    """By the binding, and by what Triton's launches look at."""
    x, weight, lora_A, lora_B, offsets, bias = problem((20, 0, 0), 72, 136, 8, "bf16", behind=3, bias="each")
    given = dict(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, offsets=offsets, bias=bias)
    given["seed"] = torch.tensor([3])
    steered()
    ops = torch.ops.lora_kernels_emulated_grouped
    for name, replacement in FORWARD.items():
        arguments = misfit(name, replacement, given)
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            ops.grouped_lora_linear(*arguments, 1.0, 0.5, "auto")
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            fits.check_grouped_lora_linear(*arguments)
    del given["bias"]
    given = dict(grad_y=torch.zeros(23, 72).bfloat16(), x=x, s=torch.zeros(23, 8).bfloat16()) | given
    for name, replacement in BACKWARD.items():
        arguments = misfit(name, replacement, given)
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            ops.grouped_lora_linear_backward(*arguments, 1.0, 0.5, True, True, True, "auto")
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            fits.check_grouped_lora_linear_backward(*arguments)
