"""Triton's own launcher over ``driver_stub.c``: what arrives at a kernel. Run by test_triton_launch.py."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import sys

import pytest
import torch
from packed import random_packed
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_launches import FP32, AbsentGpu, compile_for, launches, prompt_launches

from lora_kernels.triton_kernels import dequantize
from lora_kernels.triton_kernels.launching import run_all

stub = ctypes.CDLL("libcuda.so.1")
sys.setdlopenflags(os.RTLD_LAZY)  # later versions of Triton refer to functions that a launch does not call
MOST_PARAMETERS, MOST_BYTES = 128, 128


class StubbedGpu(AbsentGpu):
    """One that launches, too."""

    launcher_cls = CudaLauncher

    def __init__(self, arch):
        super().__init__(arch)
        self.utils = CudaUtils()


def parameter_bytes(ptx):
    """The size of each of the kernel's parameters."""
    (declared,) = re.findall(r"\.entry \w+\((.*?)\)\s*\.(?:reqntid|maxntid)", ptx, re.DOTALL)
    found = re.findall(r"\.param (?:\.align \d+ )?\.[a-z](\d+).*? \w+_param_\d+(?:\[(\d+)\])?", declared)
    assert len(found) == declared.count(".param")
    return [int(count or 1) * int(bits) // 8 for bits, count in found]


def values(argument):
    """What a kernel is given of an argument: None and 1 are compiled in."""
    if isinstance(argument, tuple):
        return [value for field in argument for value in values(field)]
    if isinstance(argument, TensorDescriptor):
        return [argument, *argument.shape, *argument.strides]
    is_constant = argument is None or (isinstance(argument, int) and argument == 1)
    return [] if is_constant else [argument]


def packed(value, size):
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", value.data_ptr())
    if isinstance(value, TensorDescriptor):
        rows, columns = value.shape
        stride = value.strides[0] * value.base.element_size()
        fields = value.base.data_ptr(), 2, columns, rows, stride, value.block_shape[0]
        return struct.pack("<16Q", *fields, *[0] * 10)
    return struct.pack("<f", value) if isinstance(value, float) else value.to_bytes(size, "little", signed=True)


class Recorder:
    """A kernel that is launched, and then compared with what it was launched with."""

    def __init__(self, arch, launch):
        self.launch, self.kernel = launch, launch.kernel
        self.sizes = parameter_bytes(compile_for(arch, launch).asm["ptx"])

    def __getitem__(self, grid):
        def run(*args, counters=None, **named):
            sizes = (ctypes.c_int * MOST_PARAMETERS).in_dll(stub, "parameter_bytes")
            ctypes.c_int.in_dll(stub, "parameter_count").value = len(self.sizes)
            sizes[: len(self.sizes)] = self.sizes
            self.kernel[grid](*args, **named, **({} if counters is None else {"counters": counters}))
            given = [value for argument in (*args, counters) for value in values(argument)]
            # Triton's own come last: memory for the kernel and for the profiler, of which there is none.
            given += [0] * (len(self.sizes) - len(given))
            arrived = (ctypes.c_ubyte * (MOST_PARAMETERS * MOST_BYTES)).in_dll(stub, "parameters")
            for i, (value, size) in enumerate(zip(given, self.sizes, strict=True)):
                assert bytes(arrived[i * MOST_BYTES : i * MOST_BYTES + size]) == packed(value, size), (i, value)
            assert list((ctypes.c_uint * 3).in_dll(stub, "grid")) == [*grid, 1, 1][:3]

        return run


PROBLEMS = {
    "large": dict(m=4096, n=4096, k=4096, rank=16, bias=True),
    "large, dropout": dict(m=4096, n=4096, k=4096, rank=64, adapter_dtype=FP32, p=0.1),
    "unaligned, dropout": dict(m=400, n=209, k=385, rank=17, adapter_dtype=FP32, p=0.1, bias=True),
}


def check(arch, made, monkeypatch):
    recorded = [launch._replace(kernel=Recorder(arch, launch)) for _, launch in made]
    before = ctypes.c_int.in_dll(stub, "launch_count").value
    monkeypatch.setattr(driver, "_active", StubbedGpu(arch))
    run_all(recorded, torch.device("cpu"))
    assert ctypes.c_int.in_dll(stub, "launch_count").value == before + len(recorded) > before


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_lora_linear(arch, problem, monkeypatch):
    check(arch, launches(arch, **PROBLEMS[problem]), monkeypatch)


@pytest.mark.parametrize("full", [True, False])
def test_prompt_embedding(full, monkeypatch):
    check("sm_90", prompt_launches(hidden=64, full=full), monkeypatch)


@pytest.mark.parametrize("nested", [True, False])
def test_dequantize(nested, monkeypatch):
    weight = random_packed(48, 128, nested=nested)
    launch = dequantize.dequantize_launch(torch.empty(48, 128, dtype=torch.bfloat16), list(weight.parts), 64)
    check("sm_90", [("dequantize", launch)], monkeypatch)
