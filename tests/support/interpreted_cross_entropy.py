"""The Triton kernel of linear_cross_entropy in Triton's interpreter, on the CPU. Run by test_triton_cross_entropy.py.

The interpreter rounds to bfloat16 wrongly (Triton 3.8): float16 and float32 stand for it.
"""

from __future__ import annotations

import math

import pytest
import torch
from covering import case_id, covering_pairs
from head_loss import FP16, FP32, assert_all_as_accurate, loss_and_gradients, make_problem
from poisoned import by_triton, memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.ops import vocabulary_chunks
from lora_kernels.triton_kernels import configs


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """Of each problem."""
    monkeypatch.setattr(vocabulary_chunks, "LEAST_ROWS", 16)
    monkeypatch.setattr(vocabulary_chunks, "CPU_AREA", 16 * 61)


CASES = covering_pairs(
    dtypes=[(FP32, FP32), (FP16, FP16), (FP16, FP32)], columns=[61, 2, 700], rank=[0, 4], bias=[False, True],
    reduction=["mean", "none"], label_smoothing=[0.0, 0.1], softcap=[None, 3.0], logit_scale=[None, 0.25],
    small_blocks=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case, monkeypatch):
    if case["small_blocks"]:
        monkeypatch.setattr(configs, "row_block", lambda columns: 32)
    how = {name: case[name] for name in ("reduction", "label_smoothing", "softcap", "logit_scale")}
    problem = make_problem((37,), case["columns"], rank=case["rank"], bias=case["bias"])
    grad = torch.rand(37) if case["reduction"] == "none" else torch.tensor(0.7)
    assert_all_as_accurate(lk.linear_cross_entropy, problem, *case["dtypes"], grad, scaling=0.5, **how)
    assert {backend for _, backend in lk.stats()["served"]} == {"triton"}


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_numbers_that_are_none(softcap):
    """Kills a maximum, a minimum or a mask in which a NaN is lost, and a difference of infinities."""
    problem = make_problem(columns=300, ignored=0.0)
    problem["bias"][[3, 299]] = -math.inf
    problem["labels"][:] = 5
    assert all(t.isfinite().all() for t in loss_and_gradients(lk.linear_cross_entropy, problem, FP32, softcap=softcap))
    problem["bias"][299] = math.nan
    loss, grad_x, *_ = loss_and_gradients(lk.linear_cross_entropy, problem, FP32, softcap=softcap)
    assert loss.isnan()
    assert grad_x.isnan().all()


def test_labels_that_are_no_class(monkeypatch):
    """On a GPU, where nobody waits to see them: NaN."""
    monkeypatch.setattr(vocabulary_chunks, "_rows_that_count", lambda *_: None)
    problem = make_problem(ignored=0.0)
    problem["labels"][3], problem["labels"][7], problem["labels"][9] = 61, -1, -100
    losses, grad_x, *_ = loss_and_gradients(lk.linear_cross_entropy, problem, FP32, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3, 7]
    assert grad_x.isnan().all(1).nonzero().flatten().tolist() == [3, 7]
    assert losses[9] == 0
    assert not grad_x[9].any()


def test_no_rows():
    loss, *grads = loss_and_gradients(lk.linear_cross_entropy, make_problem((0,)), FP32, reduction="sum")
    assert not any(t.any() for t in (loss, *grads))
