"""setup.py as a module: it builds only when it is run as a program."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def load() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))
