"""The emulator of the CUDA kernels catches what it promises to (csrc/emu/selftest*.cpp), under sanitizers too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from emulator_objects import CSRC, MACHINE, machine, made

CHECKED = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OWN = ("emu/selftest.cpp", "emu/selftest_async.cpp")


def output(own, checks, optimised):
    """Of a program of these sources, so ``optimised``, and the machine's, which without checks are the modules'."""
    command = (os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}/emu/cuda", *checks)

    def compiled(sources, level):
        return [made(f"{Path(name).name}.o", "-c", str(CSRC / name), compiler=(*command, level)) for name in sources]

    objects = [*(compiled(MACHINE, "-O1") if checks else machine()), *compiled(own, optimised)]
    program = made(own[0].split("/")[-1].removesuffix(".cpp"), *map(str, objects), compiler=command)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize(("checks", "optimised"), [((), "-O2"), (CHECKED, "-O1")], ids=["plain", "sanitized"])
def test_selftest(checks, optimised):
    output(OWN, checks, optimised)


def test_kernels_under_sanitizers():
    """Unoptimised: compiling takes longer than running."""
    schedules = output(("emu/selftest_lora_linear.cpp",), CHECKED, "-O0").split()
    assert set(schedules) == {"ticketed", "column-0", "dual", "decode", "shrink", "expand"}
