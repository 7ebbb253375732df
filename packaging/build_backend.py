"""What pip and build ask for wheels: setuptools' own backend, but for torch, which it names or finds.

If pyproject.toml required torch, a build in isolation would download the newest one, gigabytes with its CUDA libraries,
and not the one that is installed. So an installed torch is built against (``installed_torch.py``), also by pip in
isolation; where pip knows of none, it is asked for the one that lora_kernels will need, and pip will install, anyway.
Whoever builds in an environment that hides what is installed is told so, before anything is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import installed_torch
import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST = ".".join(map(str, installed_torch.OLDEST_TORCH))


def torch_to_download() -> list[str]:
    """Requirements beside setuptools and ninja: none where a torch is installed that will do."""
    torch = installed_torch.find()
    if torch is not None and torch.is_too_old:
        raise SystemExit(
            f"lora_kernels needs torch >= {OLDEST}, and {torch.version} is installed in {torch.folder}. "
            f"It is not replaced by a build: pip install 'torch>={OLDEST}' first"
        )
    if torch is not None:
        return []
    # pip has its tools outside of the environment that it installs into, which therefore has no torch.
    if Path(setuptools.__file__).is_relative_to(sys.prefix):
        raise SystemExit(f"""
lora_kernels is compiled against torch, and there is none in {sys.prefix}.
If that is an environment made for this build, it hides the torch that is installed. Another one is not downloaded
for it, which would take minutes and gigabytes. In an environment with torch >= {OLDEST}, 'setuptools>=77' and ninja:
    pip install --no-build-isolation .        # or: uv pip install --no-build-isolation .
    python -m build --no-isolation            # for a wheel""")
    return [f"torch>={OLDEST}"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return torch_to_download() + build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return torch_to_download() + build_meta.get_requires_for_build_editable(config_settings)
