"""The CUDA kernels of lora_linear's forward, their sources compiled for the host and run by the emulator (csrc/emu)."""

from __future__ import annotations

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from emulated import DTYPES, check_forward, matrices, operand, rounded_forward, run_forward, steered, unfused_forward
from numerics import assert_as_accurate

MANY = 1000  # SMs: more than there are tiles
NO_DROPOUT, DROPOUT = (0.0,), (0.0, 0.3)

WHOLE, RANKS, ALL = "whole", "gather ranks", "gather all"
ODD = dict(n=(9, 75, 133), rank=(1, 7, 15))  # rows of y and of the rank's length are whole chunks of no element type

STAGES_OF_BRANCH = 2
"""Of LoraTile::kBranch."""

# Problems for which each kernel is chosen: (schedule, rows of a tile, access, rank tile) -> axes. Of "cublas" it is the
# first of ours: shrink under dropout, else expand.
KERNELS = {
    ("ticketed", 128, WHOLE, 16): dict(m=(200, 250, 256), n=(72, 133), k=(24, 264), rank=(8, 16), sms=(1,), p=DROPOUT),
    ("ticketed", 128, WHOLE, 64): dict(
        m=(200, 250, 256), n=(72, 133), k=(24, 264), rank=(72, 256), sms=(1,), p=DROPOUT
    ),
    ("ticketed", 64, WHOLE, 16): dict(
        m=(129, 150, 190), n=(72, 203), k=(24, 264), rank=(8, 16), sms=(MANY,), p=DROPOUT
    ),
    ("ticketed", 64, WHOLE, 64): dict(
        m=(129, 150, 190), n=(72, 203), k=(24, 264), rank=(64, 256), sms=(MANY,), p=DROPOUT
    ),
    ("ticketed", 128, RANKS, 16): dict(m=(65, 200), k=(24, 264), n=(75, 133), rank=(1, 7, 15), sms=(1,), p=DROPOUT),
    ("ticketed", 128, RANKS, 64): dict(m=(65, 200), k=(24, 264), n=(72, 75), rank=(17, 255), sms=(1,), p=DROPOUT),
    ("ticketed", 64, RANKS, 16): dict(m=(17, 150), k=(24, 264), **ODD, sms=(MANY,), p=DROPOUT),
    ("ticketed", 64, RANKS, 64): dict(m=(17, 150), k=(24, 264), n=(72, 75), rank=(17, 255), sms=(MANY,), p=DROPOUT),
    ("column-0", 128, WHOLE, 64): dict(
        m=(200, 250, 256), n=(72, 133), k=(24, 264), rank=(24, 64), sms=(1,), p=NO_DROPOUT
    ),
    ("dual", 64, WHOLE, 16): dict(
        m=(17, 64), n=(8, 61, 136), k=(24, 264, 776), rank=(8, 16), sms=(1, 40), p=NO_DROPOUT
    ),
    ("dual", 64, WHOLE, 64): dict(
        m=(17, 64, 150), n=(8, 61), k=(24, 264, 776), rank=(24, 64), sms=(1, 40), p=NO_DROPOUT
    ),
    ("decode", 16, WHOLE, 16): dict(
        m=(1, 3, 16), n=(8, 133), k=(24, 264, 776), rank=(8, 16), sms=(1, 40), p=NO_DROPOUT
    ),
    ("decode", 16, WHOLE, 64): dict(
        m=(1, 3, 16), n=(8, 133), k=(24, 264, 776), rank=(24, 64), sms=(1, 40), p=NO_DROPOUT
    ),
    ("decode", 16, RANKS, 16): dict(m=(1, 16), k=(24, 776), **ODD, sms=(1, 40), p=NO_DROPOUT),
    ("decode", 16, RANKS, 64): dict(m=(1, 16), k=(24, 776), n=(72, 75), rank=(17, 63), sms=(1, 40), p=NO_DROPOUT),
    ("cublas", 64, WHOLE, 16): dict(m=(1, 64, 150), n=(72, 136), k=(24, 776), rank=(8, 16), sms=(1, 40), p=(0.3,)),
    ("cublas", 64, WHOLE, 64): dict(m=(1, 64, 150), n=(72, 136), k=(24, 776), rank=(24, 64), sms=(1, 40), p=(0.3,)),
    ("cublas", 64, WHOLE, 128): dict(m=(1, 64, 150), n=(72, 136), k=(24, 776), rank=(72, 200), sms=(1, 40), p=(0.3,)),
    ("cublas", 64, RANKS, 16): dict(m=(1, 64, 150), k=(24, 776), **ODD, sms=(1, 40), p=(0.3,)),
    ("cublas", 64, RANKS, 64): dict(m=(1, 64, 150), k=(24, 776), n=(72, 75), rank=(17, 63), sms=(1, 40), p=(0.3,)),
    ("cublas", 64, RANKS, 128): dict(m=(1, 64, 150), k=(24, 776), n=(72, 75), rank=(65, 255), sms=(1, 40), p=(0.3,)),
    ("cublas", 64, ALL, 16): dict(m=(1, 64, 150), n=(9, 75), k=(1, 70, 263), rank=(1, 7, 16), sms=(1, 40), p=(0.3,)),
    ("cublas", 64, ALL, 64): dict(m=(1, 64, 150), n=(9, 75), k=(1, 70, 263), rank=(17, 64), sms=(1, 40), p=(0.3,)),
    ("cublas", 64, ALL, 128): dict(m=(1, 64, 150), n=(9, 75), k=(1, 70, 263), rank=(65, 255), sms=(1, 40), p=(0.3,)),
    ("cublas", 128, WHOLE, 0): dict(m=(1, 150), n=(72, 133), k=(24, 263), rank=(8, 64, 200), sms=(1,), p=NO_DROPOUT),
    ("cublas", 128, RANKS, 0): dict(m=(1, 150), n=(72, 75), k=(24, 263), rank=(1, 17, 255), sms=(1,), p=NO_DROPOUT),
}


