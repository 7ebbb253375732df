"""The emulator of the CUDA kernels catches what it promises to (csrc/emu/selftest.cpp), under sanitizers too."""

from __future__ import annotations

import os
import subprocess

import emulator
import pytest

CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.parametrize("flags", [("-O2",), CHECKED], ids=["plain", "sanitized"])
def test_selftest(flags, tmp_path):
    program = tmp_path / "selftest"
    sources = [str(emulator.CSRC / "emu" / name) for name in ("selftest.cpp", "machine.cpp")]
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", *flags, *sources]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
