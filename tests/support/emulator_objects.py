"""Compiles the emulator of the CUDA kernels (csrc/emu), and what runs on it. Needs g++; no nvcc, CUDA or torch."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BUILD = CSRC.parent / "build" / "emu"
MACHINE = tuple(f"emu/{name}.cpp" for name in ("machine", "memory", "fiber", "async", "order", "boxes", "products"))
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def machine() -> list[Path]:
    """Its objects: the same ones for every module."""
    return [made(f"{Path(source).stem}.o", "-c", str(CSRC / source)) for source in MACHINE]


def made(
    name: str,
    *arguments: str,
    settings: tuple[str, ...] = (),
    folders: tuple[Path, ...] = (CSRC,),
    compiler: tuple[str, ...] | None = None,
) -> Path:
    """What the compiler makes of these arguments and the sources as they are; once, however many processes ask.

    ``settings`` are what it depends on besides, ``folders`` where the sources are. ``compiler``: another one than the
    host's, with its flags.
    """
    command = compiler or (os.environ.get("CXX", "g++"), *FLAGS)
    sources = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp"))
    text = b"".join(path.read_bytes() for path in sources)
    digest = hashlib.sha256(text + repr((command[1:], arguments, *settings)).encode()).hexdigest()[:16]
    path = BUILD / digest / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            done = subprocess.run([*command, *arguments, "-o", str(unfinished)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{name} does not compile:\n{done.stderr}")
            unfinished.replace(path)
    return path


def imported(path: Path) -> ModuleType:
    """A Python module by its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
