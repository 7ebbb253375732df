"""The portable kernels, which the machines that run this suite would otherwise never take."""

import os
import subprocess
import sys
from pathlib import Path

from lora_kernels import _native


def test_portable_kernels_pass_the_numerical_tests():
    environment = {**os.environ, "LORA_KERNELS_CPU_ISA": "portable"}
    code = "import torch, lora_kernels._C as c; print(c.isa)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "portable"
    tests = [str(Path(__file__).with_name(name)) for name in ("test_lora_linear.py", "test_dropout_mask.py")]
    chosen = "values or one_token or strided or non_contiguous or definition or threads"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests, "-k", chosen],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_the_chosen_kernels_are_known():
    assert _native.cpu.isa in ("avx2", "portable")
