"""The Triton kernels of rows that have adapters in pools: values in the interpreter, and what the compiler makes of
them.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from interpreter import run_interpreted
from test_triton_aot import check_launches, target_name
from triton_launches import FP32, compile_for, multi_half_launches, multi_launches

from lora_kernels.triton_kernels import configs


def test_values_in_the_interpreter():
    run_interpreted("interpreted_multi.py", "interpreted_multi_branch.py")


PROBLEMS = {
    "large": dict(m=4096, n=2048, k=2048, rank=16, adapters=8),
    "large, dropout": dict(m=4096, n=2048, k=2048, rank=64, adapters=8, adapter_dtype=FP32, p=0.1),
    "many adapters": dict(m=512, n=1024, k=512, rank=16, adapters=128, mixed=False),
    "unaligned": dict(m=401, n=417, k=385, rank=17, adapters=5, adapter_dtype=FP32, p=0.1),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_machine_code(arch, problem, tmp_path):
    """Tensor cores where rows share an adapter, and no register spilled."""
    check_launches(arch, multi_launches(target_name(arch), **PROBLEMS[problem]), tmp_path)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_of_each_half(arch, tmp_path):
    check_launches(arch, multi_half_launches(target_name(arch), m=4096, n=2048, k=2048, rank=64, adapters=8), tmp_path)


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_gpus(arch):
    """Compile."""
    target = "gfx942" if arch == "gfx942" else configs.target_of((10, 0))
    for name, launch in multi_launches(target, **PROBLEMS["large, dropout"]):
        assert compile_for(arch, launch).asm, name
