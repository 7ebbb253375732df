"""Loads the compiled extensions, or remembers why it could not."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch  # noqa: F401  (libtorch must be loaded before an extension that links it)

from .reasons import Reason


def _load(name: str) -> tuple[Any, str]:
    """The module, or None and why."""
    try:
        return importlib.import_module(f"lora_kernels.{name}"), ""
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == f"lora_kernels.{name}"
        return None, str(Reason.EXTENSION_NOT_BUILT) if missing else f"failed to load: {error}"


cpu, cpu_error = _load("_C")
cuda, cuda_error = _load("_cuda")


def build_info() -> dict[str, str]:
    """What ``setup.py`` built: compiler, torch version, CUDA architectures, or why there are none."""
    from importlib import resources

    record = resources.files("lora_kernels").joinpath("_build_info.json")
    if not record.is_file():
        return {"built": "nothing: the extensions were not compiled, ops run on the reference backend"}
    return json.loads(record.read_text())
