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
