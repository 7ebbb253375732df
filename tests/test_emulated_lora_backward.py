"""The CUDA kernels of lora_linear's gradients, their sources compiled for the host and run by the emulator."""

from __future__ import annotations

import itertools

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from emulated import DTYPES, check_backward, grad_y_of, matrices, run_backward, saved_s
from test_emulated_lora_linear import ALL, RANKS, WHOLE, asked, inside

MANY = 1000  # SMs: more than there are tiles
STAGES_OF_GRADS = 4
"""LoraGrads::kStages."""

# Problems for which each kernel of dX is chosen: (schedule, rows of a tile, access, rank tile) -> axes; of "cublas" it
# is the first. Many SMs split the rows of dA and dB. No result has but a few elements: the bound compares our largest
# error with torch's, there one draw with another.
KERNELS = {
    ("ticketed", 128, WHOLE, 16): dict(m=(65, 200, 600), n=(24, 264), k=(72, 136), rank=(8, 16), sms=(1,)),
    ("ticketed", 128, WHOLE, 64): dict(m=(65, 200, 600), n=(24, 264), k=(72, 136), rank=(24, 64, 256), sms=(1,)),
    ("ticketed", 64, WHOLE, 16): dict(m=(1, 64, 520), n=(24, 264), k=(8, 136), rank=(8, 16), sms=(MANY,)),
    ("ticketed", 64, WHOLE, 64): dict(m=(1, 64, 520), n=(24, 264), k=(8, 136), rank=(24, 64, 256), sms=(MANY,)),
    ("ticketed", 128, RANKS, 16): dict(m=(65, 200, 600), n=(24, 264), k=(72, 136), rank=(1, 7, 15), sms=(1,)),
    ("ticketed", 128, RANKS, 64): dict(m=(65, 200, 600), n=(24, 264), k=(72, 136), rank=(17, 255), sms=(1,)),
    ("ticketed", 64, RANKS, 16): dict(m=(1, 64, 520), n=(24, 264), k=(8, 136), rank=(1, 7, 15), sms=(MANY,)),
    ("ticketed", 64, RANKS, 64): dict(m=(1, 64, 520), n=(24, 264), k=(8, 136), rank=(17, 255), sms=(MANY,)),
    ("cublas", 128, WHOLE, 0): dict(m=(1, 64, 520), n=(75, 776), k=(72, 136), rank=(8, 24, 200), sms=(1, MANY)),
    ("cublas", 128, RANKS, 0): dict(m=(1, 64, 520), n=(75, 776), k=(72, 136), rank=(1, 17, 255), sms=(1, MANY)),
    ("cublas", 128, ALL, 0): dict(m=(1, 64, 530), n=(9, 75), k=(9, 133), rank=(1, 16, 64, 255), sms=(1, MANY)),
}
CASES = [
    (kernel, case)
    for kernel, axes in KERNELS.items()
    for case in covering_pairs(**axes, name=tuple(DTYPES), p=(0.0, 0.3), float_adapters=(False, True))
]


