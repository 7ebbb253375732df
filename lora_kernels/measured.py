"""Files of what was measured, as JSON in ``$XDG_CACHE_HOME/lora_kernels`` (``~/.cache``), by device and version."""

from __future__ import annotations

import fcntl
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ._version import __version__

Value = TypeVar("Value")


def file_of(what: str, *conditions: str) -> Path:
    """The file of ``what`` under these conditions (a device, versions of others) and this version of the package."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"
    name = "-".join((what, *conditions, __version__))
    return folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


def read(path: Path, what: str, parse: Callable[[Any], Value]) -> dict[str, Value]:
    """The entries of a file, each ``parse``d; none, with a warning, if it holds something else."""
    try:
        return {name: parse(value) for name, value in json.loads(path.read_text()).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"lora_kernels: {path} is not a cache of {what} and is ignored: {error}", stacklevel=2)
        return {}


def write(path: Path, what: str, entries: Mapping[str, Value], parse: Callable[[Any], Value]) -> None:
    """Replaces the file in one step, keeping what other processes have put there; a warning where that fails."""
    partial = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            try:
                partial.write_text(json.dumps({**read(path, what, parse), **entries}, indent=1))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"lora_kernels: {what} are not remembered: {error}", stacklevel=2)
