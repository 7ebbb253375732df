"""lora_mlp by Triton's kernels, in the interpreter, on the CPU. Run by test_triton_gated.py."""

from __future__ import annotations

import pytest
import test_lora_mlp
from poisoned import by_triton, memory_of_nan  # noqa: F401
from test_lora_mlp import FP16, FP32, SHAPES
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(FP32, None), (FP16, None), (FP16, FP32)], ids=str)
def test_values_and_gradients(dtypes, p):
    test_lora_mlp.check(test_lora_mlp.make(SHAPES[3], *dtypes, bias=True), "silu", p, seed=7)
    assert {backend for _, backend in lk.stats()["served"]} == {"triton"}
