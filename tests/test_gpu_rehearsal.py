"""The tests that wait for a GPU, on the CPU: that they run, and that what they compare with notices a fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from numerics import assert_as_accurate

SELECTED = {
    "lora_linear": "layouts or leading or wanted or mask or (values and 16 and 75)",
    "grouped": "values and 136 and single",
    "multi": "values and 136 and few",
    "serving": "values and (qkv or o)",
    "prompts": "prefix or embeds",
    "packed": "bit or registered or (values and 13 and 257)",
    "peft": "bfloat16 or autocast or dropout or mlp",
}


def test_rehearsal():
    """One process: starting one takes as long as the tests of several files."""
    paths = [str(Path(__file__).with_name(f"test_gpu_{file}.py")) for file in SELECTED]
    chosen = " or ".join(f"(test_gpu_{file}.py and ({selected}))" for file, selected in SELECTED.items())
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen)
    environment = {**os.environ, "LORA_KERNELS_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("LORA_KERNELS_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *paths], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    passed = {file for file in SELECTED if re.search(rf"test_gpu_{file}\.py [s.]*\.", done.stdout)}
    assert passed == SELECTED.keys()


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    return gpu.problem(77, 75, 67, 8, p=0.3)


def test_what_is_right_passes(problem):
    gpu.check(problem, "cpu")
    gpu.check_inference(problem, "cpu")


@pytest.mark.parametrize("which", gpu.RESULTS)
def test_one_wrong_row_of_a_result_is_noticed(problem, monkeypatch, which):
    right = gpu.fused

    def wrong(q):
        results = dict(zip(gpu.RESULTS, right(q)))
        results[which][-1] = 0.0
        return list(results.values())

    monkeypatch.setattr(gpu, "fused", wrong)
    with pytest.raises(AssertionError, match=f"{which}: error"):
        gpu.check(problem, "cpu")


def test_another_backend_is_noticed(problem):
    with pytest.raises(AssertionError, match="served"):
        gpu.check(problem, "triton")


def test_an_element_that_nobody_wrote_is_noticed():
    exact = torch.randn(4, 3)
    unwritten = exact.clone()
    unwritten[3, 2] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_accurate(unwritten, exact, exact.double())
