"""Builds the emulator of the CUDA kernels (csrc/emu) into Python modules. That needs g++, not nvcc or a CUDA header."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from types import ModuleType

import emulator_objects
import pybind11
import setup_script
import torch
from emulator_objects import CSRC, MACHINE

from lora_kernels.ops import grouped_lora_linear, lora_linear, lora_pack, multi_lora_branch, multi_lora_linear
from lora_kernels.spec import OpSpec

__all__ = ["CSRC", "MACHINE"]
_libraries: list[torch.library.Library] = []
"""Kept for as long as the process lives."""


@functools.cache
def load_lora_linear() -> ModuleType:
    """The CUDA binding of lora_linear over CPU tensors: ``torch.ops.lora_kernels_emulated``, defined as the native ops.

    Also what steers its launches and tells of them, and the configs of problems.
    """
    library = _defined("lora_kernels_emulated", lora_linear)
    library.define("frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    for name in ("lora_linear_slabs", "lora_linear_slabs_backward", "linear_slabs", "linear_slabs_backward"):
        schema = str(getattr(torch.ops.lora_kernels_native, name).default._schema)
        library.define(schema.removeprefix("lora_kernels_native::"))
    return _build_over_torch("_emu_lora_linear", "emu/bind_lora_linear.cpp")


@functools.cache
def load_lora_linear_wgmma() -> ModuleType:
    """The same on a GPU of capability 9.0, schedule "wgmma", in ``torch.ops.lora_kernels_emulated_wgmma``."""
    _defined("lora_kernels_emulated_wgmma", lora_linear)
    return _build_over_torch("_emu_lora_linear_wgmma", "emu/bind_lora_linear_wgmma.cpp")


@functools.cache
def load_grouped_lora_linear() -> ModuleType:
    """The same for grouped_lora_linear and its gradients, in ``torch.ops.lora_kernels_emulated_grouped``."""
    _defined("lora_kernels_emulated_grouped", grouped_lora_linear)
    return _build_over_torch("_emu_grouped_lora_linear", "emu/bind_grouped_lora_linear.cpp")


@functools.cache
def load_multi_lora_linear() -> ModuleType:
    """The same for multi_lora_linear, its gradients and the halves of its branch, in
    ``torch.ops.lora_kernels_emulated_multi``.
    """
    library = _defined("lora_kernels_emulated_multi", multi_lora_linear)
    for spec in (multi_lora_branch.SHRINK, multi_lora_branch.EXPAND):
        _define(library, spec)
    return _build_over_torch("_emu_multi_lora_linear", "emu/bind_multi_lora_linear.cpp")


@functools.cache
def load_lora_pack() -> ModuleType:
    """The same for lora_pack and its gradients, in ``torch.ops.lora_kernels_emulated_pack``."""
    _defined("lora_kernels_emulated_pack", lora_pack)
    return _build_over_torch("_emu_lora_pack", "emu/bind_lora_pack.cpp")


@functools.cache
def load_prompt_embedding() -> ModuleType:
    """The same for prompt embedding, in ``torch.ops.lora_kernels_emulated_prompt``: a module that is built quickly."""
    return _build_over_torch("_emu_prompt_embedding", "emu/bind_prompt_embedding.cpp")


@functools.cache
def load_prefix_kv() -> ModuleType:
    """The same for prefix_kv, in ``torch.ops.lora_kernels_emulated_prefix``."""
    return _build_over_torch("_emu_prefix_kv", "emu/bind_prefix_kv.cpp")


@functools.cache
def load_gated_activation() -> ModuleType:
    """The same for gated_activation, in ``torch.ops.lora_kernels_emulated_gated``."""
    return _build_over_torch("_emu_gated_activation", "emu/bind_gated_activation.cpp")


@functools.cache
def load_cross_entropy_rows() -> ModuleType:
    """The same for cross_entropy_rows, in ``torch.ops.lora_kernels_emulated_cross_entropy``."""
    library = torch.library.Library("lora_kernels_emulated_cross_entropy", "DEF")
    _libraries.append(library)
    schema = str(torch.ops.lora_kernels_native.cross_entropy_rows.default._schema)
    library.define(schema.removeprefix("lora_kernels_native::"))
    return _build_over_torch("_emu_cross_entropy_rows", "emu/bind_cross_entropy_rows.cpp")


@functools.cache
def load_dropout_mask() -> ModuleType:
    """The same for dropout_mask, in ``torch.ops.lora_kernels_emulated_mask``, by three blocks at most."""
    return _build_over_torch("_emu_dropout_mask", "emu/bind_dropout_mask.cpp")


@functools.cache
def load_dequantize() -> ModuleType:
    """The same for dequantize, in ``torch.ops.lora_kernels_emulated_dequantize``."""
    return _build_over_torch("_emu_dequantize", "emu/bind_dequantize.cpp")


@functools.cache
def load_lora_linear_packed() -> ModuleType:
    """The same for lora_linear_packed, in ``torch.ops.lora_kernels_emulated_packed``."""
    return _build_over_torch("_emu_lora_linear_packed", "emu/bind_lora_linear_packed.cpp")


def _defined(name: str, op: ModuleType) -> torch.library.Library:
    """A library with the native ops of an op's file and its gradients."""
    library = torch.library.Library(name, "DEF")
    _libraries.append(library)
    for spec in (op.SPEC, op.BACKWARD):
        _define(library, spec)
    return library


def _define(library: torch.library.Library, spec: OpSpec) -> None:
    arguments, returns = spec.schema.split(" -> ")
    library.define(f"{spec.name}{arguments[:-1]}, str schedule) -> {returns}")


def _build_over_torch(name: str, binding: str) -> ModuleType:
    """A module of the CUDA binding in a source; built once for the sources as they are, however many processes ask."""
    torch_dir = Path(torch.__file__).parent
    abi = next(flag for flag in setup_script.load().STABLE_ABI if "TORCH_TARGET_VERSION" in flag)
    others = (torch_dir / "include", pybind11.get_include(), sysconfig.get_paths()["include"])
    flags = (f"-I{CSRC}/emu/cuda", *(f"-isystem{path}" for path in others), abi, "-DUSE_CUDA")
    made = functools.partial(emulator_objects.made, settings=(torch.__version__, sysconfig.get_python_version()))
    headers = "torch_headers.h"
    compiled = made(f"{headers}.gch", "-x", "c++-header", *flags, str(CSRC / "emu" / headers))
    first = ("-include", str(compiled.with_name(headers)))
    objects = [*emulator_objects.machine(), made(f"{name}.o", "-c", *flags, *first, str(CSRC / binding))]
    libraries = (f"-L{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
    return emulator_objects.imported(made(f"{name}.so", "-shared", *map(str, objects), *libraries))
