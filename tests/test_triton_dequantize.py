"""The Triton kernel of dequantize on the CPU: runs interpreted_dequantize.py in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from interpreter import run_interpreted


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_interpreted():
    run_interpreted("interpreted_dequantize.py")
