"""The CPU kernels of grouped_lora_linear: every schedule against float64, whichever dispatch would choose."""

import pytest
import torch
from grouped import SCALING, SEED, SIZES, Sizes, looped, make_problem, offsets_of, run
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.spec import Verdict
from lora_kernels.support import cpu, cpu_groups

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SCHEDULES = [
    (schedule, *dtypes)
    for schedules, dtypes in (
        (("spread aten", "spread onednn", "aten", "onednn"), (FP32, FP32)),
        (("aten", "upcast", "native", "spread aten"), (BF16, BF16)),
        (("aten", "upcast", "native", "spread aten"), (BF16, FP32)),
        (("upcast",), (FP16, FP16)),
    )
    for schedule in schedules
]
# Groups of several panels; of few rows each, which the kernel for few rows serves; wide factors.
SIZES = [*SIZES, Sizes((600, 3, 513), 40, 50, 5, behind=2), Sizes((1, 2, 3, 4, 5), 70, 90, 40)]

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="lora_kernels._C is not built")
native = torch.ops.lora_kernels_native


@pytest.fixture
def schedule(request, monkeypatch):
    """Has every call take this schedule."""
    if "onednn" in request.param and not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    if request.param == "native" and not cpu.has_native_matmul(BF16):
        pytest.skip("this CPU has no instructions for bfloat16")

    def forced(*sizes):
        is_backward = sizes[-1]
        return Verdict("aten" if request.param == "native" and not is_backward else request.param, "asked for")

    monkeypatch.setattr(cpu_groups, "verdict", forced)
    return request.param


