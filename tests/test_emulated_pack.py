"""The CUDA kernels of lora_pack and its gradients, and their binding, run by the emulator."""

from __future__ import annotations

import contextlib
import types

import emulated
import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from emulated import DTYPES
from emulated import run_backward as run_one_backward
from emulated import run_forward as run_one
from emulated_pack import check_backward, check_forward, numbers, problem, run_backward, run_forward, saved_s, steered
from pretended_gpu import pretend_gpu

import lora_kernels as lk
from lora_kernels import _native, dispatch
from lora_kernels.reasons import Reason
from lora_kernels.support import cuda

MANY = 1000  # SMs: more than there are tiles

CASES = covering_pairs(
    sizes=((70, 72), (130, 136)), ns=((136, 24, 40), (72,), (16, 264), (24, 8, 16, 136)),
    ranks=((16, 8, 16, 8), (24, 72, 8, 200), (8, 0, 16, 0), (0, 24, 0, 16)), name=tuple(DTYPES), p=(0.0, 0.3),
    bias=(False, True), float_adapters=(False, True), sms=(1, MANY),
)  # fmt: skip


def made(case):
    m, k = case["sizes"]
    options = {name: case[name] for name in ("bias", "float_adapters")}
    return problem(m, k, case["ns"], case["ranks"][: len(case["ns"])], case["name"], **options)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_is_as_accurate_as_torch(case):
    """Kills: a tile column off by one among members; one member's operands, scaling, mask or flag taken of another;
    a member without an adapter for whose s a tile waits."""
    *_, launches = check_forward(made(case), p=case["p"], sms=case["sms"])
    assert [launch["schedule"] for launch in launches] == ["pack"]
    assert launches[0]["counters_were_zero"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients_are_as_accurate_as_torch(case):
    """Kills: a member's product or branch left out of dX, or summed twice; the mask of another's; partial sums of one
    member taken for another's."""
    args = made(case)
    grads, launches = check_backward(args, p=case["p"], sms=case["sms"])
    assert [grad.dtype for grad in grads[1]] == [A.dtype for A in args[2]]
    adapters = sum(A.shape[0] > 0 for A in args[2])
    assert [launch["schedule"] for launch in launches] == ["pack"] + ["split rows"] * adapters
    assert all(launch["counters_were_zero"] for launch in launches)


@pytest.mark.parametrize("rank", [16, 24])
def test_large_and_small_tiles(rank):
    for sms, rows in ((1, 128), (MANY, 64)):
        args = problem(250, 248, (264, 72), (rank, 8), "bf16")
        check_forward(args, p=0.3, sms=sms)
        assert emulator.load_lora_pack().tile_rows() == [rows]
        check_backward(args, p=0.3, sms=sms)
        assert emulator.load_lora_pack().tile_rows() == [rows]


def test_each_member_has_its_scaling():
    """Kills: one factor for all."""
    steered()
    x, weights, lora_As, lora_Bs, _ = problem(70, 72, (136, 24, 40), (16, 8, 16), "bf16")
    scalings, ops = [0.5, -2.0, 3.0], torch.ops
    args = x, weights, lora_As, lora_Bs, [], None, scalings, [0.0] * 3
    ys, s = ops.lora_kernels_emulated_pack.lora_pack(*args, "one launch")
    want, want_s = ops.lora_kernels.lora_pack(*args)
    for a, b in zip((*ys, s), (*want, want_s)):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.1)
    grads = [torch.randn_like(y) for y in ys]
    args = grads, x, s, weights, lora_As, lora_Bs, None, scalings, [0.0] * 3, True, [True] * 3, [True] * 3
    found, expected = (op(*args, *more) for op, more in (
        (ops.lora_kernels_emulated_pack.lora_pack_backward, ("one launch",)), (ops.lora_kernels.lora_pack_backward, ())
    ))  # fmt: skip
    for a, b in zip((found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2])):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.5)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_pack_of_one_is_the_plain_kernel(p):
    """Bit for bit, and as many multiply-adds, with small tiles as with large ones."""
    args = problem(200, 264, (136,), (24,), "bf16", bias=True)
    plain = *(t[0] for t in args[1:4]), args[4][0]
    (y,), (s,), (launch,) = run_forward(args, p=p)
    other, other_s, _, (report,) = run_one(args[0], *plain, p=p, sms=1)
    for a, b in ((y, other), (s, other_s)):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    assert launch["report"].multiply_adds == report.multiply_adds
    grad_y, (saved,) = torch.randn(200, 136).bfloat16(), saved_s(args, p)
    ((grad_x, (grad_A,), (grad_B,)), _, _) = run_backward([grad_y], [saved], args, p=p)
    others, _ = run_one_backward(grad_y, args[0], saved, *plain[:3], p=p, sms=1)
    for a, b in zip((grad_x, grad_A, grad_B), others):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize(
    ("needs", "launches"),
    [
        (dict(need_x=True, need_A=[False] * 3, need_B=[False] * 3), ["pack"]),
        (dict(need_x=False, need_A=[False, True, False], need_B=[False] * 3), ["pack", "split rows"]),
        (dict(need_x=False, need_A=[False] * 3, need_B=[True, False, True]), ["split rows"] * 2),
    ],
)
def test_only_what_is_needed_is_computed(needs, launches):
    args = problem(70, 72, (136, 24, 40), (16, 8, 16), "bf16")
    grad_ys, ss = [torch.randn(70, n).bfloat16() for n in (136, 24, 40)], saved_s(args, 0.3)
    full, *_ = run_backward(grad_ys, ss, args, p=0.3)
    some, _, launched = run_backward(grad_ys, ss, args, p=0.3, **needs)
    assert [launch["schedule"] for launch in launched] == launches
    assert torch.equal(some[0], full[0]) if needs["need_x"] else some[0].numel() == 0
    for place, name in ((1, "need_A"), (2, "need_B")):
        for ours, whole, need in zip(some[place], full[place], needs[name]):
            assert torch.equal(ours, whole) if need else ours.numel() == 0