def asked(schedule):
    """What to ask for to get it."""
    return "cublas" if schedule == "cublas" else "one launch"


CASES = [
    (kernel, case)
    for kernel, axes in KERNELS.items()
    for case in covering_pairs(**axes, name=tuple(DTYPES), bias=(False, True), float_adapters=(False, True))
]


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=case_id)
def test_forward_is_as_accurate_as_torch(kernel, case):
    schedule = kernel[0]
    m, n, k, rank, p, sms = (case[name] for name in ("m", "n", "k", "rank", "p", "sms"))
    if kernel == ("ticketed", 128, WHOLE, 64) and rank <= 64 and p == 0:
        pytest.fail("such a case belongs to column-0")
    width = DTYPES[case["name"]].itemsize
    chosen = emulator.load_lora_linear().lora_linear_config(
        m, n, k, rank, True, p > 0, sms, 99 << 10, width, schedule=asked(schedule)
    )
    first = schedule if schedule != "cublas" else "shrink" if p > 0 else "expand"
    assert (chosen["schedule"], chosen["rows"], chosen["access"], chosen["rank_tile"]) == (first, *kernel[1:])
    args = matrices(m, n, k, rank, case["name"], bias=case["bias"], float_adapters=case["float_adapters"])
    *_, launched, reports = check_forward(args, p=p, sms=sms, schedule=asked(schedule))
    assert launched == schedule
    assert all(report.load_matrix_turns == 1 for report in reports), "banks of memory are asked twice for one matrix"
    stages = [chosen["stages"], *([STAGES_OF_BRANCH] if first == "shrink" else [])]
    assert [report.groups_under_way for report in reports] == [count - 2 for count in stages], "loads lag"


@pytest.mark.parametrize(("m", "schedule"), [(1, "decode"), (64, "dual")])
def test_few_rows_split_the_depth_where_sms_are_idle(m, schedule):
    config = emulator.load_lora_linear().lora_linear_config
    many, one = (config(m, 136, 776, 16, True, False, sms, 99 << 10) for sms in (40, 1))
    assert (many["schedule"], many["splits"]) == (schedule, 3)
    assert one["splits"] == 1


@pytest.mark.parametrize(("begin", "stride"), [(0, 12), (4, 16), (2, 16), (0, 14), (1, 13)])
@pytest.mark.parametrize("rank", [4, 12])
@pytest.mark.parametrize(("m", "sms", "schedule"), [(140, 1, "ticketed"), (140, MANY, "ticketed"), (5, 40, "decode")])
def test_ranks_short_of_a_chunk_by_half(m, sms, schedule, rank, begin, stride):
    """Rows of b that begin between halves of chunks are gathered. Kills: no look at where they begin, or at strides; a
    half past the rank that is not zero."""
    x, weight, lora_A, lora_B, _ = matrices(m, 75, 264, rank, "bf16")
    wide = torch.full((75, begin + max(stride, rank)), float("nan"), dtype=torch.bfloat16).flatten()
    rows = wide[begin:].as_strided((75, rank), (max(stride, rank), 1))
    rows.copy_(lora_B)
    *_, launched, _ = check_forward((x, weight, lora_A, rows, None), sms=sms)
    assert launched == schedule


def test_dual_takes_many_rows_of_a_narrow_y():
    check_forward(matrices(150, 64, 264, 24, "bf16"))
    assert run_forward(*matrices(150, 64, 264, 24, "bf16"))[2] == "dual"


def inside(t, columns):
    """``t`` as part of a wider matrix of NaN."""
    wide = torch.full((t.shape[0], columns), float("nan"), dtype=t.dtype)
    wide[:, 16 : 16 + t.shape[1]] = t
    return wide[:, 16 : 16 + t.shape[1]]


