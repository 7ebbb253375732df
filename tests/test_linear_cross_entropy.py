"""linear_cross_entropy: values and gradients against float64, with all logits in memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from covering import case_id, covering_pairs
from head_loss import (
    BF16,
    FP16,
    FP32,
    FP64,
    OPERANDS,
    assert_all_as_accurate,
    in_memory,
    leaves_of,
    loss_and_gradients,
    make_problem,
)
from numerics import assert_as_accurate
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.ops import cross_entropy_rows, vocabulary_chunks
from lora_kernels.support import cpu

DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP64, FP64)]
"""Of x and of the adapter."""


@pytest.fixture(params=["reference", None], ids=str)
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks of each problem, the last of them ragged."""
    monkeypatch.setattr(vocabulary_chunks, "LEAST_ROWS", 16)
    monkeypatch.setattr(vocabulary_chunks, "CPU_AREA", 16 * 61)


CASES = covering_pairs(
    dtypes=DTYPES, columns=[61, 2, 300], lead=[(37,), (2, 19), (3, 1, 5)], rank=[0, 1, 4], bias=[False, True],
    reduction=["mean", "sum", "none"], label_smoothing=[0.0, 0.1], softcap=[None, 3.0], logit_scale=[None, 0.25],
    ignored=[0.0, 0.3],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case, backend):
    (dtype, adapter_dtype), how = case["dtypes"], {"scaling": 0.5}
    how |= {name: case[name] for name in ("reduction", "label_smoothing", "softcap", "logit_scale")}
    problem = make_problem(case["lead"], case["columns"], rank=case["rank"], bias=case["bias"], ignored=case["ignored"])
    grad = torch.rand(case["lead"]) if case["reduction"] == "none" else torch.tensor(0.7)
    assert_all_as_accurate(lk.linear_cross_entropy, problem, dtype, adapter_dtype, grad, **how)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_wide_range_of_logits_and_long_rows(dtype):
    """Sums over many columns, of logits whose exponentials do not fit into fp32; kills a largest logit that is not
    subtracted.
    """
    problem = make_problem((33,), 5000, 40)
    problem["x"] *= 40
    assert_all_as_accurate(lk.linear_cross_entropy, problem, dtype)


