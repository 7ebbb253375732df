"""The two halves of ``multi_lora_linear``'s branch, each by itself, in Triton's interpreter. Run by
test_triton_multi.py. Not in bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from covering import case_id, covering_pairs
from many_adapters import SCALINGS, Batch, make_problem, scattered
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.functional.multi_branch import multi_lora_expand_, multi_lora_shrink, row_order
from lora_kernels.integrations.serving import AdapterSlots, LoRAPool, ServingStep
from lora_kernels.support import triton as _triton

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64

PROBLEMS = {
    "few rows": Batch(scattered(23, 4), (4, 1, 0, 7), 40, 24),
    "many rows": Batch(scattered(131, 3), (16, 33, 2), 65, 70),
    "one row": Batch((1,), (4, 5), 48, 30),
    "no adapter": Batch((-1,) * 9, (4, 4), 16, 20),
}
AXES = {
    "problem": list(PROBLEMS),
    "dtypes": [(FP32, FP32), (FP16, FP16), (FP16, FP32)],
    "is_ordered": [False, True],
    "integers": [torch.int32, torch.int64],
    "are_mixed": [False, True],
}


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_halves(case):
    """Kills: s left as it was where no adapter has ranks; a rank that is not the adapter's, where pools hold NaN; an
    order that is looked up in place of the one that is given; columns beside those of y written to.
    """
    batch, dtypes, integers, are_mixed = PROBLEMS[case["problem"]], case["dtypes"], case["integers"], case["are_mixed"]
    if not are_mixed:
        batch = batch._replace(ranks=(batch.rank,) * len(batch.ranks))
    problem = make_problem(batch, *dtypes, bias=False)
    x, lora_A, lora_B = problem["x"], problem["lora_A"], problem["lora_B"]
    ids = batch.ids_tensor(integers)
    ranks = torch.tensor(batch.ranks, dtype=integers) if are_mixed else None
    how = {"ranks": ranks, "order": row_order(ids, len(batch.ranks)) if case["is_ordered"] else None}
    scaling = torch.tensor(SCALINGS[: len(batch.ranks)]) if are_mixed else 0.75
    wide = torch.randn(len(batch.ids), batch.n + 3).to(dtypes[0])
    base, beside = wide[:, : batch.n].clone(), wide[:, batch.n :].clone()
    with lk.use_backend("triton"):
        s = multi_lora_shrink(x.to(dtypes[0]), lora_A.to(dtypes[1]), ids, **how)
        multi_lora_expand_(wide[:, : batch.n], s, lora_B.to(dtypes[1]), ids, scaling=scaling, **how)
    assert set(lk.stats()["served"]) == {("multi_lora_shrink", "triton"), ("multi_lora_expand_", "triton")}

    def loop(dtype):
        inner, y = torch.zeros(len(ids), batch.rank, dtype=dtype), base.to(dtype)
        for m, slot in enumerate(batch.ids):
            if slot >= 0:
                r, factor = batch.ranks[slot], SCALINGS[slot] if are_mixed else 0.75
                inner[m, :r] = x[m].to(dtype) @ lora_A[slot, :r].to(dtype).t()
                y[m] += factor * (inner[m, :r] @ lora_B[slot, :, :r].to(dtype).t())
        return inner, y

    for name, a, b, c in zip(("s", "y"), (s, wide[:, : batch.n]), loop(dtypes[0]), loop(FP64)):
        assert a.dtype == dtypes[0]
        assert_as_accurate(a, b, c, name)
    assert torch.equal(wide[:, batch.n :], beside)
    assert torch.equal(wide[ids < 0, : batch.n], base[ids < 0])


def test_the_order_is_the_one_that_is_given():
    """Kills: a look-up although the order of the step is there; it is of other ids here."""
    x, lora_A = torch.randn(70, 16), torch.randn(2, 4, 16)
    ids, others = torch.zeros(70, dtype=torch.int32), torch.ones(70, dtype=torch.int32)
    with lk.use_backend("triton"):
        s = multi_lora_shrink(x, lora_A, ids, order=row_order(others, 2))
    torch.testing.assert_close(s, x @ lora_A[1].t())


@pytest.mark.parametrize("rows", [5, 70])
def test_more_ranks_than_one_adapter_may_have(rows):
    """Three slices of 128 ranks are shrunk at once."""
    x, lora_A, ids = torch.randn(rows, 32), torch.randn(2, 384, 32), torch.arange(rows) % 2
    with lk.use_backend("triton"):
        s = multi_lora_shrink(x, lora_A, ids, ranks=torch.tensor([384, 300]))
    expected = torch.stack([lora_A[i % 2] @ x[i] for i in range(rows)])
    expected[1::2, 300:] = 0.0
    torch.testing.assert_close(s, expected)


@pytest.mark.parametrize("rows", [8, 80])
def test_recorded_launches_serve_the_next_step(rows, monkeypatch):
    """What a graph replays: launches with the arguments that they had, after the step's buffers were filled anew."""
    from lora_kernels.triton_kernels import multi_lora_branch

    pool = LoRAPool(3, 8, 24, (12, 20))
    slots = AdapterSlots(3, {"layer": pool})
    pairs = {name: [(torch.randn(r, 24), torch.randn(n, r)) for n in (12, 20)] for name, r in (("a", 3), ("b", 8))}
    for name, factor in (("a", 0.5), ("b", 2.0)):
        slots.load(name, {"layer": pairs[name]}, scaling=factor)
    step, recorded = ServingStep(rows, slots), []
    step.fill(["a"] * rows)
    x, y = torch.randn(rows, 24), torch.randn(rows, 32)
    run_all = multi_lora_branch.run_all

    def recording(launches, device):
        recorded.append(list(launches))
        run_all(launches, device)

    monkeypatch.setattr(multi_lora_branch, "run_all", recording)
    with lk.use_backend("triton"):
        pool.add_(y, x, step)
    assert [len(launches) for launches in recorded] == [1, 1, 1]  # the order was known

    step.fill(["b", None, "a"], [rows // 2, 2, rows // 4])
    x.copy_(torch.randn(rows, 24))
    y.copy_(base := torch.randn(rows, 32))
    monkeypatch.undo()
    # The first slice alone: what stands between the launches is torch's. s is zero where a graph begins, too.
    recorded[0][0].args[0].inner.data.zero_()
    run_all([*recorded[0], *recorded[1]], x.device)
    expected = base.clone()
    for m, name in enumerate(["b"] * (rows // 2) + [None] * 2 + ["a"] * (rows // 4)):
        if name is not None:
            A, B = pairs[name][0]
            expected[m, :12] += {"a": 0.5, "b": 2.0}[name] * (x[m] @ A.t()) @ B.t()
    torch.testing.assert_close(y, expected)


def test_what_triton_refuses():
    x, ids = torch.randn(3, 16, dtype=FP64), torch.zeros(3, dtype=torch.int32)
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="dtype not served"):
        multi_lora_shrink(x, torch.randn(2, 4, 16, dtype=FP64), ids)
    s, lora_B = torch.randn(3, 300), torch.randn(2, 16, 300)
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="rank above 256"):
        multi_lora_expand_(torch.randn(3, 16), s, lora_B, ids)
    assert _triton.branch_verdict(torch.randn(3, 16).half(), 16, 4, 2, 4).schedule == "by row"
    assert _triton.branch_verdict(torch.randn(70, 16).half(), 16, 4, 2, 4).schedule == "by adapter"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("shrink", dict(lora_A=torch.ones(2, 4, 17)), "x must be .* lora_A a pool"),
        ("shrink", dict(adapter_ids=torch.zeros(4, dtype=torch.int32)), "adapter_ids must be one integer"),
        ("shrink", dict(order=torch.zeros(4, dtype=torch.int32)), r"order must be int32 \[3\]"),
        ("shrink", dict(ends=torch.zeros(2, dtype=torch.int64)), r"ends must be int32 \[2\]"),
        ("expand", dict(lora_B=torch.ones(2, 17, 4)), "y must be .* lora_B a pool"),
        ("expand", dict(s=torch.ones(3, 5)), "s must be"),
        ("expand", dict(scalings=torch.ones(3)), "scalings must be one number for each adapter"),
    ],
)
def test_operands_of_the_registered_ops(name, args, message):
    ids, ends = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    common = {"adapter_ids": ids, "ranks": None}
    if name == "shrink":
        given = {"x": torch.ones(3, 16), "lora_A": torch.ones(2, 4, 16), **common, "order": ids, "ends": ends}
        op = torch.ops.lora_kernels.multi_lora_shrink
    else:
        given = {"y": torch.ones(3, 16), "s": torch.ones(3, 4), "lora_B": torch.ones(2, 16, 4), **common}
        given |= {"scalings": None, "scaling": 1.0, "order": ids, "ends": ends}
        op = torch.ops.lora_kernels.multi_lora_expand_
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        op(**{**given, **args})
