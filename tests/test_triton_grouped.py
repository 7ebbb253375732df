"""The Triton kernels of rows in groups: values in the interpreter, and what the compiler makes of them."""

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
from triton_launches import FP32, compile_for, grouped_launches


def test_values_in_the_interpreter():
    run_interpreted("interpreted_grouped.py")


PROBLEMS = {
    "large": dict(m=4096, n=2048, k=2048, rank=16, groups=8, bias=True),
    "large, dropout": dict(m=4096, n=2048, k=2048, rank=64, groups=8, adapter_dtype=FP32, p=0.1),
    "many groups": dict(m=512, n=1024, k=512, rank=16, groups=128),
    "unaligned": dict(m=401, n=417, k=385, rank=17, groups=5, adapter_dtype=FP32, p=0.1, bias=True),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_machine_code(arch, problem, tmp_path):
    """Tensor cores, and no register spilled: a tile's group is in few of them over the main loop."""
    check_launches(arch, grouped_launches(target_name(arch), **PROBLEMS[problem]), tmp_path)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_order_between_programs(arch):
    """As test_triton_aot.py has it of the plain kernel."""
    launch = next(launch for name, launch in grouped_launches(arch, **PROBLEMS["large"]) if name == "forward all")
    code = compile_for(arch, launch).asm["ptx"].splitlines()
    barriers = [i for i, line in enumerate(code) if "bar.sync" in line]
    (release,) = (i for i, line in enumerate(code) if ".gpu.release." in line)
    assert not [line for line in code[max(i for i in barriers if i < release) : release] if "st.global" in line]
    (acquire,) = (i for i, line in enumerate(code) if ".gpu.acquire." in line)
    after = code[acquire + 1 : min(i for i in barriers if i > acquire)]
    assert not [line for line in after if "ld.global" in line or "cp.async" in line]
