"""The CUDA kernels of grouped_lora_linear and its gradients, and their binding, run by the emulator."""

from __future__ import annotations

import contextlib

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from emulated import DTYPES, matrices
from emulated import run_backward as run_one_backward
from emulated import run_forward as run_one
from emulated_grouped import check_backward, check_forward, problem, run_backward, run_forward, saved_s

MANY = 1000  # SMs: more than there are tiles

ROWS = {
    "ragged": ((70, 0, 1, 130), 9),
    "empty ends": ((0, 0, 65, 0), 0),
    "one of everything": ((200,), 0),
    "rows of nobody first": ((0, 0), 70),
    "single rows": ((1,) * 40, 0),
    "whole tiles": ((128, 64, 128), 64),
}
"""Rows per group, and behind the last."""

CASES = covering_pairs(
    rows=tuple(ROWS), sizes=((72, 136), (136, 264)), rank=(5, 16, 24, 72, 200), name=tuple(DTYPES), p=(0.0, 0.3),
    shared=(False, True), in_columns=(False, True), bias=(None, "one", "each"), float_adapters=(False, True),
    sms=(1, MANY),
)  # fmt: skip


def made(case):
    rows, behind = ROWS[case["rows"]]
    options = {name: case[name] for name in ("shared", "in_columns", "bias", "float_adapters")}
    return problem(rows, *case["sizes"], case["rank"], case["name"], behind=behind, **options)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_is_as_accurate_as_torch(case):
    """Kills: the group's number, begin or end off by one; a step of one operand taken for another's; a mask of rows
    counted from the group's first; rows of nobody left as they were."""
    *_, (launch,) = check_forward(made(case), p=case["p"], sms=case["sms"])
    assert launch["counters_were_zero"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients_are_as_accurate_as_torch(case):
    """Kills: a group without rows whose gradients stay as they were; sums over another group's rows."""
    args = made(case)
    grads, launches = check_backward(args, p=case["p"], sms=case["sms"])
    assert grads[1].dtype == grads[2].dtype == args[2].dtype
    assert all(launch["counters_were_zero"] for launch in launches)


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
def test_only_what_is_needed_is_computed(needs):
    _, launches = check_backward(problem((70, 0, 30), 72, 136, 16, "bf16", behind=5), p=0.3, needs=needs)
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
