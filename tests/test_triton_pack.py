"""The Triton kernels of packs: values in the interpreter, and what the compiler makes of them."""

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
from triton_launches import FP32, compile_for, pack_launches


def test_values_in_the_interpreter():
    run_interpreted("interpreted_pack.py")


PROBLEMS = {
    "q, k, v": dict(m=4096, k=2048, ns=(2048, 512, 512), ranks=(16, 16, 16), bias=True),
    "gate, up, dropout": dict(m=4096, k=2048, ns=(4096, 4096), ranks=(64, 64), adapter_dtype=FP32, p=0.1),
    "unaligned": dict(m=401, k=385, ns=(417, 33), ranks=(17, 0), adapter_dtype=FP32, p=0.1, bias=True),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_machine_code(arch, problem, tmp_path):
    """Tensor cores, and no register spilled: a member's operands are in few of them over the main loop."""
    check_launches(arch, pack_launches(target_name(arch), **PROBLEMS[problem]), tmp_path)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_order_between_programs(arch):
    """As test_triton_aot.py has it of the plain kernel, of each member's flag."""
    for name, launch in pack_launches(arch, **PROBLEMS["q, k, v"]):
        code = compile_for(arch, launch).asm["ptx"].splitlines()
        barriers = [i for i, line in enumerate(code) if "bar.sync" in line]
        releases = [i for i, line in enumerate(code) if ".gpu.release." in line]
        acquires = [i for i, line in enumerate(code) if ".gpu.acquire." in line]
        assert len(releases) == len(acquires) == 3, name
        for release in releases:
            between = code[max(i for i in barriers if i < release) : release]
            assert not [line for line in between if "st.global" in line], name
        for acquire in acquires:
            after = code[acquire + 1 : min(i for i in barriers if i > acquire)]
            assert not [line for line in after if "ld.global" in line or "cp.async" in line], name