@pytest.mark.parametrize(
    ("m", "p", "schedule", "taken"),
    [
        (3, 0.0, "one launch", "decode"),
        (140, 0.0, "one launch", "ticketed"),
        (140, 0.0, "cublas", "cublas"),  # expand alone
        (140, 0.3, "cublas", "cublas"),
    ],
    ids=["decode", "ticketed", "expand", "shrink and expand"],
)
@pytest.mark.parametrize("columns", [101, 104], ids=["unaligned", "aligned"])
def test_strided_rows(columns, m, p, schedule, taken):
    """Kills: a stride taken for another operand's, or for the number of columns."""
    x, weight, lora_A, lora_B, _ = matrices(m, 72, 40, 8, "bf16")
    strided = (inside(t, columns + 8 * i) for i, t in enumerate((x, weight, lora_A, lora_B)))
    *_, launched, _ = check_forward((*strided, None), p=p, schedule=schedule)
    if columns % 8 == 0:
        assert launched == taken


def test_the_comparison_sees_a_missing_base_product():
    x, weight, lora_A, lora_B, _ = matrices(256, 136, 272, 200, "bf16")
    exact, _ = unfused_forward(x.double(), weight.double(), lora_A.double(), lora_B.double(), None, None, 1.0)
    torch_y, _ = unfused_forward(x, weight, lora_A, lora_B, None, None, 1.0)
    branch, _ = unfused_forward(x, torch.zeros_like(weight), lora_A, lora_B, None, None, 1.0)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(branch, torch_y, exact)


def test_the_comparison_sees_bits_cut_off_one_factor_of_tf32():
    x, *rest = matrices(150, 72, 40, 8, "tf32")
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    y, s, *_ = run_forward(cut, *rest)
    both = [rounded_forward(x, *rest, None, 1.0, s, dtype) for dtype in (torch.float32, torch.float64)]
    for ours, *expected in zip((y, s), *both, strict=True):
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(ours, *expected)


@pytest.mark.parametrize(
    ("schedule", "problem", "options"),
    [
        ("ticketed", (150, 200, 136, 24), dict(p=0.4)),
        ("column-0", (200, 136, 136, 24), {}),
        ("decode", (5, 136, 776, 16), dict(sms=40)),
        ("cublas", (150, 72, 776, 24), dict(p=0.4, sms=40)),
    ],
)
def test_order_of_blocks_and_warps_does_not_change_a_bit(schedule, problem, options):
    args = matrices(*problem, "bf16")
    options = {"schedule": asked(schedule), **options}
    first = run_forward(*args, **options, seed=1, resident_blocks=1)
    assert first[2] == schedule
    for seed, resident in ((2, 2), (3, 5), (4, 100)):
        again = run_forward(*args, **options, seed=seed, resident_blocks=resident, stall_release=seed % 2 == 0)
        for ours, reference in zip(again[:2], first[:2], strict=True):
            assert torch.equal(ours.view(torch.int16), reference.view(torch.int16))


def test_everything_dropped_gives_the_base_layer():
    x, weight, lora_A, lora_B, _ = matrices(65, 72, 64, 16, "bf16")
    y, s, *_ = run_forward(x, weight, lora_A, lora_B, None, p=1.0)
    assert not s.float().any()
    base = run_forward(x, weight, lora_A, torch.zeros_like(lora_B), None)[0]
    assert torch.equal(y.view(torch.int16), base.view(torch.int16))


@pytest.mark.parametrize(("m", "schedule"), [(5, "decode"), (130, "ticketed"), (130, "cublas")])
def test_nan_in_a_row_stays_in_that_row(m, schedule):
    x, *rest = matrices(m, 72, 40, 16, "bf16")
    x[-1] = float("nan")
    y = run_forward(x, *rest, schedule=asked(schedule))[0]
    assert y[-1].isnan().all()
    assert not y[:-1].isnan().any()


@pytest.mark.parametrize(("name", "depth"), [("bf16", 16), ("tf32", 8)])
@pytest.mark.parametrize("rank", [16, 64])
def test_no_redundant_multiply_adds(rank, name, depth):
    m, n, k = 256, 256, 128
    *_, schedule, (report,) = run_forward(*matrices(m, n, k, rank, name))
    assert schedule == {16: "ticketed", 64: "column-0"}[rank]
    assert report.multiply_adds * 16 * 8 * depth == m * k * (n + rank) + m * n * rank
    *_, reports = run_forward(*matrices(m, n, k, rank, name), p=0.5, schedule="cublas")
    assert [report.multiply_adds * 16 * 8 * depth for report in reports] == [
        m * k * rank,
        m * n * max(rank, 2 * depth),  # the depth of a stage
    ]


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize(("m", "n", "k"), [(200, 136, 72), (30, 72, 40)])
def test_frozen_linear(name, m, n, k):
    x, weight, _, _, bias = matrices(m, n, k, 1, name, bias=True)
    native = steered()
    y = torch.ops.lora_kernels_emulated.frozen_linear(x, weight, bias)
    exact = torch.nn.functional.linear(operand(x).double(), operand(weight).double(), bias.double())
    unfused = torch.nn.functional.linear(operand(x), operand(weight), bias)
    assert_as_accurate(y, unfused, exact)
    assert native.launches()[0]["report"].multiply_adds > 0
