"""The tables of CPU kernels that are narrower than this machine's, which the suite would otherwise never take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels import _native

WIDEST_FIRST = ("avx512_bf16", "avx512", "avx2", "portable")
FILES = ("lora_linear", "dropout_mask", "packed_cpu", "linear_cross_entropy", "gated_activation", "cpu_isa")


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_narrower_kernels_pass_the_numerical_tests(name):
    if WIDEST_FIRST.index(name) < WIDEST_FIRST.index(_native.cpu.isa):
        pytest.skip(f"this CPU has no {name}, or is asked for narrower kernels")
    tests = [str(Path(__file__).with_name(f"test_{file}.py")) for file in FILES]
    # bitsandbytes' bits are compared with those of the widest kernels, and they with the definition that these are
    # compared with: bitsandbytes has torch compile for it first, which takes as long as all other tests do.
    chosen = "values or bits or one_token or strided or non_contiguous or definition or threads or wider"
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests,
            "-k", f"({chosen}) and not bitsandbytes",
        ],
        env={**os.environ, "LORA_KERNELS_CPU_ISA": name, "EXPECTED_ISA": name},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_kernels_are_no_wider_than_was_asked_for():
    """And no narrower where the tests above have asked, which know that this CPU has them."""
    asked = os.environ.get("LORA_KERNELS_CPU_ISA") or WIDEST_FIRST[0]
    assert WIDEST_FIRST.index(_native.cpu.isa) >= WIDEST_FIRST.index(asked)
    assert _native.cpu.isa == os.environ.get("EXPECTED_ISA", _native.cpu.isa)