@pytest.mark.parametrize("has_native", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_values_on_a_cpu_with_and_without_products_of_16_bits(dtype, has_native, monkeypatch):
    """Kills a wide product of one panel of the weight only, and a gradient that is not narrowed for the vendor."""
    monkeypatch.setattr(cpu, "has_native_matmul", lambda d: has_native or d not in (BF16, FP16))
    problem = make_problem((70,), 9000, 160)
    assert_all_as_accurate(lk.linear_cross_entropy, problem, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift(reduction, backend):
    """labels[..., 1:] belong to x[..., :-1, :]; kills labels that move over the end of their sequence."""
    problem = make_problem((3, 13))
    ours = loss_and_gradients(lk.linear_cross_entropy, problem, FP64, shift=True, reduction=reduction)
    exact = loss_and_gradients(in_memory, problem, FP64, shift=True, reduction=reduction)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_strides(backend):
    problem = make_problem((9, 4), 50, 20, bias=True)
    whole = problem["x"].float().repeat(2, 1, 2)
    views = {
        "x": whole[::2, :, ::2],
        "weight": problem["weight"].float().t().contiguous().t(),
        "lora_A": problem["lora_A"].float().repeat(1, 2)[:, ::2],
        "lora_B": problem["lora_B"].float().t().contiguous().t(),
        "bias": problem["bias"].float().repeat_interleave(2)[::2],
        "labels": problem["labels"].t().contiguous().t(),
    }
    strided = {name: t if name == "labels" else t.detach().requires_grad_() for name, t in views.items()}
    plain = {name: t.detach().contiguous().requires_grad_(name != "labels") for name, t in views.items()}
    a, b = lk.linear_cross_entropy(**strided), lk.linear_cross_entropy(**plain)
    torch.testing.assert_close(a, b)
    for c, d in zip(
        torch.autograd.grad(a, [strided[n] for n in OPERANDS]), torch.autograd.grad(b, [plain[n] for n in OPERANDS])
    ):
        torch.testing.assert_close(c, d)


def test_labels_are_int32_too():
    problem = make_problem()
    a = lk.linear_cross_entropy(**problem)
    assert torch.equal(a, lk.linear_cross_entropy(**{**problem, "labels": problem["labels"].int()}))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (5,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(lead, reduction, backend):
    """No rows, or none whose label counts: a mean is NaN, as torch has it, and every gradient is zero."""
    problem = make_problem(lead, ignored=2.0)
    loss, *grads = loss_and_gradients(lk.linear_cross_entropy, problem, FP32, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    assert not any(grad.any() for grad in grads)


def test_one_class(backend):
    loss, *grads = loss_and_gradients(lk.linear_cross_entropy, make_problem(columns=1), FP32, label_smoothing=0.1)
    assert all(t.abs().max() < 1e-6 for t in (loss, *grads))


def test_rows_that_do_not_count_may_hold_anything():
    problem = make_problem()
    ignored = problem["labels"] == -100
    problem["x"][ignored] = math.nan
    loss, grad_x, *grads = loss_and_gradients(lk.linear_cross_entropy, problem, FP32)
    assert loss.isfinite()
    assert not grad_x[ignored].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_nan_and_infinity_show(backend):
    """Kills a largest logit, a clamp or a sum that swallows a NaN."""
    for value, column in ((math.nan, 3), (math.nan, 59), (math.inf, 7)):
        problem = make_problem(bias=True, ignored=0.0)
        problem["bias"][column] = value
        for how in ({}, {"softcap": 5.0}):
            if value == math.inf and how:
                continue  # a cap makes it a number
            loss, grad_x, *_ = loss_and_gradients(lk.linear_cross_entropy, problem, FP32, **how)
            assert loss.isnan()
            assert grad_x.isnan().all()


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("weight",), ("bias",), ("lora_A", "lora_B")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_needs_a_gradient_gets_one(needs, reduction, backend):
    problem = make_problem()
    everything = loss_and_gradients(lk.linear_cross_entropy, problem, FP64, reduction=reduction)[1:]
    t = {name: problem[name].detach().requires_grad_(name in needs) for name in OPERANDS}
    loss = lk.linear_cross_entropy(**t, labels=problem["labels"], reduction=reduction)
    for name, grad in zip(needs, torch.autograd.grad(loss, [t[name] for name in needs], torch.ones_like(loss))):
        torch.testing.assert_close(grad, everything[OPERANDS.index(name)])


def test_the_same_bits_on_every_run():
    problem = make_problem((300,), 500)
    first, *others = (loss_and_gradients(lk.linear_cross_entropy, problem, FP32) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_backward_twice():
    x, weight, *_ = leaves_of(make_problem(), FP32)
    loss = lk.linear_cross_entropy(x, weight, torch.randint(0, 61, (37,)))
    first, second = (torch.autograd.grad(loss, [x, weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    grad = torch.autograd.grad(loss.square(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_is_saved():
    """dX and the adapter's gradients for a sum, the operands for each row: never logits."""
    x, weight, lora_A, lora_B, _ = leaves_of(make_problem((100,), 400), FP32)
    weight.requires_grad_(False)
    labels = torch.randint(0, 400, (100,))

    def saved(reduction):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
            lk.linear_cross_entropy(x, weight, labels, lora_A, lora_B, reduction=reduction)
        return {size for size in sizes if size not in ((), (0,))}

    assert saved("sum") == {x.shape, lora_A.shape, lora_B.shape}
    assert saved("none") == {x.shape, weight.shape, lora_A.shape, lora_B.shape, labels.shape}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing(reduction):
    problem = make_problem()
    _, *plain = loss_and_gradients(lk.linear_cross_entropy, problem, FP32, reduction=reduction)
    for reentrant in (False, True):
        x, weight, *others = leaves = leaves_of(problem, FP32)
        loss = checkpoint(
            lambda x, w, *rest: lk.linear_cross_entropy(x, w, problem["labels"], *rest, reduction=reduction),
            x, weight, *others, use_reentrant=reentrant,
        )  # fmt: skip
        loss.sum().backward()
        assert all(torch.equal(a, leaf.grad) for a, leaf in zip(plain, leaves, strict=True))


def test_autocast_follows_linear():
    problem = make_problem(dtype=FP32)
    with torch.autocast("cpu", BF16):
        ours = loss_and_gradients(lk.linear_cross_entropy, problem, FP32)
        unfused = loss_and_gradients(in_memory, problem, FP32)
    exact = loss_and_gradients(in_memory, problem, FP64)
    for a, b, c in zip(ours, unfused, exact, strict=True):
        assert a.dtype == FP32
        assert_as_accurate(a.bfloat16(), b, c)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compile(reduction):
    problem = make_problem((2, 19))
    how = {"reduction": reduction, "softcap": 5.0, "shift": True}
    plain = loss_and_gradients(lk.linear_cross_entropy, problem, FP32, **how)
    compiled = torch.compile(lk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(plain, loss_and_gradients(compiled, problem, FP32, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 4])
def test_opcheck(rank):
    problem = make_problem(rank=rank)
    x, weight, lora_A, lora_B, bias = leaves_of(problem, FP32)
    args = x, weight, problem["labels"], lora_A, lora_B, bias
    numbers = 0.5, -100, 0.1, 5.0, 0.5
    needs = True, True, rank > 0, rank > 0, True
    torch.library.opcheck(torch.ops.lora_kernels.linear_cross_entropy.default, (*args, *numbers, *needs))
    torch.library.opcheck(torch.ops.lora_kernels.linear_cross_entropy_each.default, (*args, *numbers))
    detached = [None if t is None else t.detach() for t in args]
    backward = torch.ops.lora_kernels.linear_cross_entropy_each_backward.default
    torch.library.opcheck(backward, (*detached, torch.rand(37), *numbers, *needs))


def test_a_gradient_that_forward_was_not_asked_for():
    problem = make_problem(rank=0)
    x, weight, *_ = leaves_of(problem, FP32)
    op = torch.ops.lora_kernels.linear_cross_entropy.default
    loss = op(x, weight, problem["labels"], None, None, None, 1.0, -100, 0.0, 0.0, 1.0, *(False,) * 5)[0]
    with pytest.raises(RuntimeError, match="was not asked for"):
        loss.backward()


def test_inference():
    problem = make_problem(dtype=FP32)
    with torch.inference_mode():
        ours = lk.linear_cross_entropy(**problem)
    torch.testing.assert_close(ours, lk.linear_cross_entropy(**problem))
    assert lk.stats()["served"] == {("linear_cross_entropy", "cpu"): 2}
    assert lk.why("linear_cross_entropy", **problem).backend == "cpu"
    assert lk.why(
        "linear_cross_entropy", *(problem[n].double() for n in OPERANDS[:2]), problem["labels"]
    ).reason.endswith(lk.Reason.DTYPE)


def test_it_is_torchs_function_for_the_plain_case():
    x, weight, *_ = leaves_of(make_problem(), FP32)
    labels = torch.randint(0, 61, (37,))
    torch.testing.assert_close(lk.linear_cross_entropy(x, weight, labels), F.cross_entropy(F.linear(x, weight), labels))


def test_the_cpu_kernel_knows_a_label_that_is_no_column():
    """As the function's check is not the op's. Kills: a bound of labels off by one, a row that is filled short."""
    labels, loss = torch.tensor([37, -1, 36, -100]), cross_entropy_rows.Loss(-100, 0.1, 0.0, 1.0)
    logits, weights = torch.randn(4, 37), torch.rand(4)
    results = cross_entropy_rows.native(logits.clone(), labels, weights, loss, FP32)
    expected = cross_entropy_rows.reference(logits.clone(), labels, weights, loss, FP32)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert ours[:2].isnan().all()
        assert not ours[3].any()
