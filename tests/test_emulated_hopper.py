"""lora_linear and dX on sm_90a, schedule "wgmma": the kernels' own source on the host, its order checked by clocks.

The emulator (csrc/emu/async.h) delivers a copy only to who waits for it, hides accumulators until their wait, and stops
a launch where a chain of barriers, waits and fences does not order two accesses.
"""

from __future__ import annotations

import functools

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from emulated import SCALING, SEED, expected_backward, expected_forward, grad_y_of, mask, matrices, saved_s
from numerics import assert_as_accurate

SM_90 = 90
CLUSTERS = "wgmma, clusters"


def run(args, *, p=0.0, sms=2, schedule="wgmma", scaling=SCALING, **options):
    """(y, s, (blocks, the emulator's report))."""
    native = emulator.load_lora_linear_wgmma()
    native.set_device(sms, SM_90, True)
    native.set_options({"resident_blocks": 3, **options})
    seed = torch.tensor([SEED]) if p > 0 else None
    y, s = torch.ops.lora_kernels_emulated_wgmma.lora_linear(*args, seed, scaling, p, schedule)
    _, blocks, report, _ = native.last_launch()
    return y, s, (blocks, report)


def check(problem, name="bf16", *, p=0.0, bias=True, float_adapters=False, **options):
    """Runs and compares; returns the blocks and the report."""
    args = matrices(*problem, name, bias=bias, float_adapters=float_adapters)
    y, s, launched = run(args, p=p, **options)
    of_y, of_s = expected_forward(args, *mask(args[0], p), s)
    for ours, (unfused, exact, terms), what in ((s, of_s, "s"), (y, of_y, "y")):
        assert_as_accurate(ours, unfused, exact, what, terms)
    return launched


def run_backward(operands, *, p=0.0, sms=2, **options):
    """(dX, dY B, parts of dB, (blocks, the emulator's report)) for (dY, x, s, weight, lora_A, lora_B)."""
    native = emulator.load_lora_linear_wgmma()
    native.set_device(sms, SM_90, True)
    native.set_options({"resident_blocks": 3, **options})
    seed = torch.tensor([SEED]) if p > 0 else None
    op = torch.ops.lora_kernels_emulated_wgmma.lora_linear_backward
    grad_x, *_ = op(*operands, seed, SCALING, p, True, False, True, "wgmma")
    _, blocks, report, _ = native.last_launch()
    grad_y, s = operands[0], operands[2]
    grad_s = torch.frombuffer(bytearray(native.grad_s()), dtype=s.dtype).view(s.shape)
    parts = bytearray(native.parts_of_grad_b())  # there are none beyond 16 ranks
    parts = torch.frombuffer(parts, dtype=torch.float32).view(-1, grad_y.shape[1], 16) if parts else None
    return grad_x, grad_s, parts, (blocks, report)


