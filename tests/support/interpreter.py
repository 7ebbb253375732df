"""Runs a test file where Triton interprets kernels: in a process of its own, because Triton decides once, when a kernel
is defined, whether it is compiled or interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(file: str, *options: str) -> None:
    """Fails unless pytest passes on this file of the folder."""
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("LORA_KERNELS_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
