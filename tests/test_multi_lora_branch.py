"""multi_lora_shrink and multi_lora_expand_, the halves of a branch over a base output that is there: values against
loops in float64, and bad arguments.
"""

import pytest
import torch
from many_adapters import BATCHES, SCALINGS, make_problem
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401

import lora_kernels as lk
from lora_kernels import _native, dispatch
from lora_kernels.functional import RowOrder, multi_lora_branch_, multi_lora_expand_, multi_lora_shrink, row_order

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def branch_of(batch, base, x, lora_A, lora_B):
    """Row by row."""
    y = base.clone()
    for m, slot in enumerate(batch.ids):
        if slot >= 0:
            r = batch.ranks[slot]
            y[m] += SCALINGS[slot] * ((x[m] @ lora_A[slot, :r].t()) @ lora_B[slot, :, :r].t())
    return y


@pytest.fixture(params=["reference", None], ids=str)
def backend(request):
    """None: what dispatch chooses."""
    with lk.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP64, FP64)], ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_the_branch_over_a_base_output(batch, dtypes, ordered, backend):
    """Kills: ranks that an adapter does not use, which hold NaN; a factor of another adapter; rows without an adapter
    written to; columns beside y's.
    """
    problem = make_problem(batch, *dtypes, bias=False)
    x, lora_A, lora_B = problem["x"], problem["lora_A"], problem["lora_B"]
    wide = torch.randn(len(batch.ids), batch.n + 5).to(dtypes[0])
    base, ids, ranks = wide[:, 2 : 2 + batch.n].clone(), batch.ids_tensor(), torch.tensor(batch.ranks)
    before = wide.clone()
    y = multi_lora_branch_(
        wide[:, 2 : 2 + batch.n], x.to(dtypes[0]), lora_A.to(dtypes[1]), lora_B.to(dtypes[1]), ids, ranks=ranks,
        scaling=torch.tensor(SCALINGS[: len(batch.ranks)], dtype=FP64),
        order=row_order(ids, len(ranks)) if ordered else None,
    )  # fmt: skip
    exact, plain = (branch_of(batch, *(t.to(d) for t in (base, x, lora_A, lora_B))) for d in (FP64, dtypes[0]))
    assert_as_accurate(y, plain, exact)
    assert torch.equal(y[ids < 0], base[ids < 0])
    assert torch.equal(wide[:, :2], before[:, :2])
    assert torch.equal(wide[:, 2 + batch.n :], before[:, 2 + batch.n :])


def test_shrink_is_zero_where_no_adapter_has_ranks(backend):
    batch = BATCHES[0]
    problem = make_problem(batch, FP32, FP32, bias=False)
    x, lora_A = problem["x"].float(), problem["lora_A"].float()
    s = multi_lora_shrink(x, lora_A, batch.ids_tensor(), ranks=torch.tensor(batch.ranks))
    for m, slot in enumerate(batch.ids):
        rank = batch.ranks[slot] if slot >= 0 else 0
        assert not s[m, rank:].any()
        torch.testing.assert_close(s[m, :rank], lora_A[slot, :rank] @ x[m])


def test_all_leading_sizes(backend):
    batch = BATCHES[1]
    x, y = torch.randn(2, 4, batch.k), torch.randn(2, 4, batch.n)
    lora_A, lora_B = torch.randn(5, 8, batch.k), torch.randn(5, batch.n, 8)
    flat = multi_lora_branch_(y.view(8, -1).clone(), x.view(8, -1), lora_A, lora_B, batch.ids_tensor(), scaling=0.7)
    first, one_row = y[0, 0].clone(), batch.ids_tensor()[:1]
    assert torch.equal(multi_lora_branch_(y, x, lora_A, lora_B, batch.ids_tensor(), scaling=0.7), flat.view_as(y))
    alone = multi_lora_branch_(first, x[0, 0], lora_A, lora_B, one_row, scaling=0.7)
    torch.testing.assert_close(alone, flat[0])


def test_row_order():
    order = row_order(torch.tensor([2, -1, 0, 2, 9, 0]), 3)
    assert order.ends.tolist() == [2, 2, 4]
    assert order.rows[:4].tolist() == [2, 5, 0, 3]
    assert sorted(order.rows[4:].tolist()) == [1, 4]
    assert order.rows.dtype == order.ends.dtype == torch.int32


def halves(batch=BATCHES[0]):
    problem = make_problem(batch, FP32, FP32, bias=False)
    x, lora_A, lora_B = (problem[name].float().nan_to_num(0.5) for name in ("x", "lora_A", "lora_B"))
    return torch.randn(len(batch.ids), batch.n), x, lora_A, lora_B, batch.ids_tensor(torch.int32)