@pytest.mark.parametrize(("schedule", "dtype", "adapter_dtype"), SCHEDULES, indirect=["schedule"], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(sizes, schedule, dtype, adapter_dtype):
    """Kills: parts of a group's gradients left out of its sum; gradients of groups without rows, or rows behind the
    last group, left as they were; the mask of another panel's rows; a row of the panel's neighbour taken for its own.
    """
    for p, shared, bias in ((0.0, False, "each"), (0.3, False, None), (0.1, True, "each"), (0.0, True, "one")):
        problem = make_problem(sizes, dtype, adapter_dtype, shared=shared, bias=bias)

        def torch_code(p=p, **tensors):
            return looped(**tensors, sizes=sizes, p=p)

        def ours(bias, p=p, **tensors):
            rest = {"scaling": SCALING, "dropout_p": p, "training": True, "seed": SEED}
            return lk.grouped_lora_linear(**tensors, offsets=offsets_of(sizes), bias=bias, **rest)

        results = zip(
            ("y", "dx", "dA", "dB"),
            run(problem, dtype, adapter_dtype, ours),
            run(problem, dtype, dtype, torch_code),
            run(problem, FP64, FP64, torch_code),
        )
        for name, a, b, c in results:
            assert a.dtype == (adapter_dtype if name in ("dA", "dB") else dtype)
            assert_as_accurate(a, b, c, f"{name} at p={p}, shared={shared}, bias={bias}")
    assert set(lk.stats()["served"]) == {("grouped_lora_linear", "cpu"), ("grouped_lora_linear_backward", "cpu")}


def problem_of(sizes, p=0.0, shared=False):
    t = {k: None if v is None else v.float() for k, v in make_problem(sizes, FP32, FP32, shared=shared).items()}
    seed = torch.tensor([SEED]) if p else None
    forward = *(t[k] for k in ("x", "weight", "lora_A", "lora_B")), offsets_of(sizes), None, seed, SCALING, p
    return forward, t["grad_y"]


def results_of(forward, grad_y, schedule, needs=(True, True, True)):
    """[y, s, dx, dA, dB] of the kernels themselves."""
    x, weight, lora_A, lora_B, offsets, _, seed, scaling, p = forward
    y, s = native.grouped_lora_linear(*forward, schedule)
    rest = weight, lora_A, lora_B, offsets, seed, scaling, p, *needs, schedule
    return [y, s, *native.grouped_lora_linear_backward(grad_y, x, s, *rest)]


@pytest.mark.parametrize(
    ("schedule", "dtype"), [("aten", FP32), ("spread aten", FP32), ("upcast", BF16), ("spread aten", BF16)], ids=str
)
def test_factors_lie_anyhow(schedule, dtype):
    """PEFT's lora_B is [n, rank, groups] in memory; both are views of the middle of larger ones here."""
    if schedule == "spread aten" and not cpu.has_native_matmul(dtype):
        pytest.skip(f"this CPU has no instructions for {dtype}")
    forward, grad_y = problem_of(Sizes((30, 0, 21, 2), 24, 40, 5, behind=2))
    x, weight, lora_A, lora_B, offsets, *rest = (
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in forward
    )
    wide_A, wide_B = torch.randn(24, 6, 4).to(dtype), torch.randn(40, 5, 6).to(dtype)
    wide_A[:, :5], wide_B[..., 1:5] = lora_A.permute(2, 1, 0), lora_B.permute(1, 2, 0)
    strided = wide_A[:, :5].permute(2, 1, 0), wide_B[..., 1:5].permute(2, 0, 1)
    for a, b in zip(
        results_of((x, weight, *strided, offsets, *rest), grad_y.to(dtype), schedule),
        results_of((x, weight, lora_A, lora_B, offsets, *rest), grad_y.to(dtype), schedule),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bits_do_not_depend_on_threads(p):
    """Kills: gradients of a group's panels added as threads finish; panels cut by the number of threads."""
    forward, grad_y = problem_of(Sizes((700, 0, 90, 1, 300), 72, 96, 16, behind=3), p)
    one = results_of(forward, grad_y, "spread aten")
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for name, a, b in zip(("y", "s", "dx", "dA", "dB"), one, results_of(forward, grad_y, "spread aten")):
                assert torch.equal(a, b), (name, threads)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("schedule", ["spread aten", "spread onednn", "aten", "onednn"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_not_needed_is_empty_and_changes_no_other(schedule, shared):
    if "onednn" in schedule and not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    forward, grad_y = problem_of(Sizes((30, 0, 21), 24, 40, 5, behind=2), 0.3, shared)
    _, _, *everything = results_of(forward, grad_y, schedule)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        _, _, *some = results_of(forward, grad_y, schedule, needs)
        for needed, a, b in zip(needs, some, everything):
            assert torch.equal(a, b) if needed else a.numel() == 0


@pytest.mark.parametrize("schedule", ["spread aten", "spread onednn", "aten", "onednn"])
def test_neighbours_do_not_spoil_a_group(schedule):
    """oneDNN is given rows of neighbours, too. Kills: their results among the group's."""
    if "onednn" in schedule and not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    sizes = Sizes((13, 11, 9), 24, 40, 4)
    forward, grad_y = problem_of(sizes)
    clean = results_of(forward, grad_y, schedule)
    x, dirty_grad = forward[0].clone(), grad_y.clone()
    x[:13], x[24:], dirty_grad[:13], dirty_grad[24:] = (torch.nan,) * 4
    dirty = results_of((x, *forward[1:]), dirty_grad, schedule)
    for a, b in zip(dirty[:3], clean[:3]):
        assert torch.equal(a[13:24], b[13:24])
    for a, b in zip(dirty[3:], clean[3:]):
        assert torch.equal(a[1], b[1])


def test_the_schedule_is_decided_by_sizes(monkeypatch):
    """Panels where there is something for every thread, by rows or by groups."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)

    def chosen(rows, shared=False, dtype=FP32):
        forward, _ = problem_of(Sizes(rows, 24, 40, 4), shared=shared)
        x, weight, lora_A, lora_B, offsets, *_ = forward
        t = (v.to(dtype) for v in (x, weight, lora_A, lora_B))
        return lk.why("grouped_lora_linear", *t, offsets)

    assert chosen((63, 64)).schedule == "aten"
    assert chosen((500, 12)).schedule == "spread aten"
    assert chosen((1,) * 8).schedule == "spread aten"
    assert chosen((1,) * 8, shared=True).schedule == "spread aten"
    assert "panels of up to 256 rows" in chosen((1,) * 8).reason
    assert "one group after the other" in chosen((1,) * 7).reason
    assert chosen((500, 500), dtype=FP64).backend == "reference"
    monkeypatch.setattr(cpu, "has_native_matmul", lambda dtype: dtype == BF16)
    assert chosen((500, 500), dtype=BF16).schedule == "spread aten"
    assert chosen((500, 500), dtype=FP16).schedule == "upcast"
    assert chosen((500, 500), shared=True, dtype=FP16).schedule == "spread upcast"


def operands():
    m, n, k, r, groups = 7, 24, 40, 8, 3
    return {
        "x": torch.randn(m, k), "weight": torch.randn(groups, n, k), "lora_A": torch.randn(groups, r, k),
        "lora_B": torch.randn(groups, n, r), "offsets": torch.tensor([2, 2, 6], dtype=torch.int32),
        "bias": torch.randn(groups, n), "seed": torch.tensor([3]), "grad_y": torch.randn(m, n), "s": torch.randn(m, r),
    }  # fmt: skip


MISFITS = {
    "x": [torch.randn(7, 48), torch.randn(7), torch.randn(7, 2, 40)],
    "weight": [torch.randn(3, 24, 32), torch.randn(2, 24, 40), torch.randn(40)],
    "lora_A": [torch.randn(3, 8, 32), torch.randn(2, 8, 40), torch.randn(3, 0, 40), torch.randn(8, 40)],
    "lora_B": [torch.randn(3, 16, 8), torch.randn(3, 24, 7), torch.randn(2, 24, 8), torch.randn(3, 24, 8).half()],
    "offsets": [
        torch.tensor([2, 1, 6], dtype=torch.int32), torch.tensor([2, 2, 8], dtype=torch.int32),
        torch.tensor([-1, 2, 6], dtype=torch.int32), torch.tensor([2, 2, 6]), torch.tensor([[2, 2, 6]]).int(),
    ],
    "bias": [torch.randn(2, 24), torch.randn(16), torch.randn(3, 24).double()],
    "seed": [torch.tensor([3], dtype=torch.int32), torch.tensor([3, 4])],
    "grad_y": [torch.randn(7, 16), torch.randn(6, 24), torch.randn(7, 24).double()],
    "s": [torch.randn(7, 7), torch.randn(6, 8)],
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("schedule", ["aten", "spread aten"])
def test_misfits_are_refused(name, schedule):
    for misfit in MISFITS[name]:
        t = {**operands(), name: misfit}
        forward = [t[k] for k in ("x", "weight", "lora_A", "lora_B", "offsets", "bias", "seed")]
        backward = [t[k] for k in ("grad_y", "x", "s", "weight", "lora_A", "lora_B", "offsets", "seed")]
        message = rf"\b{name}\b.* must (be|have)|must be .*\b{name}\b"  # a weight's columns are compared with x's
        if name not in ("grad_y", "s"):
            with pytest.raises(RuntimeError, match=message):
                native.grouped_lora_linear(*forward, 1.0, 0.1, schedule)
        if name != "bias":
            with pytest.raises(RuntimeError, match=message):
                native.grouped_lora_linear_backward(*backward, 1.0, 0.1, True, True, True, schedule)
