"""What linear_cross_entropy says to arguments that do not fit."""

import math

import pytest
import torch
from head_loss import BF16, FP32, make_problem

import lora_kernels as lk

BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.zeros(5, 7)}, ValueError, r"x must be \[\.\.\., 24\]"),
    ({"x": torch.zeros(37, 24, dtype=torch.int64)}, TypeError, "x must be float32"),
    ({"weight": torch.zeros(61, 24, dtype=BF16)}, TypeError, "weight must be torch.float32 like x"),
    ({"weight": torch.zeros(61)}, ValueError, "weight must be"),
    (
        {"weight": torch.zeros(0, 24), "bias": None, "lora_A": None, "lora_B": None},
        ValueError, "weight must have a row for every class",
    ),
    ({"labels": [1, 2]}, TypeError, "labels must be a tensor, got list"),
    ({"labels": torch.zeros(37)}, TypeError, "labels must be int64 or int32, got torch.float32"),
    ({"labels": torch.zeros(36, dtype=torch.int64)}, ValueError, r"labels must be \[37\] to fit x \(37, 24\)"),
    ({"labels": torch.full((37,), 61)}, ValueError, r"labels must be in \[0, 61\) or ignore_index=-100, got 61"),
    ({"labels": torch.full((37,), -1)}, ValueError, r"labels must be in \[0, 61\) or ignore_index=-100, got -1"),
    ({"labels": torch.zeros(37, dtype=torch.int64, device="meta")}, ValueError, "labels must be on cpu like x"),
    ({"lora_A": None}, ValueError, "lora_A and lora_B must be given together"),
    ({"lora_B": torch.zeros(60, 4)}, ValueError, r"lora_B must be \[61, 4\]"),
    ({"lora_A": torch.zeros(4, 24, dtype=BF16), "lora_B": torch.zeros(61, 4, dtype=BF16)}, TypeError, "lora_A must be"),
    ({"bias": torch.zeros(60)}, ValueError, r"bias must be \[61\]"),
    ({"scaling": math.inf}, ValueError, "scaling must be finite"),
    ({"reduction": "average"}, ValueError, 'reduction must be "mean", "sum" or "none"'),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number in"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
    ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, got 0.0"),
    ({"logit_scale": math.nan}, ValueError, "logit_scale must be a finite number or None"),
    ({"shift": True, "x": torch.zeros(24), "labels": torch.tensor(3)}, ValueError, "shift needs sequences of labels"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda v: None if isinstance(v, dict) else str(v))
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        lk.linear_cross_entropy(**{**make_problem(dtype=FP32), **changes})


def test_a_quantised_weight_is_refused():
    problem = make_problem(columns=64, depth=64, rank=0, bias=False, dtype=FP32)
    weight = lk.FORMATS["nf4"].quantize(problem["weight"])
    with pytest.raises(TypeError, match=r"weight must be a tensor, got a quantised one \(nf4\)"):
        lk.linear_cross_entropy(**{**problem, "weight": weight})


def test_transforms_are_refused():
    problem = make_problem(dtype=FP32)
    with pytest.raises(RuntimeError, match="vmap, grad, jvp"):
        torch.func.grad(lambda x: lk.linear_cross_entropy(**{**problem, "x": x}))(problem["x"])