def test_registered_ops():
    y, x, lora_A, lora_B, ids = halves()
    ranks, scalings = torch.tensor([4, 1, 0, 7]), torch.tensor(SCALINGS[:4])
    order = row_order(ids, 4)
    op = torch.ops.lora_kernels
    torch.library.opcheck(op.multi_lora_shrink.default, (x, lora_A, ids, ranks, *order))
    torch.library.opcheck(op.multi_lora_shrink.default, (x, lora_A, ids, None, None, None))
    s = op.multi_lora_shrink.default(x, lora_A, ids, ranks, *order)
    torch.library.opcheck(op.multi_lora_expand_.default, (y, s, lora_B, ids, ranks, scalings, 1.0, *order))
    torch.library.opcheck(op.multi_lora_expand_.default, (y, s, lora_B, ids, None, None, 0.5, None, None))


@pytest.mark.skipif(_native.cpu is None, reason="lora_kernels._C is not built")
@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("multi_lora_shrink", {"lora_A": torch.ones(2, 4, 17)}, r"x must be \[..., k\] and lora_A"),
        ("multi_lora_shrink", {"adapter_ids": torch.zeros(4, dtype=torch.int32)}, "adapter_ids must be one integer"),
        ("multi_lora_shrink", {"adapter_ids": torch.full((3,), 2)}, "adapter_ids must be from -1"),
        ("multi_lora_shrink", {"ranks": torch.tensor([4, 5])}, "ranks must be from 0 to"),
        ("multi_lora_expand_", {"lora_B": torch.ones(2, 17, 4)}, r"y must be \[..., n\] and lora_B"),
        ("multi_lora_expand_", {"s": torch.ones(3, 5)}, r"s must be \[..., rank\]"),
        ("multi_lora_expand_", {"s": torch.ones(3, 4, dtype=BF16)}, "s must have y's dtype"),
        ("multi_lora_expand_", {"y": torch.ones(16, 3).t()}, "y must be a matrix in memory"),
        ("multi_lora_expand_", {"scalings": torch.ones(3)}, "scalings must be one number for each adapter"),
        ("multi_lora_expand_", {"ranks": torch.tensor([4, 5])}, "ranks must be from 0 to"),
    ],
)
def test_operands_of_the_registered_ops(op, changed, message):
    given = {"adapter_ids": torch.zeros(3, dtype=torch.int32), "ranks": None, "order": None, "ends": None}
    if op == "multi_lora_shrink":
        given |= {"x": torch.ones(3, 16), "lora_A": torch.ones(2, 4, 16)}
    else:
        given |= {"y": torch.ones(3, 16), "s": torch.ones(3, 4), "lora_B": torch.ones(2, 16, 4)}
        given |= {"scalings": None, "scaling": 1.0}
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.lora_kernels, op)(**given | changed)


