"""The emulator of the CUDA kernels catches what it promises to (csrc/emu/selftest*.cpp), under sanitizers too."""

from __future__ import annotations

import os
import subprocess

import emulator
import pytest

CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{emulator.CSRC}/emu/cuda")


def run(own, flags, folder):
    """Output of a program of the emulator's, of these sources and the machine's."""
    program = folder / "program"
    sources = [str(emulator.CSRC / name) for name in (*own, *emulator.MACHINE)]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *flags, *sources]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("flags", [("-O2",), CHECKED], ids=["plain", "sanitized"])
def test_selftest(flags, tmp_path):
    run(("emu/selftest.cpp", "emu/selftest_async.cpp"), flags, tmp_path)


def test_kernels_under_sanitizers(tmp_path):
    schedules = run(("emu/selftest_lora_linear.cpp",), CHECKED, tmp_path).split()
    assert set(schedules) == {"ticketed", "column-0", "dual", "decode", "shrink", "expand"}
