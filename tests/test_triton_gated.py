"""The Triton kernels of gated_activation, and lora_mlp by Triton's kernels, on the CPU: in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from interpreter import run_interpreted

import lora_kernels as lk
from lora_kernels.ops.gated_activation import BACKWARD, SPEC
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels.launching import Device


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_interpreted():
    run_interpreted("interpreted_gated.py", "interpreted_mlp.py")


def test_verdicts(monkeypatch):
    monkeypatch.setattr(_triton, "is_installed", lambda: True)
    monkeypatch.setattr(_triton, "version", lambda: _triton.OLDEST)
    monkeypatch.setattr(_triton, "device_of", lambda _: Device("sm_80", 108))
    t = torch.empty(3, 8, dtype=torch.bfloat16, device="meta")
    assert SPEC.kernels["triton"].supports(t, t, "silu").schedule == "elementwise"
    assert BACKWARD.kernels["triton"].supports(t, t, t, "silu").schedule == "elementwise"
    assert SPEC.kernels["triton"].supports(t.double(), t.double(), "silu") == (None, lk.Reason.DTYPE)
