"""The Triton kernels on the CPU: runs interpreted_lora_linear.py where Triton interprets kernels, and tests of that."""

from __future__ import annotations

import weakref
from importlib.util import find_spec

import pytest
import torch
from interpreter import run_interpreted

import lora_kernels as lk
from lora_kernels.spec import Verdict
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels import configs
from lora_kernels.triton_kernels.launching import Device, Launch, run_all

INTERPRETED = "interpreted_lora_linear.py"
VALUES = "test_values_and_gradients"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("selected", [f"{VALUES}", f"not {VALUES}"])
def test_interpreted(selected):
    run_interpreted("interpreted_harness.py", INTERPRETED, options=("-k", selected))


@needs_triton
@pytest.mark.full
def test_interpreted_in_full():
    run_interpreted(INTERPRETED, options=("-m", "full"))


# What needs no interpreter: who is asked, and what is answered.


@pytest.fixture
def gpu(monkeypatch):
    """gpu(target): dispatch of tensors on the meta device sees such a GPU of 100 SMs."""

    def pretend(target):
        monkeypatch.setattr(_triton, "is_installed", lambda: True)
        monkeypatch.setattr(_triton, "version", lambda: _triton.OLDEST)
        monkeypatch.setattr(_triton, "device_of", lambda _: None if target is None else Device(target, 100))

    return pretend


def verdict(m=512, n=4096, k=4096, rank=16, dtype=torch.bfloat16) -> Verdict:
    return _triton.lora_verdict(torch.empty(m, k, dtype=dtype, device="meta"), n, k, rank)


def test_schedule_of_each_architecture(gpu):
    for target, schedule in (("sm_80", "ticketed"), ("sm_90", "ticketed"), ("sm_120", "ticketed"), ("gfx942", "split")):
        gpu(target)
        assert verdict().schedule == schedule
        assert verdict(n=64).schedule == "dual"
        assert verdict(n=64, rank=33).schedule == schedule


def test_architecture_of_a_capability():
    expected = {(7, 5): None, (8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_80", (8, 9): "sm_86", (9, 0): "sm_90"}
    expected |= {(10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120", None: "gfx942"}
    assert {capability: configs.target_of(capability) for capability in expected} == expected


def test_tiles_shrink_with_the_problem():
    def rows_and_columns(rows, columns, **options):
        options = {"rank": 16, "float32": None, "aligned": True, "separate_branch": False, **options}
        return configs.fused("sm_90", 132, "ticketed", rows, columns, **options).tile[:2]

    assert rows_and_columns(4096, 4096) == (128, 256)
    assert rows_and_columns(4096, 4096, separate_branch=True) == (128, 128)
    assert rows_and_columns(1024, 4096) == (128, 128)
    assert rows_and_columns(512, 4096) == rows_and_columns(64, 65536) == (64, 64)
    assert rows_and_columns(16, 4096) == (16, 64)
    assert rows_and_columns(4096, 4096, aligned=False) == (64, 64)


def test_refusals(gpu, monkeypatch, fp32_precision):
    gpu("sm_80")
    assert verdict(rank=256).schedule is not None
    assert verdict(rank=257) == (None, lk.Reason.RANK)
    assert verdict(m=2**31) == (None, lk.Reason.SIZE)
    assert verdict(m=2**29, n=2**20) == (None, lk.Reason.SIZE)
    assert verdict(dtype=torch.float64) == (None, lk.Reason.DTYPE)
    assert verdict(dtype=torch.float32) == (None, lk.Reason.FP32_STRICT)
    with lk.use_backend("triton"):
        assert verdict(dtype=torch.float32).schedule == "ticketed"
    fp32_precision("tf32")
    assert verdict(dtype=torch.float32).schedule == "ticketed"
    gpu(None)
    assert verdict() == (None, lk.Reason.ARCHITECTURE)
    monkeypatch.setattr(_triton, "version", lambda: (3, 5))
    assert verdict() == (None, lk.Reason.TRITON_TOO_OLD)
    monkeypatch.setattr(_triton, "is_installed", lambda: False)
    assert verdict() == (None, lk.Reason.TRITON_NOT_INSTALLED)


class Dirtying:
    """A kernel that leaves its counters full."""

    def __init__(self):
        self.given = []

    def __getitem__(self, grid):
        return self.run

    def run(self, counters=None, **_):
        if counters is None:
            self.given.append(None)
            return
        assert counters.dtype == torch.int32
        assert not counters.any()
        assert counters.data_ptr() % 16 == 0, "another kernel would be compiled for it"
        self.given.append((counters.numel(), weakref.ref(counters.untyped_storage())))
        counters.fill_(7)


def test_counters_are_zero_and_nobody_keeps_them(monkeypatch):
    """Kept, they would be dirty, or lie in a pool that belongs to a graph; a memset per launch would be too many."""
    memsets = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: (memsets.append(size), zeros(*size, **options))[1])
    kernel = Dirtying()
    launches = [Launch(kernel, (1,), (), {}, 4, 1, counters=words) for words in (5, 0, 3)]
    for _ in range(2):
        run_all(launches, torch.device("cpu"))
    assert len(memsets) == 2
    assert [given is None for given in kernel.given] == [False, True, False] * 2
    for (words, storage), wanted in zip(filter(None, kernel.given), (5, 3) * 2):
        assert words >= wanted
        assert storage() is None, "a temporary"


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_triton, "is_installed", lambda: True)
    x, weight, A, B = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        lk.lora_linear(x, weight, A, B)
    assert lk.why("lora_linear", x, weight, A, B).backend == "cpu"
