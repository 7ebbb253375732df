"""The tables of CPU kernels that are narrower than this machine's, which the suite would otherwise never take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels import _native

WIDEST_FIRST = ("avx512_bf16", "avx512", "avx2", "portable")


def isa(environment: dict[str, str]) -> str:
    code = "import torch, lora_kernels._C as c; print(c.isa)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return shown.stdout.strip()


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_narrower_kernels_pass_the_numerical_tests(name):
    environment = {**os.environ, "LORA_KERNELS_CPU_ISA": name}
    chosen = isa(environment)
    assert WIDEST_FIRST.index(chosen) >= WIDEST_FIRST.index(name)
    if chosen != name:
        pytest.skip(f"this CPU has no {name}")
    tests = [
        str(Path(__file__).with_name(name))
        for name in (
            "test_lora_linear.py",
            "test_dropout_mask.py",
            "test_packed_cpu.py",
            "test_linear_cross_entropy.py",
        )
    ]
    chosen = "values or bits or one_token or strided or non_contiguous or definition or threads"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests, "-k", chosen],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_the_chosen_kernels_are_known():
    assert _native.cpu.isa in WIDEST_FIRST
