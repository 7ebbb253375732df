"""Loads the compiled extensions, or remembers why it could not."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch  # also: libtorch must be loaded before an extension that links it

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


_CUDA_PROBLEMS = {
    "driver": Reason.DRIVER,
    "architecture": Reason.NOT_COMPILED,
    "other": Reason.CUDA_ERROR,
}
"""By what ``lora_kernels._cuda.usable`` calls them."""


_found: dict[torch.device, tuple[Reason, str] | None] = {}
"""What ``cuda_problem`` found of a device, where that stays so."""


def cuda_problem(device: torch.device) -> tuple[Reason, str] | None:
    """Why ``lora_kernels._cuda``, which is loaded, does not run on a GPU, and what CUDA says; None if it does.

    torch works there; but the extension may want a newer driver than torch does, and is compiled for the architectures
    that its builder chose. CUDA is asked once per device, for one kernel: all are compiled for the same architectures.
    After another error, as that memory is exhausted, it is asked again.
    """
    if device in _found:
        return _found[device]
    with torch.cuda.device(device):
        problem, detail = cuda.usable()
    found = (_CUDA_PROBLEMS[problem], detail) if problem else None
    if problem != "other":
        _found[device] = found
    return found


def build_info() -> dict[str, str]:
    """What ``setup.py`` built: compiler, torch version, CUDA architectures, or why there are none."""
    from importlib import resources

    record = resources.files("lora_kernels").joinpath("_build_info.json")
    if not record.is_file():
        return {"built": "nothing: the extensions were not compiled, ops run on the reference backend"}
    return json.loads(record.read_text())
