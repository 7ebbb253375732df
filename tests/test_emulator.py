"""The emulator of the CUDA kernels catches what it promises to (csrc/emu/selftest*.cpp), under sanitizers too."""

from __future__ import annotations

import os
import subprocess

import pytest
from emulator_objects import CSRC, MACHINE, made

CHECKED = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OWN = ("emu/selftest.cpp", "emu/selftest_async.cpp")


def output(own, checks, optimised):
    """Of a program of these sources, so ``optimised``, and the machine's."""
    command = (os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}/emu/cuda", *checks)
    objects = [
        made(source.split("/")[-1] + ".o", "-c", str(CSRC / source), compiler=(*command, level))
        for sources, level in ((MACHINE, "-O1"), (own, optimised))
        for source in sources
    ]
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
