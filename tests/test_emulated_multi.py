"""The CUDA kernels of multi_lora_linear and its gradients, and their binding, run by the emulator."""

from __future__ import annotations

import pytest
import torch
from covering import case_id, covering_pairs
from emulated import DTYPES
from emulated_multi import check_backward, check_forward, names, problem, run_backward, run_forward, saved_s

MANY = 1000  # SMs: more than there are tiles


def ids_of(kind, rows, adapters):
    """Adapters of rows."""
    return {
        "scattered": [-1 if row % 5 == 3 else (7 * row + row // 4) % adapters for row in range(rows)],
        "sorted": [row * adapters // rows for row in range(rows)],
        "one": [1 % adapters] * rows,
        "none": [-1] * rows,
        "each its own": [row % adapters for row in range(rows)],
    }[kind]


KINDS = ("scattered", "sorted", "one", "none", "each its own")
RANKS = {"mixed": (8, 3, 0, 24, 1), "ragged": (5, 7, 2), "wide": (72, 16, 65), "equal": (16, 16), "one": (4,)}
AXES = {
    "kind": KINDS, "ranks": tuple(RANKS), "sizes": ((72, 136), (136, 264)), "name": tuple(DTYPES),
    "bias": (False, True), "float_adapters": (False, True), "sms": (1, MANY), "scalings": (False, True),
    "wide": (False, True),
}  # fmt: skip
FEW = covering_pairs(rows=(1, 5, 16, 17, 64), **AXES)
CASES = covering_pairs(rows=(65, 200), p=(0.0, 0.3), **AXES)


def made(case):
    ranks = RANKS[case["ranks"]]
    options = {name: case[name] for name in ("bias", "float_adapters", "scalings", "wide")}
    return problem(ids_of(case["kind"], case["rows"], len(ranks)), ranks, *case["sizes"], case["name"], **options)


@pytest.mark.parametrize("case", FEW, ids=case_id)
def test_few_rows_are_one_launch(case):
    """Kills: a row's adapter, rank or factor taken of another row; ranks beyond the adapter's (they hold NaN) that are
    multiplied by zero; s of ranks that the adapter does not use left as it was."""
    *_, launches = check_forward(made(case), sms=case["sms"])
    assert names(launches) == ["decode"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_many_rows(case):
    """Kills: blocks of rows that mix adapters; a mask of the row's place in the order; a rank tile that an adapter does
    not reach; rows of none that are touched."""
    *_, launches = check_forward(made(case), p=case["p"], sms=case["sms"])
    assert names(launches) == ["order", "shrink", "expand"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients(case):
    """Kills: sums over another adapter's rows; gradients of ranks or adapters that have none left as they were."""
    grads, launches = check_backward(made(case), p=case["p"], sms=case["sms"])
    assert grads[1].dtype == (torch.float32 if case["float_adapters"] else DTYPES[case["name"]])
    assert names(launches) == ["order", "shrink", "expand", "gradients"]


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_what_is_needed_is_computed(needs):
    args = problem(ids_of("scattered", 90, 4), (8, 3, 0, 16), 72, 136, "bf16")
    _, launches = check_backward(args, p=0.3, needs=needs)
    need_x, need_A, need_B = needs
    expected = ["shrink"] * (need_x or need_A) + ["expand"] * need_x + ["gradients"] * (need_A or need_B)
    assert names(launches) == ["order", *expected]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_rows_at_all(p):
    """Kills: gradients that nobody writes where no kernel has a row."""
    args = problem((), (8, 3), 72, 136, "bf16")
    y, s, launches = run_forward(args, p=p)
    assert (y.shape, s.shape, launches) == ((0, 72), (0, 8), [])
    check_backward(args, p=p)


def test_leading_sizes():
    args = problem(ids_of("scattered", 24, 3), (8, 3, 16), 72, 136, "bf16")
    y, s, _ = run_forward(args)
    apart = args._replace(x=args.x.view(2, 3, 4, 136))
    y4, s4, _ = run_forward(apart)
    assert torch.equal(y4.view(24, 72), y)
    assert torch.equal(s4.view(24, 16), s)
    grad_y = torch.randn(24, 72).bfloat16()
    grads, *_ = run_backward(grad_y, s, args)
    grads4, *_ = run_backward(grad_y.view(2, 3, 4, 72), s4, apart)
    assert torch.equal(grads4[0].view(24, 136), grads[0])
    assert torch.equal(grads4[1], grads[1])


@pytest.mark.parametrize("rows", [13, 64, 90])
@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_a_row_has_the_same_bits_whatever_others_have(rows, name):
    """The base, too, is of all rows: those without an adapter have its bits. Kills: a zero that is added to a row
    without an adapter; parts of the depth that depend on how many rows an adapter has."""
    ids, sms = ids_of("scattered", rows, 4), 40
    args = problem(ids, (8, 24, 16, 5), 72, 264, name)
    grad_y, s = torch.randn(rows, 72).to(DTYPES[name]), saved_s(args)

    def results(others):
        other = args._replace(adapter_ids=torch.tensor(others))
        return run_forward(other, sms=sms)[0], run_backward(grad_y, s, other, sms=sms)[0][0]

    def bits(t, mine):
        return t[mine].view(torch.int16)

    first, base = results(ids), results([-1] * rows)
    none = torch.tensor(ids) < 0
    for a, b in zip(first, base):
        assert torch.equal(bits(a, none), bits(b, none))
    for slot in range(4):
        mine = torch.tensor(ids) == slot
        for others in (-1, (slot + 1) % 4, slot):
            for a, b in zip(first, results([i if i == slot else others for i in ids])):
                assert torch.equal(bits(a, mine), bits(b, mine))


@pytest.mark.parametrize("rows", [23, 140])
def test_an_adapter_that_holds_nan_spoils_its_own_rows(rows):
    """And a row that holds NaN spoils its own adapter's gradients. Kills: rows past a block's end that are stored, or
    summed."""
    args = problem(ids_of("scattered", rows, 4), (8, 24, 16, 5), 72, 136, "bf16")
    grad_y, s = torch.randn(rows, 72).bfloat16(), saved_s(args)
    clean = run_forward(args)[0], *run_backward(grad_y, s, args)[0]
    mine = args.adapter_ids == 2
    spoilt = args._replace(lora_A=args.lora_A.clone(), lora_B=args.lora_B.clone())
    spoilt.lora_A[2] = spoilt.lora_B[2] = torch.nan
    grad_y[mine] = torch.nan
    s[mine] = torch.nan
    ours = run_forward(spoilt)[0], *run_backward(grad_y, s, spoilt)[0]
    for a, b in zip(ours[:2], clean[:2]):
        assert a[mine].isnan().all()
        assert torch.equal(a[~mine], b[~mine])
    for a, b in zip(ours[2:], clean[2:]):
        assert a[2].isnan().any()
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])


@pytest.mark.parametrize(("rows", "name"), [(40, "bf16"), (400, "bf16"), (40, "tf32"), (400, "tf32")])
def test_order_of_blocks_and_warps_does_not_change_a_bit(rows, name):
    """Rows of two adapters are split between blocks, whose sums are added in order. Kills: adapters that share slots;
    partial sums in another block's place."""
    p = 0.0 if rows < 65 else 0.4
    args = problem([0 if i % 3 else 1 for i in range(rows)], (16, 24, 8), 72, 1048, name)
    grad_y, s = torch.randn(rows, 72).to(DTYPES[name]), saved_s(args, p)

    def run(**options):
        y, own_s, launches = run_forward(args, p=p, sms=MANY, **options)
        assert launches[-1 if rows < 65 else 1]["counters"] > 2
        grads, _, launches = run_backward(grad_y, s, args, p=p, sms=MANY, **options)
        assert rows < 65 or launches[-1]["counters"] > 0
        return y, own_s, *grads

    first = run(seed=1, resident_blocks=1)
    for seed, resident in ((2, 2), (3, 5), (4, 100)):
        for ours, reference in zip(run(seed=seed, resident_blocks=resident, stall_release=seed % 2 == 0), first):
            assert torch.equal(ours.view(torch.int16), reference.view(torch.int16))


@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_launches_of_one_backward_share_a_workspace(name):
    """Sums of parts of the depth for s', and behind them those of parts of the rows. Kills: the latter's place counted
    from behind the former twice, which is behind the end."""
    args = problem([0 if row % 3 else 1 for row in range(400)], (16, 24, 8), 1048, 72, name)
    _, launches = check_backward(args, sms=MANY)
    assert all(launch["counters"] > 0 for launch in launches if launch["name"] in ("shrink", "gradients"))


@pytest.mark.parametrize("rows", [30, 100])
def test_ids_and_ranks_that_are_out_of_range_touch_no_memory_of_others(rows):
    """The emulator refuses every access outside of the operands. Kills: numbers that are taken as they are, or their
    lower halves."""
    args = problem(ids_of("scattered", rows, 3), (8, 8, 8), 72, 136, "bf16")
    args.adapter_ids[::4] = torch.tensor([3, 2**40, -(2**40), -7, 2**31])[torch.arange(rows)[::4] % 5]
    y, s, _ = run_forward(args)
    run_backward(torch.randn(rows, 72).bfloat16(), s, args)
    none = args._replace(adapter_ids=torch.where((args.adapter_ids < 0) | (args.adapter_ids > 2), -1, args.adapter_ids))
    assert torch.equal(run_forward(none)[0], y)
    wide = args._replace(ranks=torch.tensor([2**40, 8, 8 - 2**40]))
    y, s, _ = run_forward(wide)
    run_backward(torch.randn(rows, 72).bfloat16(), s, wide)
    assert torch.equal(run_forward(wide._replace(ranks=torch.tensor([8, 8, 0])))[0], y)


@pytest.mark.parametrize("rows", [30, 100])
def test_strided_operands(rows):
    """Kills: a stride taken for a number of columns; numbers that lie apart."""
    args = problem(ids_of("scattered", rows, 3), (8, 3, 16), 72, 136, "bf16", bias=True)
    wide = torch.full((rows, 168), torch.nan).bfloat16()
    wide[:, 8:144] = args.x
    weight = torch.full((80, 160), torch.nan).bfloat16()
    weight[8:, 16:152] = args.weight
    lora_A = torch.full((3, 20, 152), torch.nan).bfloat16()
    lora_A[:, 4:, 8:144] = args.lora_A
    gaps = [torch.stack([t] * 3, 1)[:, 1] for t in (args.adapter_ids, args.ranks, args.scalings)]
    strided = args._replace(
        x=wide[:, 8:144], weight=weight[8:, 16:152], lora_A=lora_A[:, 4:, 8:144],
        lora_B=args.lora_B.permute(1, 2, 0).contiguous().permute(2, 0, 1), adapter_ids=gaps[0], ranks=gaps[1],
        scalings=gaps[2],
    )  # fmt: skip
    y, s, _ = check_forward(args)
    assert all(torch.equal(a, b) for a, b in zip(run_forward(strided)[:2], (y, s)))
    check_backward(strided, p=0.3)
    one = args._replace(scalings=torch.tensor([2.0]).expand(3))
    check_forward(one)
    check_backward(one)


def test_a_weight_in_columns_is_the_vendors():
    """Few rows, too. Kills: a weight that is read as if it lay in rows."""
    args = problem(ids_of("scattered", 20, 3), (8, 3, 16), 72, 136, "bf16", bias=True)
    for weight in (args.weight.t().contiguous().t(), torch.cat([args.weight.flatten()[:1], args.weight.flatten()])[1:]):
        *_, launches = check_forward(args._replace(weight=weight.view(72, 136) if weight.dim() == 1 else weight))
        assert names(launches) == ["order", "shrink", "expand"]
    *_, launches = check_forward(args, schedule="cublas")
    assert names(launches) == ["order", "shrink", "expand"]
    *_, launches = check_forward(args, p=0.3)
    assert names(launches) == ["order", "shrink", "expand"]


@pytest.mark.parametrize(("name", "depth"), [("bf16", 16), ("tf32", 8)])
def test_no_redundant_multiply_adds(name, depth):
    """Blocks that have no rows multiply nothing, and ranks that an adapter does not use cost nothing. Kills: rank tiles
    that are multiplied to be thrown away; rows of none among the blocks."""
    m, n, k = 256, 128, 256
    args = problem([-1] * 64 + [0] * 64 + [2] * 128, (16, 8, 128), n, k, name, most=128)
    *_, launches = run_forward(args, sms=1)
    per_tile = 16 * 8 * depth
    shrink = 64 * k * 64 + 128 * k * 128  # an adapter of 16 ranks has one tile of 64
    expand = 128 * n * (2 * depth + 128)  # tiles of 128 rows, and a stage's depth of the ranks
    done = {launch["name"]: launch["report"].multiply_adds * per_tile for launch in launches}
    assert done == {"order": 0, "shrink": shrink, "expand": expand}
    assert m == len(args.x)
