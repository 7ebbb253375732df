"""Runs test files where Triton interprets kernels: in a process of its own, because Triton decides once, when a kernel
is defined, whether it is compiled or interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from lora_kernels.support import triton as _triton


def run_interpreted(*files: str, options: tuple[str, ...] = ()) -> None:
    """Fails unless pytest passes on these files of the folder."""
    if _triton.version() == (3, 6) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter makes numbers of arrays of one element, which numpy 2.4 forbids")
    paths = [str(Path(__file__).with_name(file)) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *paths, *options]
    # numpy's BLAS would wait by spinning in the cores of the suite's other workers.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("LORA_KERNELS_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
