"""Shared set-up: one thread per worker (the suite runs under xdist), counters at zero before each test."""

import gc
import os
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from gpu import backend  # noqa: F401

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.support import cpu_product as _cpu_product


def pytest_configure():
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()


def pytest_ignore_collect(collection_path, config):
    """True of files that have exhaustive tests alone where none is run: each worker would make tens of thousands, to
    leave them out.
    """
    return True if collection_path.name.endswith("_full.py") and config.option.markexpr == "not full" else None


def pytest_collectstart(collector):
    """What a file draws while it is imported does not depend on the files before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_finish():
    """What was imported for the tests stays: nobody is to look through it for garbage again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _clean_slate():
    torch.manual_seed(0)
    lk.reset_stats()


@pytest.fixture
def fp32_precision():
    """fp32_precision("tf32"): how torch multiplies float32 on a GPU, until the test ends."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value)
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def onednn(monkeypatch):
    """Takes oneDNN on any machine whose torch has it, whatever would be measured."""
    if _native.cpu is None or not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(_cpu_product, "_has_both", lambda: True)
    monkeypatch.setattr(_cpu_product, "_mode", "onednn")


def pytest_terminal_summary(terminalreporter):
    """Which schedules the tests on a GPU were served by: what dispatch did not choose has not been tested."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    chosen = Counter(
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "schedule"
    )
    if chosen:
        terminalreporter.section("schedules")
        for schedule, count in sorted(chosen.items()):
            terminalreporter.write_line(f"{count:5} {schedule}")
