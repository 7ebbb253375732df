"""Launches of the Triton kernels without a GPU: runs launched_triton.py over a stub of the CUDA driver."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_launched(tmp_path):
    """Triton 3.6 compiles kernels that its launcher then stumbles over: a descriptor in a tuple."""
    headers = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    stub = tmp_path / "libcuda.so.1"
    source = str(SUPPORT / "driver_stub.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", f"-I{headers}", source, "-o", stub], check=True
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command.append(str(SUPPORT / "launched_triton.py"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