def test_no_rows_at_all():
    args = problem(0, 72, (136, 24), (16, 8), "bf16")
    ys, ss, launches = run_forward(args)
    assert [y.shape for y in ys] == [(0, 136), (0, 24)]
    assert launches == []
    grads, _, launches = run_backward([y for y in ys], ss, args)
    assert launches == []
    assert not any(grad.any() for grad in (*grads[1], *grads[2]))


@pytest.mark.parametrize(("ranks", "name"), [((16, 8, 16), "bf16"), ((72, 8, 24), "bf16"), ((16, 8, 16), "tf32")])
def test_order_of_blocks_and_warps_does_not_change_a_bit(ranks, name):
    args = problem(300, 72, (136, 24, 40), ranks, name)
    grad_ys, ss = [torch.randn(300, n).to(DTYPES[name]) for n in (136, 24, 40)], saved_s(args, 0.4)

    def run(**options):
        ys, own, _ = run_forward(args, p=0.4, sms=MANY, **options)
        (grad_x, grad_As, grad_Bs), _, _ = run_backward(grad_ys, ss, args, p=0.4, sms=MANY, **options)
        return *ys, *own, grad_x, *grad_As, *grad_Bs

    first = run(seed=1, resident_blocks=1)
    for seed, resident in ((2, 2), (3, 5), (4, 100)):
        for ours, reference in zip(run(seed=seed, resident_blocks=resident, stall_release=seed % 2 == 0), first):
            assert torch.equal(ours.view(torch.int16), reference.view(torch.int16))


def test_nan_of_a_member_stays_there():
    """But in dX, which is of all. Kills: a tile that reads another member's columns."""
    x, weights, lora_As, lora_Bs, _ = problem(70, 72, (136, 24, 40), (16, 8, 16), "bf16")
    for given in (weights, lora_As, lora_Bs):
        given[1].fill_(float("nan"))
    args = x, weights, lora_As, lora_Bs, []
    ys, *_ = run_forward(args)
    assert [bool(y.isnan().any()) for y in ys] == [False, True, False]
    grad_ys = [torch.randn(70, n).bfloat16() for n in (136, 24, 40)]
    (_, grad_As, grad_Bs), _, _ = run_backward(grad_ys, saved_s(args), args)
    assert [bool(grad.isnan().any()) for grad in (*grad_As, *grad_Bs)] == [False, True, False] * 2