@pytest.mark.parametrize(
    "who", [{"adapter_ids": torch.full((3,), 2)}, {"ranks": torch.tensor([4, 5])}], ids=["id", "rank"]
)
@pytest.mark.parametrize("op", ["multi_lora_shrink", "multi_lora_expand_"])
def test_the_reference_names_the_op_whose_numbers_are_out_of_range(op, who):
    """Kills: the name of ``multi_lora_linear``, with which it shares the loop over adapters."""
    given = {"adapter_ids": torch.zeros(3, dtype=torch.int32), "ranks": None} | who
    own = (torch.ones(3, 16), torch.ones(2, 4, 16))
    rest = ()
    if op == "multi_lora_expand_":
        own, rest = (torch.ones(3, 16), torch.ones(3, 4), torch.ones(2, 16, 4)), (None, 1.0)
    with lk.use_backend("reference"), pytest.raises(RuntimeError, match=f"^{op}: adapter_ids must be from -1 to 1, "):
        getattr(torch.ops.lora_kernels, op)(*own, *given.values(), *rest, None, None)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_whatever_others_have(threads):
    """Kills: panels whose rows meet each other's memory; a branch that depends on how many rows an adapter has."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, lora_A, lora_B, y = (torch.randn(size) for size in ((700, 40), (3, 8, 40), (3, 24, 8), (700, 24)))
        ids = torch.randint(-1, 3, (700,))
        together = multi_lora_branch_(y.clone(), x, lora_A, lora_B, ids, scaling=0.5)
        for slot in range(3):
            alone = torch.where(ids == slot, slot, -1)
            own = multi_lora_branch_(y.clone(), x, lora_A, lora_B, alone, scaling=0.5)
            assert torch.equal(own[ids == slot], together[ids == slot])
            assert torch.equal(own[ids != slot], y[ids != slot])
    finally:
        torch.set_num_threads(before)


def test_compiled_in_one_graph():
    y, x, lora_A, lora_B, ids = halves()

    def layer(y, x):
        return multi_lora_branch_(y.sin(), x, lora_A, lora_B, ids, scaling=0.5) + 1

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(y, x), layer(y, x))


def test_costs_and_why():
    y, x, lora_A, lora_B, ids = halves()
    (m, k), (adapters, rank, _), n = x.shape, lora_A.shape, y.shape[1]
    s = multi_lora_shrink(x, lora_A, ids)
    shrink, expand = (dispatch.specs()[name] for name in ("multi_lora_shrink", "multi_lora_expand_"))
    assert shrink.flops(x, lora_A, ids) == 2 * m * k * rank
    assert expand.flops(y, s, lora_B) == 2 * m * n * rank
    assert shrink.bytes(x, lora_A) == 4 * (m * k + m * rank + adapters * rank * k)
    assert expand.bytes(y, s, lora_B) == 4 * (2 * m * n + m * rank + adapters * n * rank)
    expected = "reference" if _native.cpu is None else "cpu"
    assert lk.why("multi_lora_shrink", x, lora_A, ids).backend == expected
    assert lk.why("multi_lora_expand_", y, s, lora_B, ids, scaling=2.0).backend == expected
    assert lk.why("multi_lora_shrink", x.double(), lora_A.double(), ids).backend == "reference"


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("backend", ["reference", None], ids=str)
def test_autograd_is_told_that_y_was_written(backend, registered):
    """exp saves y. Kills: a kernel that writes to it behind autograd's back, and a wrong gradient of x in silence."""
    *_, lora_B, ids = halves()
    x = torch.randn(23, 24, requires_grad=True)
    y, s = x.exp(), torch.randn(23, 7)
    with torch.no_grad(), lk.use_backend(backend):
        if registered:
            torch.ops.lora_kernels.multi_lora_expand_(y[:, :], s, lora_B, ids, None, None, 1.0, None, None)
        else:
            multi_lora_expand_(y[:, :], s, lora_B, ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


SIXTEEN_BITS = torch.ones(4, 7, 40, dtype=BF16), torch.ones(4, 24, 7, dtype=BF16)
BAD = {
    "x is a list": (TypeError, "x must be a tensor", {"x": [1.0]}),
    "x is of integers": (TypeError, "x must be float32", {"x": torch.ones(23, 40, dtype=torch.int64)}),
    "lora_A of another size": (ValueError, "lora_A must be", {"lora_A": torch.ones(4, 7, 41)}),
    "lora_A of another dtype": (TypeError, "lora_A must be torch.float32 like x", {"lora_A": SIXTEEN_BITS[0]}),
    "lora_B of another size": (ValueError, "lora_B must be", {"lora_B": torch.ones(4, 25, 7)}),
    "lora_B of another dtype": (TypeError, "lora_B must be torch.float32 like y", {"lora_B": SIXTEEN_BITS[1]}),
    "y of fewer rows": (ValueError, "s must be", {"y": torch.ones(22, 24)}),
    "y of one row for all": (ValueError, "y's rows must be adjacent", {"y": torch.ones(1, 24).expand(23, 24)}),
    "y in columns": (ValueError, "y's rows must be adjacent", {"y": torch.ones(24, 23).t()}),
    "ids are floats": (TypeError, "adapter_ids must be int32 or int64", {"ids": torch.zeros(23)}),
    "ids of fewer rows": (ValueError, r"adapter_ids must be \[23\]", {"ids": torch.zeros(22, dtype=torch.int32)}),
    "ids out of range": (ValueError, "adapter_ids must be from -1 to 3", {"ids": torch.full((23,), 4)}),
    "ranks of fewer": (ValueError, r"ranks must be \[4\]", {"ranks": torch.ones(3, dtype=torch.int32)}),
    "ranks of more": (ValueError, "multi_lora_shrink: ranks must be from 0 to 7, got 1 to 8", {
        "ranks": torch.tensor([1, 8, 7, 7])
    }),
    "ranks below zero": (ValueError, "multi_lora_shrink: ranks must be from 0 to 7, got -1", {
        "ranks": torch.tensor([1, -1, 7, 7])
    }),
    "order of others": (ValueError, r"order.rows must be \[23\]", {"order": row_order(torch.zeros(5).int(), 4)}),
    "order is wide": (TypeError, "order.ends must be int32", {
        "order": RowOrder(torch.zeros(23, dtype=torch.int32), torch.zeros(4, dtype=torch.int64))
    }),
    "scaling of fewer": (ValueError, "scaling must be a number", {"scaling": torch.ones(3)}),
    "scaling is text": (TypeError, "multi_lora_expand_: scaling must be a number, got str", {"scaling": "1"}),
    "scaling is infinite": (ValueError, "scaling must be finite", {"scaling": float("inf")}),
    "x requires grad": (ValueError, "requires grad", {"x": torch.ones(23, 40, requires_grad=True)}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    error, message, changed = BAD[case]
    y, x, lora_A, lora_B, ids = halves()
    given = {"y": y, "x": x, "lora_A": lora_A, "lora_B": lora_B, "ids": ids} | changed
    how = {name: given[name] for name in ("ranks", "order", "scaling") if name in given}
    before = given["y"].clone()
    with pytest.raises(error, match=message):
        multi_lora_branch_(*(given[name] for name in ("y", "x", "lora_A", "lora_B", "ids")), **how)
    assert torch.equal(given["y"], before)
