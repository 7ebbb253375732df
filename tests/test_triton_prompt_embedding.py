"""The Triton kernels of prompt embedding on the CPU: runs interpreted_prompt_embedding.py in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from interpreter import run_interpreted
from naive_prompt import FP64, make

import lora_kernels as lk
from lora_kernels.functional.prompt import arguments
from lora_kernels.ops.prompt_embedding import BACKWARD, SPEC
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels import configs
from lora_kernels.triton_kernels.launching import Device


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_interpreted():
    run_interpreted("interpreted_prompt_embedding.py")


def test_tiles():
    assert configs.copy_tile(4096, 2) == (4, 1024, 4)
    assert configs.copy_tile(576, 2) == (64, 64, 4), "a wider tile would leave threads idle"
    assert configs.sum_tile(4096, 4) == (1, 512, 4)
    assert configs.copy_tile(0, 4).columns >= configs.MIN_COPY_COLUMNS


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(_triton, "is_installed", lambda: True)
    monkeypatch.setattr(_triton, "version", lambda: _triton.OLDEST)
    monkeypatch.setattr(_triton, "device_of", lambda _: Device("sm_80", 108))


def verdicts(tokens=9, dtype=torch.bfloat16, hidden=64):
    prompt = torch.empty(20, hidden, device="meta")
    weight = torch.empty(100, hidden, dtype=dtype, device="meta")
    ids = torch.empty(2, tokens, dtype=torch.int64, device="meta")
    grad = torch.empty(2, tokens + 20, hidden, dtype=dtype, device="meta")
    layout = torch.empty(2, 3, dtype=torch.int64, device="meta")
    forward = SPEC.kernels["triton"].supports(*arguments(ids, weight, prompt))
    backward = BACKWARD.kernels["triton"].supports(
        grad, layout, ids, None, 0, 20, torch.float32, 100, True, False, False
    )
    return forward, backward


def test_verdicts(gpu):
    assert [v.schedule for v in verdicts()] == ["gather", "row_sum"]
    assert verdicts(dtype=FP64) == ((None, lk.Reason.DTYPE),) * 2
    assert verdicts(tokens=2**25, hidden=4096) == ((None, lk.Reason.SIZE),) * 2


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_triton, "is_installed", lambda: True)
    problem = make()
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        lk.prompt_embedding(*problem[:3])
