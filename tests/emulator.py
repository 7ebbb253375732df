"""Builds the emulator of the CUDA kernels (csrc/emu) into a Python module. It needs g++, not nvcc or a CUDA header."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
BUILD = CSRC.parent / "build" / "emu"
SOURCES = ("emu/machine.cpp", "emu/bind.cpp")
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


@functools.cache
def load() -> ModuleType:
    """The module, built once for the sources as they are, also when several test processes ask at once."""
    text = b"".join(path.read_bytes() for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh", ".cpp"))
    digest = hashlib.sha256(text + repr(FLAGS).encode() + sysconfig.get_python_version().encode()).hexdigest()[:16]
    module = BUILD / f"{digest}" / "_emu.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            module.parent.mkdir(exist_ok=True)
            unfinished = module.with_suffix(".tmp")
            includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
            sources = [str(CSRC / name) for name in SOURCES]
            command = [os.environ.get("CXX", "g++"), *FLAGS, *includes, *sources, "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"the emulator does not compile:\n{done.stderr}")
            unfinished.replace(module)
    spec = importlib.util.spec_from_file_location("_emu", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def bits(tensor: torch.Tensor):
    """A 16-bit tensor as a numpy array of uint16 that shares its memory and strides."""
    return tensor.view(torch.uint16).numpy()


def values(array, dtype: torch.dtype) -> torch.Tensor:
    """The reverse of ``bits``."""
    return torch.from_numpy(array).view(dtype)
