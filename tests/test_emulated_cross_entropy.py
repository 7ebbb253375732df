"""The CUDA kernel of linear_cross_entropy and its binding, emulated: values, gradients, orders of blocks, faults."""

from __future__ import annotations

import math

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from head_loss import assert_all_as_accurate, make_problem
from numerics import assert_as_accurate
from pretended_gpu import pretend_gpu

import lora_kernels as lk
from lora_kernels.ops import cross_entropy_rows, linear_cross_entropy, vocabulary_chunks
from lora_kernels.ops.cross_entropy_rows import Loss
from lora_kernels.spec import Kernel

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(scope="module", autouse=True)
def native():
    """The module that the tests steer the launches with."""
    return emulator.load_cross_entropy_rows()


def run(logits, labels, grads, loss, dtype, **options):
    """(losses, gradient); the logits are overwritten, as the kernel does."""
    emulator.load_cross_entropy_rows().set_options({"resident_blocks": 3, **options})
    op = torch.ops.lora_kernels_emulated_cross_entropy.cross_entropy_rows
    losses = op(logits, labels, grads, *loss, dtype)
    return losses, cross_entropy_rows.in_place_of(logits, dtype)


def make(rows, columns, spread=4.0):
    logits, labels = torch.randn(rows, columns) * spread, torch.randint(0, columns, (rows,))
    labels[rows // 2] = -100
    return logits, labels, torch.rand(rows)


CASES = covering_pairs(
    dtype=[FP32, BF16, FP16], columns=[7, 61, 64, 2052, 9001], label_smoothing=[0.0, 0.1], softcap=[0.0, 5.0],
    logit_scale=[1.0, 0.3], has_grad=[True, False],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case, native):
    loss = Loss(-100, case["label_smoothing"], case["softcap"], case["logit_scale"])
    logits, labels, grads = make(5, case["columns"])
    grads = grads if case["has_grad"] else None
    exact, exact_grad = cross_entropy_rows.reference(
        logits.double(), labels, None if grads is None else grads.double(), loss, FP64
    )
    unfused, unfused_grad = cross_entropy_rows.reference(logits.clone(), labels, grads, loss, case["dtype"])
    before = logits.clone()
    ours, our_grad = run(logits, labels, grads, loss, case["dtype"])
    assert native.last_launch()[0] == (case["columns"] % 4 == 0)
    assert_as_accurate(ours, unfused, exact, "losses")
    if grads is None:
        assert torch.equal(before, logits)
    else:
        assert_as_accurate(our_grad, unfused_grad, exact_grad, "gradient")


@pytest.mark.parametrize("columns", [61, 2052])
def test_rows_that_lie_apart(columns):
    """Rows of a wider matrix, of which the rest is left alone."""
    wide = torch.full((4, columns + 12), 7.0)
    logits, labels, grads = make(4, columns)
    wide[:, :columns] = logits
    loss = Loss(-100, 0.0, 0.0, 1.0)
    losses, gradient = run(wide[:, :columns], labels, grads, loss, FP32)
    expected, expected_gradient = cross_entropy_rows.reference(logits, labels, grads, loss, FP32)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
    assert (wide[:, columns:] == 7.0).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_labels_that_are_no_class_and_numbers_that_are_none(dtype):
    """NaN for the row alone; kills a test of one side of the range, and sums in which a NaN or an infinity is lost."""
    logits, labels, grads = make(7, 64)
    labels[0], labels[1], labels[2] = 64, -1, 2**40
    logits[4, 3], logits[5, 60], logits[6, :] = math.nan, math.inf, -math.inf
    labels[4:] = 1
    losses, gradient = run(logits, labels, grads, Loss(-100, 0.0, 0.0, 1.0), dtype)
    assert losses.isnan().tolist() == [True, True, True, False, True, True, True]
    assert losses[3] == 0
    assert not gradient[3].any()
    assert gradient.isnan().all(1).tolist() == losses.isnan().tolist()


def test_minus_infinity_is_a_probability_of_zero():
    """Of most columns, so that many threads have nothing else: kills a difference of infinities."""
    logits = torch.full((2, 4096), -math.inf)
    logits[:, 5], logits[:, 4000] = 1.0, 2.0
    labels, grads = torch.tensor([5, 4000]), torch.ones(2)
    losses, gradient = run(logits, labels, grads, Loss(-100, 0.0, 0.0, 1.0), FP32)
    p = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(losses, -p.log())
    torch.testing.assert_close(gradient[0, [5, 4000]], torch.stack([p[0] - 1, p[1]]))
    assert gradient.count_nonzero() == 4


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_same_bits_in_every_order(dtype):
    logits, labels, grads = make(6, 5000)
    loss = Loss(-100, 0.1, 0.0, 1.0)
    results = [
        run(logits.clone(), labels, grads, loss, dtype, seed=seed, resident_blocks=1 + seed) for seed in range(4)
    ]
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_barrier_and_store_that_is_left_out_is_caught(dtype, native):
    """The barrier in front of what a narrow gradient overwrites among them."""
    logits, labels, grads = make(2, 8192 * 2)
    labels[:] = torch.tensor([3, 16000])
    loss = Loss(-100, 0.0, 0.0, 1.0)
    expected = run(logits.clone(), labels, grads, loss, dtype)
    report = native.last_launch()[2]
    assert len(report.barrier_sites) == (3 if dtype == BF16 else 2)
    assert report.global_store_sites

    def is_caught(**fault):
        for seed in range(3):
            try:
                found = run(logits.clone(), labels, grads, loss, dtype, seed=seed, **fault)
            except RuntimeError:
                return True
            if not all(torch.equal(a, b) for a, b in zip(found, expected)):
                return True
        return False

    assert all(is_caught(drop_barrier=site) for site in range(len(report.barrier_sites)))
    assert all(is_caught(drop_global_store=site) for site in range(len(report.global_store_sites)))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_whole_op_around_it(dtype, monkeypatch):
    """Products by gradients that lie in the place of logits, which are twice as wide."""
    op = torch.ops.lora_kernels_emulated_cross_entropy.cross_entropy_rows
    monkeypatch.setattr(cross_entropy_rows, "_native", op)
    monkeypatch.setattr(vocabulary_chunks, "LEAST_ROWS", 16)
    monkeypatch.setattr(vocabulary_chunks, "CPU_AREA", 16 * 61)

    def kernels(spec, function):
        run = Kernel(
            spec.kernels["cuda"].supports, lambda _, *args: function(vocabulary_chunks.cuda_tools(args[0]), *args)
        )
        monkeypatch.setitem(spec.kernels, "cpu", run)

    pretend_gpu(monkeypatch)
    for spec, function in ((linear_cross_entropy.SPEC, linear_cross_entropy._sum),
                           (linear_cross_entropy.EACH, linear_cross_entropy._each),
                           (linear_cross_entropy.EACH_BACKWARD, linear_cross_entropy._each_backward)):  # fmt: skip
        kernels(spec, function)
    emulator.load_cross_entropy_rows().set_options({"resident_blocks": 3})
    for reduction in ("mean", "none"):
        problem = make_problem((37,), rank=4)
        grad = torch.rand(37) if reduction == "none" else None
        assert_all_as_accurate(lk.linear_cross_entropy, problem, dtype, None, grad, reduction=reduction, softcap=5.0)


def test_no_rows():
    nothing = torch.empty(0, 8), torch.empty(0, dtype=torch.int64), torch.empty(0)
    losses, gradient = run(*nothing, Loss(-100, 0.0, 0.0, 1.0), BF16)
    assert losses.shape == (0,)
    assert gradient.shape == (0, 8)


def test_launches_go_to_the_callers_stream(native):
    native.set_stream(0x77)
    run(*make(2, 8), Loss(-100, 0.0, 0.0, 1.0), FP32)
    assert native.last_launch()[3] == 0x77
    native.set_stream(0)


def test_what_is_refused():
    logits, labels, grads = make(3, 8)
    loss = Loss(-100, 0.0, 0.0, 1.0)
    bad = [
        ((logits.double(), labels, grads), "logits must be"),
        ((logits.t().contiguous().t(), labels, grads), "logits must be"),
        ((logits[:1].expand(3, 8), labels, grads), "rows of logits must not overlap"),
        ((logits, labels.int(), grads), "labels must be"),
        ((logits, labels[:2], grads), "labels must be"),
        ((logits, labels, grads.double()), "grad_losses must be"),
    ]
    for (z, y, g), message in bad:
        with pytest.raises(RuntimeError, match=message):
            run(z, y, g, loss, FP32)
    with pytest.raises(RuntimeError, match="gradients of float32, bfloat16 and float16"):
        torch.ops.lora_kernels_emulated_cross_entropy.cross_entropy_rows(logits, labels, grads, *loss, FP64)
