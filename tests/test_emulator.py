"""The emulator of the CUDA kernels catches what it promises to (csrc/emu/selftest.cpp), under sanitizers too."""

from __future__ import annotations

import os
import subprocess
import sys

import emulator
import pytest

CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.parametrize("flags", [("-O2",), CHECKED], ids=["plain", "sanitized"])
def test_selftest(flags, tmp_path):
    program = tmp_path / "selftest"
    sources = [str(emulator.CSRC / name) for name in ("emu/selftest.cpp", *emulator.MACHINE)]
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", *flags, *sources]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Without torch, which does not run under the sanitizers: one ragged launch of every schedule and of the gradients.
LAUNCHES = """
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("_emu", sys.argv[1])
emu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emu)
random = np.random.default_rng(0)


def matrix(rows, columns):
    values = random.standard_normal((rows, columns)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)  # bf16, rounded down


def check(result, exact):
    values = (result.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(values - exact).max() <= 0.02 * np.abs(exact).max()


def wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


for m, n, k, rank, sms in ((70, 72, 136, 16, 9), (200, 72, 136, 16, 1), (200, 72, 136, 24, 1), (70, 64, 136, 24, 1),
                           (5, 72, 520, 16, 40), (33, 37, 41, 17, 1)):
    x, w, a, b, grad_y = (matrix(*s) for s in ((m, k), (n, k), (rank, k), (n, rank), (m, n)))
    for p, seed in ((0.0, None), (0.3, 7)):
        y, s, schedule, counters, _ = emu.lora_linear("bf16", x, w, a, b, None, 0.5, p, seed, sms, {})
        assert not counters.any()
        check(y, wide(x) @ wide(w).T + 0.5 * wide(s) @ wide(b).T)
        grad_x, grad_a, grad_b, _, counters, _ = emu.lora_linear_backward(
            "bf16", grad_y, x, s, w, a, b, 0.5, p, seed, True, True, True, sms, {})
        assert not any(c.any() for c in counters)
        check(grad_b, 0.5 * wide(grad_y).T @ wide(s))
        print(schedule)
"""


def test_kernels_under_sanitizers():
    module = emulator.compiled("_emu", emulator.KERNELS, CHECKED)
    libraries = [
        subprocess.run([os.environ.get("CXX", "g++"), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    preload = ":".join(library.stdout.strip() for library in libraries)
    # Python itself keeps memory to the end.
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", LAUNCHES, str(module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert set(done.stdout.split()) == {"ticketed", "column-0", "dual", "decode"}
