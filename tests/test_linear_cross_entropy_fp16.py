"""linear_cross_entropy in float16: sums over rows that only their mean makes small enough."""

import pytest
import torch
from head_loss import BF16, FP16, FP32, FP64, OPERANDS, in_memory, make_problem
from numerics import assert_as_accurate

import lora_kernels as lk

LOW = (BF16, FP16)


def many_rows(rows=6000):
    """Rows of one class, whose gradients add up to more than 65504, and to 13 in the mean."""
    problem = make_problem((rows,), bias=True, ignored=0.0)
    problem["x"][:, 0] = 20.0
    problem["labels"][: rows // 3 * 2] = 5
    return problem


def gradients(function, problem, dtype, factor, **how):
    t = {name: problem[name].to(dtype).requires_grad_() for name in OPERANDS}
    loss = function(**t, labels=problem["labels"], **how)
    return torch.autograd.grad(loss * factor, [t[name] for name in OPERANDS])


@pytest.mark.parametrize("backend", ["reference", None], ids=str)
@pytest.mark.parametrize(
    ("reduction", "factor"), [("mean", 1.0), ("mean", 64.0), ("sum", 2.0**-10), ("none", 1 / 6000)]
)
def test_a_sum_of_gradients_that_does_not_fit(reduction, factor, backend):
    """Kills gradients of parameters that are rounded before they are divided, and chunks of them that are."""
    problem = many_rows()
    one = torch.ones(6000) if reduction == "none" else torch.ones(())

    def summed(function):
        return lambda **t: (function(**t, reduction=reduction) * one.to(t["x"].device)).sum()

    with lk.use_backend(backend):
        ours = gradients(summed(lk.linear_cross_entropy), problem, FP16, factor)
    unfused = gradients(summed(in_memory), problem, FP16, factor)
    exact = gradients(summed(in_memory), problem, FP64, factor)
    assert exact[1].abs().max() / factor * (6000 if reduction == "mean" else 1) > 65504
    for name, a, b, c in zip(OPERANDS, ours, unfused, exact, strict=True):
        assert a.dtype == FP16
        assert a.isfinite().all(), name
        assert_as_accurate(a, b, c, name)


def test_autocast():
    """The leaves are float32, what the op gets is float16."""
    problem = many_rows()
    with torch.autocast("cpu", FP16):
        ours = gradients(lk.linear_cross_entropy, problem, FP32, 64.0)
    assert all(grad.dtype == FP32 and grad.isfinite().all() for grad in ours)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_compiled_and_checked(dtype):
    """The registered op says what its gradients are of: those of parameters are wide."""
    problem = make_problem(dtype=dtype)
    args = problem["x"], problem["weight"], problem["labels"], problem["lora_A"], problem["lora_B"], problem["bias"]
    args = tuple(t.requires_grad_() if t.is_floating_point() else t for t in args)
    numbers = 0.5, -100, 0.1, 5.0, 0.5
    op = torch.ops.lora_kernels.linear_cross_entropy.default
    assert [t.dtype for t in op(*args, *numbers, *(True,) * 5)] == [FP32, dtype, *(FP32,) * 4]
    torch.library.opcheck(op, (*args, *numbers, *(True,) * 5))
    torch.library.opcheck(op, (*args, *numbers, True, False, True, False, False), test_utils="test_faketensor")
    backward = torch.ops.lora_kernels.linear_cross_entropy_each_backward.default
    detached = tuple(t.detach() for t in args)
    torch.library.opcheck(backward, (*detached, torch.rand(37), *numbers, *(True,) * 5))
    eager = gradients(lk.linear_cross_entropy, problem, dtype, 1.0)
    compiled = torch.compile(lk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, gradients(compiled, problem, dtype, 1.0), strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)
