"""Which torch there is to build against, also where pip has hidden it. It is looked up, not imported.

pip builds in an environment of its own, with the interpreter for which it installs: that one's packages are taken off
``sys.path``, and are where they were. The extensions need headers and libraries of a torch, and any from 2.10 on will
do, so the one that is there anyway is taken. The environments that ``build`` and uv make have another interpreter: from
there no other environment can be found.
"""

from __future__ import annotations

import re
import runpy
import site
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = (2, 10)
"""The first whose stable ABI has what the extensions use."""


class InstalledTorch(NamedTuple):
    """A torch to build against."""

    folder: Path
    """With ``include`` and ``lib``."""
    version: str
    """As torch itself says it: 2.14.1+cu130."""
    path: list[str]
    """``sys.path`` of a process that imports it."""

    @property
    def is_too_old(self) -> bool:
        return tuple(int(number) for number in re.findall(r"\d+", self.version)[:2]) < OLDEST_TORCH


def interpreters_path() -> list[str]:
    """Where this interpreter imports packages from when nobody hides them, with what their .pth files add."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # venvs do not see what a user has installed for himself
        folders.append(site.getusersitepackages())
    visible = sys.path[:]
    try:
        for folder in folders:
            site.addsitedir(folder, known_paths=set())
        return sys.path[len(visible) :]
    finally:
        sys.path[:] = visible


def find() -> InstalledTorch | None:
    """The torch that is imported here, or else the interpreter's own; None: there is none."""
    for path in (sys.path[:], [*sys.path, *interpreters_path()]):
        spec = PathFinder.find_spec("torch", path)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent
            return InstalledTorch(folder, runpy.run_path(str(folder / "version.py"))["__version__"], path)
    return None
