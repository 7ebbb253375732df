"""The Triton kernel of linear_cross_entropy on the CPU: runs interpreted_cross_entropy.py in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from interpreter import run_interpreted
from pretended_gpu import pretend_gpu

import lora_kernels as lk
from lora_kernels.ops.linear_cross_entropy import EACH, SPEC
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels.launching import Device


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_interpreted():
    run_interpreted("interpreted_cross_entropy.py")


def test_verdicts(monkeypatch):
    monkeypatch.setattr(_triton, "is_installed", lambda: True)
    monkeypatch.setattr(_triton, "version", lambda: _triton.OLDEST)
    monkeypatch.setattr(_triton, "device_of", lambda _: Device("sm_80", 108))
    pretend_gpu(monkeypatch)
    for spec in (SPEC, EACH):
        for backend in ("cuda", "triton"):
            supports = spec.kernels[backend].supports
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert supports(torch.empty(3, 8, dtype=dtype, device="meta"), torch.empty(9, 8)).schedule == "chunks"
            x = torch.empty(3, 8, dtype=torch.float64, device="meta")
            assert supports(x, torch.empty(9, 8)) == (None, lk.Reason.DTYPE)