@pytest.mark.parametrize(("name", "depth"), [("bf16", 16), ("tf32", 8)])
def test_no_redundant_multiply_adds(name, depth):
    m, k, ns, rank = 128, 256, (128, 64, 64), 16
    args = problem(m, k, ns, (rank,) * 3, name)
    *_, (launch,) = run_forward(args, sms=MANY)
    n = sum(ns)
    assert launch["report"].multiply_adds * 16 * 8 * depth == m * (k * (n + 3 * rank) + n * rank)
    grad_ys = [torch.randn(m, n).to(DTYPES[name]) for n in ns]
    _, _, (launch, *_) = run_backward(grad_ys, saved_s(args), args, sms=MANY)
    assert launch["report"].multiply_adds * 16 * 8 * depth == m * (k * n + n * rank + 3 * k * rank)


def test_strided_operands_are_read_in_place():
    """Kills: a stride taken for a number of columns."""
    x, weights, lora_As, lora_Bs, biases = problem(70, 72, (136, 24), (16, 8), "bf16")
    rows = torch.full((71, 96), float("nan")).bfloat16()
    rows[1:, 16:88] = x
    wide = [torch.full((len(w) + 1, 88), float("nan")).bfloat16() for w in weights]
    for to, w in zip(wide, weights):
        to[1:, 8:80] = w
    strided = rows[1:, 16:88], [w[1:, 8:80] for w in wide], lora_As, lora_Bs, biases
    for a, b in zip(run_forward(strided, p=0.3)[0], run_forward((x, weights, lora_As, lora_Bs, biases), p=0.3)[0]):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("place", "given"),
    [
        (1, lambda w: w.t().contiguous().t()),
        (1, lambda w: torch.randn(len(w), 81).bfloat16()[:, 4:76]),
        (2, lambda A: A[:5]),
    ],
)
def test_what_is_not_served_is_refused(place, given):
    """By the binding; dispatch sends it to members' own launches."""
    args = list(problem(70, 72, (136, 24), (16, 8), "bf16"))
    args[place] = [given(args[place][0]), args[place][1]]
    if place == 2:
        args[3] = [args[3][0][:, :5], args[3][1]]
    op = torch.ops.lora_kernels_emulated_pack.lora_pack
    with pytest.raises(RuntimeError, match="lora_pack: the CUDA kernels serve"):
        op(*args, *numbers(args, 0.0), "one launch")


@pytest.fixture
def cuda_on_the_cpu(monkeypatch):
    """cuda_on_the_cpu(**planned): tensors on the CPU are served by the CUDA backend, emulated, whose plan says this."""

    def pretend(**planned):
        steered()
        emulated.steered()
        pretend_gpu(monkeypatch)
        asked = []

        def plan(**problem):
            asked.append(problem)
            return planned

        monkeypatch.setattr(cuda, "_limits", lambda device: {})
        monkeypatch.setattr(
            _native, "cuda", types.SimpleNamespace(plan_lora_pack=plan, plan_lora_pack_backward=lambda **p: [plan(**p)])
        )
        cuda._planned_pack.cache_clear()
        monkeypatch.setitem(dispatch._ORDER, "cpu", ("cuda", "reference"))
        ops, one = torch.ops.lora_kernels_emulated_pack, torch.ops.lora_kernels_emulated
        for op, of in (("lora_pack", ops), ("lora_pack_backward", ops), ("lora_linear", one)):
            monkeypatch.setitem(dispatch._native_ops, op, getattr(of, op))
        monkeypatch.setitem(dispatch._native_ops, "lora_linear_backward", one.lora_linear_backward)
        return asked

    yield pretend
    cuda._planned_pack.cache_clear()


