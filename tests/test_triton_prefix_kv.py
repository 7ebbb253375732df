"""The Triton kernels of prefix_kv on the CPU: runs interpreted_prefix_kv.py in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from interpreter import run_interpreted

import lora_kernels as lk
from lora_kernels.ops.prefix_kv import BACKWARD, SPEC
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels.launching import Device


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_interpreted():
    run_interpreted("interpreted_prefix_kv.py")


def test_verdicts(monkeypatch):
    monkeypatch.setattr(_triton, "is_installed", lambda: True)
    monkeypatch.setattr(_triton, "version", lambda: _triton.OLDEST)
    monkeypatch.setattr(_triton, "device_of", lambda _: Device("sm_80", 108))
    prefix = torch.empty(20, 4 * 2 * 64, device="meta")
    grads = [torch.empty(3, 2, 20, 32, dtype=torch.bfloat16, device="meta")] * 8
    forward, backward = SPEC.kernels["triton"].supports, BACKWARD.kernels["triton"].supports
    assert forward(prefix, 4, 2, 3, False, torch.bfloat16).schedule == "transpose"
    assert backward(grads, torch.float32).schedule == "row_sum"
    assert forward(prefix, 4, 2, 3, False, torch.float64) == (None, lk.Reason.DTYPE)
    assert backward(grads, torch.float64) == (None, lk.Reason.DTYPE)
