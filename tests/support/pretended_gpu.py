"""GPUs that are not here, for what is asked of one before a launch."""

from __future__ import annotations

from lora_kernels import _native
from lora_kernels.support import cuda as _cuda


def pretend_gpu(monkeypatch, capability=(8, 0), problem=None):
    """Every device is a GPU of this compute capability on which the extension works, or has this problem."""
    monkeypatch.setattr(_cuda, "capability", lambda device: capability)
    monkeypatch.setattr(_native, "cuda_problem", lambda device: problem)