@pytest.mark.parametrize(("schedule", "launches"), [("ticketed", 1), ("one by one", 2)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_backend_serves_the_function(schedule, launches, p, cuda_on_the_cpu):
    """In one launch, or one member after the other. Kills: another member's seed in either."""
    asked = cuda_on_the_cpu(schedule=schedule, reason="as planned")
    x, weights, lora_As, lora_Bs, _ = problem(50, 72, (136, 24, 40), (8, 16, 8), "bf16")
    members = x, weights, [lora_As[0], None, lora_As[2]], [lora_Bs[0], None, lora_Bs[2]]
    leaves = [t.requires_grad_() for t in (x, lora_As[0], lora_As[2], lora_Bs[0], lora_Bs[2])]
    rest = dict(scalings=[0.5, 1.0, 2.0], dropout_p=p, training=True, seed=5)
    assert lk.why("lora_pack", *members, **rest)[:2] == ("cuda", schedule)
    results = []
    for backend in ("cuda", "reference"):
        lk.reset_stats()
        with lk.use_backend(backend):
            ys = lk.lora_pack(*members, **rest)
            grads = torch.autograd.grad(sum(y.float().square().sum() for y in ys), leaves)
        results.append([*ys, *grads])
        if backend == "cuda":
            served = lk.stats()["served"]
            assert served["lora_pack", "cuda"] == served["lora_pack_backward", "cuda"] == 1
            assert served.get(("lora_linear", "cuda"), 0) == (2 if launches == 2 else 0)
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()
    assert len(asked) == 2
    assert asked[0] == dict(dtype="bf16", m=50, n=(136, 24, 40), k=72, rank=(8, 0, 8), is_served=True, schedule="auto")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(ranks=(8, 257)), Reason.RANK),
        (dict(dtype=torch.float64), Reason.DTYPE),
        (dict(dtype=torch.float32), Reason.FP32_STRICT),
        (dict(ns=(72, 0)), Reason.LAYOUT),
    ],
)
def test_verdicts(change, reason, cuda_on_the_cpu):
    cuda_on_the_cpu()
    sizes = dict(ns=(72, 16), ranks=(8, 8), dtype=torch.bfloat16) | change
    dtype, x = sizes["dtype"], torch.zeros(5, 40, dtype=sizes["dtype"])
    weights = [torch.zeros(n, 40, dtype=dtype) for n in sizes["ns"]]
    lora_As = [torch.zeros(r, 40, dtype=dtype) for r in sizes["ranks"]]
    lora_Bs = [torch.zeros(n, r, dtype=dtype) for n, r in zip(sizes["ns"], sizes["ranks"])]
    assert cuda.pack_verdict(x, weights, lora_As, lora_Bs, backward=False) == (None, reason)


def test_what_one_launch_serves_is_asked_of_the_tensors(cuda_on_the_cpu):
    """Kills: operands that the binding refuses, offered to it."""
    asked = cuda_on_the_cpu(schedule="ticketed", reason="as planned")
    flat = torch.zeros(80 * 160 + 8).bfloat16()
    x = torch.zeros(70, 136).bfloat16()
    for begin, strides, served in [
        (0, (160, 1), True), (8, (160, 1), True), (1, (160, 1), False), (0, (158, 1), False), (0, (1, 80), False),
    ]:  # fmt: skip
        weights = [flat.as_strided((72, 136), strides, begin)] * 2
        lora_As, lora_Bs = [torch.zeros(8, 136).bfloat16()] * 2, [torch.zeros(72, 8).bfloat16()] * 2
        cuda._planned_pack.cache_clear()
        cuda.pack_verdict(x, weights, lora_As, lora_Bs, backward=False)
        assert asked[-1]["is_served"] == served, (begin, strides)
        args = x, weights, lora_As, lora_Bs, []
        with contextlib.nullcontext() if served else pytest.raises(RuntimeError, match="chunks of 16 bytes"):
            run_forward(args)
    many = [torch.zeros(72, 136).bfloat16()] * 5
    verdict = cuda.pack_verdict(
        x, many, [torch.zeros(8, 136).bfloat16()] * 5, [torch.zeros(72, 8).bfloat16()] * 5, backward=False
    )
    assert verdict == ("one by one", Reason.MEMBERS)