def check_backward(problem, name="bf16", *, p=0.0, float_adapters=False, **options):
    """The same with comparisons; problem: rows, columns of dX, depth of dY, rank."""
    m, k, n, rank = problem
    x, weight, lora_A, lora_B, _ = matrices(m, n, k, rank, name, float_adapters=float_adapters)
    operands = (grad_y_of(x, weight), x, saved_s(x, lora_A, p), weight, lora_A, lora_B)
    grad_x, grad_s, parts, launched = run_backward(operands, p=p, **options)
    grad_y = operands[0]
    of_x, _, of_b = expected_backward(operands, *mask(x, p), grad_s)
    assert_as_accurate(grad_s, grad_y @ lora_B.to(x.dtype), grad_y.double() @ lora_B.double(), "dY B")
    assert_as_accurate(grad_x, *of_x[:2], "dX")
    assert (parts is not None) == (rank <= 16)
    if parts is not None:
        assert len(parts) == -(-m // 128)
        sums = SCALING * parts.double().sum(0)
        assert_as_accurate(sums[:, :rank].float(), of_b[0].float(), of_b[1], "dB")
        assert not sums[:, rank:].any()
    return launched


def check_in_clusters(problem, name="bf16", *, sms=2, **options):
    """As check, in clusters of two blocks, of which there is one at least."""
    return check(problem, name, sms=max(2, sms), schedule=CLUSTERS, **options)


def columns_of_tiles(problem, sms):
    """256, but where narrow tiles fill the SMs' waves better, by the config's model."""
    rows, waves = -(-problem[0] // 128), {}
    for columns in (256, 128):
        waves[columns] = -(-rows * -(-problem[1] // columns) // sms)
    return 128 if 0.55 * waves[128] < waves[256] else 256


# Rows and columns short of a tile and beyond it; k short of a stage, of a ring, and beyond; one tile of s and several,
# and so of stages of the branch.
AXES = dict(
    m=(1, 130, 200, 256), n=(8, 264, 392), k=(8, 72, 328), rank=(8, 16, 48, 64, 72, 136, 256), name=("bf16", "fp16"),
    p=(0.0, 0.3), bias=(False, True), float_adapters=(False, True), sms=(1, 4),
)  # fmt: skip
CASES = covering_pairs(**AXES)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_is_as_accurate_as_torch(case):
    problem, sms = tuple(case[axis] for axis in ("m", "n", "k", "rank")), case["sms"]
    options = {axis: case[axis] for axis in ("p", "bias", "float_adapters", "sms")}
    blocks, report = check(problem, case["name"], **options)
    columns = columns_of_tiles(problem, sms)
    assert blocks == min(sms, -(-problem[0] // 128) * -(-problem[1] // columns))
    assert report.load_matrix_turns == 1, "banks of memory are asked twice for one matrix"


@pytest.mark.parametrize("case", covering_pairs(**{**AXES, "bias": (False,)}), ids=case_id)
def test_gradient_of_x_is_as_accurate_as_torch(case):
    """Kills: a panel of w or of a at another's place; a mask of another tile, or one that is not read in time."""
    problem, sms = tuple(case[axis] for axis in ("m", "n", "k", "rank")), case["sms"]
    options = {axis: case[axis] for axis in ("p", "float_adapters", "sms")}
    blocks, report = check_backward(problem, case["name"], **options)
    columns = columns_of_tiles(problem, sms)
    assert blocks == min(sms, -(-problem[0] // 128) * -(-problem[1] // columns))
    assert report.load_matrix_turns == 1
    assert report.bytes_stored == 2 * problem[0] * problem[1]


@pytest.mark.parametrize("problem", [(200, 392, 136, 16), (300, 264, 200, 136)])
@pytest.mark.parametrize("sms", [1, 9])
def test_work_of_the_gradient_is_no_more_than_tiles_ask_for(problem, sms):
    """Kills: tiles of s' that multiply by more columns of B than there are in a tile, parts of dB made twice."""
    m, n, k, rank = problem
    _, report = check_backward(problem, sms=sms)
    columns, ranks = columns_of_tiles(problem, sms), 16 if rank <= 16 else 64
    row_blocks, column_blocks, rank_tiles = -(-m // 128), -(-n // columns), -(-rank // ranks)
    stages, has_parts = -(-k // 64), rank <= 16
    depth = stages * 64 + -(-rank // 16) * 16
    of_grad_s, of_parts = rank_tiles * ranks * 128 * stages * 64, stages * 64 * 16 * 128 if has_parts else 0
    assert report.warpgroup_multiply_adds == row_blocks * (128 * column_blocks * columns * depth + of_grad_s + of_parts)
    of_tiles = (k + rank) * (m * column_blocks + n * row_blocks)
    of_grad_s = m * k * rank_tiles + k * rank * row_blocks + (m * rank if has_parts else 0)
    assert report.bytes_loaded == 2 * (of_tiles + of_grad_s)


def test_the_cases_have_both_tiles():
    tiles = {columns_of_tiles((case["m"], case["n"]), case["sms"]) for case in CASES}
    assert tiles == {128, 256}


@pytest.mark.parametrize("problem", [(200, 392, 136, 16), (300, 264, 200, 136)])
@pytest.mark.parametrize("sms", [1, 9])
def test_work_is_no_more_than_tiles_ask_for(problem, sms):
    """Kills: a product or a copy too many; boxes that are not clipped to their matrix."""
    m, n, k, rank = problem
    _, report = check(problem, sms=sms)
    columns, rank_tile = columns_of_tiles(problem, sms), 16 if rank <= 16 else 48
    row_blocks, column_blocks = -(-m // 128), -(-n // columns)
    depth = -(-k // 64) * 64 + -(-rank // 16) * 16
    assert report.warpgroup_multiply_adds == row_blocks * 128 * column_blocks * columns * depth
    assert report.multiply_adds == -(-m // 16) * -(-rank // rank_tile) * -(-k // 32) * 2 * rank_tile // 8
    assert report.bytes_loaded == 2 * (k + rank) * (m * column_blocks + n * row_blocks)
    assert report.bytes_stored == 2 * m * n


@pytest.mark.parametrize("case", covering_pairs(**{**AXES, "m": (130, 256, 300), "sms": (2, 5)}), ids=case_id)
def test_clusters_have_the_bits_of_single_blocks(case):
    """Even and odd numbers of blocks of rows. Kills: rows or columns of the other block's tile, a half of w or b at
    another's place, s that is waited for where there is none.
    """
    problem, options = tuple(case[axis] for axis in ("m", "n", "k", "rank")), {"p": case["p"], "sms": case["sms"]}
    args = matrices(*problem, case["name"], bias=case["bias"], float_adapters=case["float_adapters"])
    y, s, (blocks, report) = run(args, schedule=CLUSTERS, **options)
    for ours, single in zip((y, s), run(args, **options)[:2], strict=True):
        assert torch.equal(ours.view(torch.int16), single.view(torch.int16))
    pairs, columns = -(-problem[0] // 256), -(-problem[1] // 256)
    assert blocks == min(case["sms"] // 2 * 2, 2 * pairs * columns)
    assert report.load_matrix_turns == 1


@pytest.mark.parametrize("problem", [(200, 392, 136, 16), (300, 264, 200, 136)])
@pytest.mark.parametrize("sms", [2, 9])
def test_clusters_read_w_and_b_once_for_two_blocks_of_rows(problem, sms):
    """Kills: halves that each block loads for itself; more than x where the last cluster has one block of rows."""
    m, n, k, rank = problem
    _, report = check_in_clusters(problem, sms=sms)
    pairs, column_blocks = -(-m // 256), -(-n // 256)
    assert report.bytes_loaded == 2 * (k + rank) * (m * column_blocks + n * pairs)
    assert report.bytes_stored == 2 * m * n
    depth = -(-k // 64) * 64 + -(-rank // 16) * 16
    assert report.warpgroup_multiply_adds == pairs * 256 * column_blocks * 256 * depth


@pytest.mark.parametrize(("rank", "float_adapters"), [(72, False), (16, True)])
def test_order_of_blocks_and_warps_does_not_change_a_bit(rank, float_adapters):
    args = matrices(200, 264, 136, rank, "bf16", bias=True, float_adapters=float_adapters)
    x, weight, lora_A, lora_B, _ = args
    operands = (grad_y_of(x, weight), x, saved_s(x, lora_A, 0.4), weight, lora_A, lora_B)
    first = None
    for seed in range(20):
        options = dict(sms=1 + seed % 4 * 2, seed=seed, resident_blocks=1 + seed % 5, stall_release=seed % 2 == 0)
        forwards = (*run(args, p=0.4, **options)[:2], *run(args, p=0.4, schedule=CLUSTERS, **options)[:2])
        results = (*forwards, *run_backward(operands, p=0.4, **options)[:3])
        first = results if first is None else first
        for ours, reference in zip(results, first, strict=True):
            assert ours is reference or torch.equal(ours.view(torch.int16), reference.view(torch.int16))


@pytest.mark.parametrize("float_adapters", [False, True])
def test_strided_rows(float_adapters):
    """Kills: a stride taken for another operand's, or for the number of columns; also of adapters that are rounded."""
    args, wide = matrices(140, 72, 136, 24, "bf16", float_adapters=float_adapters), []
    for i, t in enumerate(args[:4]):
        rows = torch.full((t.shape[0], t.shape[1] + 16 + 8 * i), float("nan"), dtype=t.dtype)
        rows[:, 8 : 8 + t.shape[1]] = t
        wide.append(rows[:, 8 : 8 + t.shape[1]])
    y, s, _ = run((*wide, None))
    (torch_y, exact, _), _ = expected_forward(args, None, 1.0, s)
    assert_as_accurate(y, torch_y, exact)


def test_bias_may_begin_between_pairs():
    x, weight, lora_A, lora_B, _ = matrices(20, 72, 40, 8, "bf16")
    bias = torch.randn(73).to(torch.bfloat16)[1:]
    y, s, _ = run((x, weight, lora_A, lora_B, bias))
    (torch_y, exact, _), _ = expected_forward((x, weight, lora_A, lora_B, bias), None, 1.0, s)
    assert_as_accurate(y, torch_y, exact)


def test_without_a_branch_it_is_the_base_layer():
    """By a scaling of zero, and with everything dropped. Kills: a product that is scaled before the sum."""
    x, weight, lora_A, lora_B, _ = matrices(65, 72, 64, 16, "bf16")
    base = run((x, weight, lora_A, torch.zeros_like(lora_B), None))[0]
    dropped, s, _ = run((x, weight, lora_A, lora_B, None), p=1.0)
    assert not s.float().any()
    for y in (dropped, run((x, weight, lora_A, lora_B, None), scaling=0.0)[0]):
        assert torch.equal(y.view(torch.int16), base.view(torch.int16))


def test_nan_in_a_row_stays_in_that_row():
    x, *rest = matrices(130, 72, 40, 16, "bf16")
    x[-1] = float("nan")
    y = run((x, *rest))[0]
    assert y[-1].isnan().all()
    assert not y[:-1].isnan().any()


def test_without_the_drivers_tensor_maps_another_schedule_is_taken():
    native = emulator.load_lora_linear_wgmma()
    args = matrices(130, 72, 40, 16, "bf16")
    native.set_device(2, SM_90, False)
    with pytest.raises(RuntimeError, match="launch failure"):  # there is no other one here
        torch.ops.lora_kernels_emulated_wgmma.lora_linear(*args, None, SCALING, 0.0, "wgmma")


@pytest.mark.parametrize("problem", [(200, 264, 136), (130, 1032, 328)])
def test_the_yardstick_is_the_base_layer(problem):
    """What the machine code of the main loop is compared with (test_cuda_main_loop.py) computes something."""
    native = emulator.load_lora_linear_wgmma()
    x, weight, lora_A, lora_B, bias = matrices(*problem, 16, "bf16", bias=True)
    grad_y = grad_y_of(x, weight)
    native.set_frozen(True)
    try:
        y = run((x, weight, lora_A, lora_B, bias))[0]
        grad_x = run_backward((grad_y, x, saved_s(x, lora_A), weight, lora_A, lora_B))[0]
    finally:
        native.set_frozen(False)
    linear = torch.nn.functional.linear
    assert_as_accurate(y, linear(x, weight, bias), linear(x.double(), weight.double(), bias.double()), "y")
    assert_as_accurate(grad_x, grad_y @ weight, grad_y.double() @ weight.double(), "dY W")


# ------------------------------------------------------------------------------------------------------- faults

SCENARIOS = (
    dict(problem=(200, 520, 328, 72), p=0.3, sms=2),  # more stages than the ring has, and several of the branch
    dict(problem=(200, 1032, 64, 16), p=0.3, sms=1),  # tiles so shallow that who loads is told ahead of who multiplies
    dict(problem=(300, 264, 200, 16), p=0.3, sms=3, float_adapters=True),
    dict(problem=(1030, 8, 128, 8), sms=1),  # a tile of s' behind one of dX, and one of dX that is soon done behind it
)
SEEDS = range(3)
ROLES = {"forward": check, "clusters": check_in_clusters, "dX": check_backward}
SITES = {
    # Of the block, and two of each warpgroup around its staging tile; of clusters one more, at their end; of tiles of
    # s', and of both groups behind theirs.
    "drop_barrier": ("barrier_sites", 3, 4, 5),
    # Of work that is told and heard, of a stage that is opened and given back; of a cluster's ticket likewise; of a
    # mask that is made and read, and of the saved s.
    "drop_arrival": ("arrival_sites", 4, 6, 7),
    "drop_barrier_wait": ("barrier_wait_sites", 5, 7, 8),
    # Of barriers, of adapters before their flag and behind it, of s likewise, of y.
    "drop_proxy_fence": ("proxy_fence_sites", 6, 6, 6),
    "drop_multiply_wait": ("multiply_wait_sites", 4, 4, 6),
    "drop_multiply_fence": ("multiply_fence_sites", 2, 2, 4),
    "drop_store_wait": ("store_wait_sites", 2, 2, 3),
    "drop_global_store": ("global_store_sites", 3, 3, 4),
}


def survives(role, **fault):
    """Whether every scenario is right in spite of a fault."""
    return all(is_right(role, scenario, seed, **fault) for scenario in range(len(SCENARIOS)) for seed in SEEDS)


def is_right(role, scenario, seed, **fault):
    try:
        launch(role, scenario, seed, **fault)
    except (RuntimeError, AssertionError):
        return False
    return True


def launch(role, scenario, seed, **fault):
    return ROLES[role](**SCENARIOS[scenario], seed=seed, stall_release=seed == 1, **fault)[1]


@functools.cache
def report_of(role, scenario, seed):
    return launch(role, scenario, seed)


@pytest.mark.parametrize("fault", SITES)
@pytest.mark.parametrize("role", ROLES)
def test_whatever_is_left_out_is_missed(role, fault):
    """Each barrier, arrival, wait, fence and store by itself, in every launch that has it."""
    name, *counts = SITES[fault]
    launches = [(scenario, seed) for scenario in range(len(SCENARIOS)) for seed in SEEDS]
    sites = {at: getattr(report_of(role, *at), name) for at in launches}
    everywhere = sorted({site for of_launch in sites.values() for site in of_launch})
    assert len(everywhere) == counts[list(ROLES).index(role)], everywhere

    def is_missed(site):
        having = [at for at in launches if site in sites[at]]
        return not all(is_right(role, *at, **{fault: sites[at].index(site)}) for at in having)

    assert [site for site in everywhere if not is_missed(site)] == []


@pytest.mark.parametrize(
    "fault", ["drop_acquire", "drop_release_order", "early_release", "ignore_copy_size", "ignore_expected_bytes"]
)
@pytest.mark.parametrize("role", ["forward", "clusters"])
def test_other_faults_are_missed(role, fault):
    assert not survives(role, **{fault: True})


@pytest.mark.parametrize("fault", ["ignore_copy_size", "ignore_expected_bytes"])
def test_other_faults_of_the_gradient_are_missed(fault):
    assert not survives("dX", **{fault: True})