def problem(m, n, k, rank, name="bf16", *, p=0.0, float_adapters=False):
    """(grad_y, x, s, weight, lora_A, lora_B)."""
    x, weight, lora_A, lora_B, _ = matrices(m, n, k, rank, name, float_adapters=float_adapters)
    return grad_y_of(x, weight), x, saved_s(x, lora_A, p), weight, lora_A, lora_B


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=case_id)
def test_gradients_are_as_accurate_as_torch(kernel, case):
    schedule = kernel[0]
    m, n, k, rank, sms = (case[name] for name in ("m", "n", "k", "rank", "sms"))
    chosen = emulator.load_lora_linear().lora_backward_config(
        m, n, k, rank, True, True, True, True, sms, 99 << 10, DTYPES[case["name"]].itemsize, schedule=asked(schedule)
    )
    first = "expand" if schedule == "cublas" else schedule
    assert (chosen["schedule"], chosen["rows"], chosen["access"], chosen["rank_tile"]) == (first, *kernel[1:])
    args = problem(m, n, k, rank, case["name"], p=case["p"], float_adapters=case["float_adapters"])
    grads, reports = check_backward(args, p=case["p"], sms=sms, schedule=asked(schedule))
    assert grads[1].dtype == grads[2].dtype == args[4].dtype
    # Banks of shared memory are asked once for a matrix (tf32 is not transposed by matrices), and loads are as far
    # ahead as there are stages.
    assert all(report.load_matrix_turns in ((0, 1) if case["name"] == "tf32" else (1,)) for report in reports)
    stages = [chosen["stages"], STAGES_OF_GRADS]
    assert [report.groups_under_way for report in reports] == [count - 2 for count in stages]


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
@pytest.mark.parametrize("rank", [16, 24])
@pytest.mark.parametrize("schedule", ["one launch", "cublas"])
def test_only_what_is_needed_is_computed(needs, rank, schedule):
    check_backward(problem(150, 72, 136, rank, p=0.3), p=0.3, needs=needs, sms=MANY, schedule=schedule)


def test_narrow_ranks_share_the_pass_over_grad_y():
    config = emulator.load_lora_linear().lora_backward_config
    shared = config(8192, 4096, 4096, 16, True, True, True, True, 108, 163 << 10)
    assert shared["parts_of_grad_b"] == 8192 // shared["rows"]
    assert config(8192, 4096, 4096, 64, True, True, True, True, 108, 163 << 10)["parts_of_grad_b"] == 0
    assert config(8192, 4096, 4096, 16, True, False, False, True, 108, 163 << 10)["parts_of_grad_b"] == 0


@pytest.mark.parametrize("schedule", ["one launch", "cublas"])
@pytest.mark.parametrize("columns", [157, 160], ids=["unaligned", "aligned"])
def test_strided_rows(columns, schedule):
    """Kills: a stride taken for another operand's, or for the number of columns."""
    grad_y, x, s, weight, lora_A, lora_B = problem(150, 72, 136, 16, p=0.3)
    strided = [inside(t, columns + 8 * i) for i, t in enumerate((grad_y, x, weight, lora_A, lora_B))]
    check_backward((*strided[:2], s, *strided[2:]), p=0.3, schedule=schedule)


@pytest.mark.parametrize(("rank", "name"), [(16, "bf16"), (24, "bf16"), (16, "tf32")])
@pytest.mark.parametrize("schedule", ["one launch", "cublas"])
def test_order_of_blocks_and_warps_does_not_change_a_bit(schedule, rank, name):
    args = problem(600, 776 if schedule == "cublas" else 72, 136, rank, name, p=0.4)
    options = dict(p=0.4, sms=MANY, schedule=schedule)
    first, _ = run_backward(*args, **options, seed=1, resident_blocks=1)
    for seed, resident in ((2, 2), (3, 5), (4, 100)):
        stall = seed % 2 == 0
        again, _ = run_backward(*args, **options, seed=seed, resident_blocks=resident, stall_release=stall)
        for ours, reference in zip(again, first, strict=True):
            assert torch.equal(ours.view(torch.int16), reference.view(torch.int16))


def test_everything_dropped_leaves_the_base_gradient():
    args = problem(65, 72, 64, 16, p=1.0)
    grads, _ = run_backward(*args, p=1.0)
    base, _ = run_backward(*args[:4], torch.zeros_like(args[4]), args[5])
    assert torch.equal(grads[0].view(torch.int16), base[0].view(torch.int16))
    assert not grads[1].float().any()


@pytest.mark.parametrize(("name", "depth"), [("bf16", 16), ("tf32", 8)])
@pytest.mark.parametrize("rank", [16, 64])
def test_no_redundant_multiply_adds(rank, name, depth):
    m, n, k = 256, 128, 256
    _, (first, second) = run_backward(*problem(m, n, k, rank, name))
    grad_x = m * k * (n + rank) + m * n * rank
    assert (first.multiply_adds + second.multiply_adds) * 16 * 8 * depth == grad_x + m * k * rank + m * n * rank
