"""What the tests in Triton's interpreter rely on, there. Run by test_triton_lora_linear.py."""

from __future__ import annotations

import numpy
import pytest
import torch
import triton
import triton.language as tl
from touched_memory import memory_of_tensors  # noqa: F401
from triton.runtime import interpreter

from lora_kernels.triton_kernels.launching import Launch, run_all


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _multiples(out, step, COUNT: tl.constexpr):
    """Also of what Triton itself has as a function on the device, in another module."""
    i = tl.arange(0, COUNT)
    tl.store(out + step * i, _twice(_twice(i)) + tl.cdiv(tl.max(i, 0), 2))


def launched(out: torch.Tensor, step: int = 1, programs: int = 1) -> list[int]:
    run_all([Launch(_multiples, (programs,), (out, step), {"COUNT": 4}, 1, 1)], out.device)
    return out.tolist()


def test_a_launch_patches_the_language_once(monkeypatch):
    """Kills: a walk through the language at every call of a function; a second launch that finds it unpatched."""
    walked, walk = [], interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda package, *rest: (walked.append(package), walk(package, *rest))
    )
    walks = []
    for programs in (1, 1, 6):
        walked.clear()
        assert launched(torch.zeros(4, dtype=torch.int32), programs=programs) == [2, 6, 10, 14]
        walks.append(len(walked))
    assert walks[1] == walks[2] > 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (tl.float16, numpy.float16),
        (tl.bfloat16, numpy.uint16),
        (tl.int1, numpy.bool_),
        (tl.block_type(tl.float16, [4]), numpy.float16),
        (tl.pointer_type(tl.float16), numpy.uint64),
        (tl.block_type(tl.pointer_type(tl.float16), [4]), numpy.uint64),
    ],
    ids=str,
)
def test_a_dtype_is_that_of_the_table(dtype, expected):
    """Kills: a pointer that is looked up as what it points to."""
    for _ in range(2):
        assert interpreter._get_np_dtype(dtype) == expected


def test_a_store_outside_of_the_tensors_fails():
    with pytest.raises(interpreter.InterpreterError, match="store of 2 elements outside of the launch's tensors"):
        launched(torch.zeros(4, dtype=torch.int32), step=2)
