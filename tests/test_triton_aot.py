"""What Triton's compiler makes of the kernels, for GPUs that need not be here: machine code, memory, registers."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from importlib.util import find_spec

import pytest
import torch

from lora_kernels.triton_kernels import configs

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import sass
import triton
from packed import random_packed, random_scaled
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_launches import BF16, FP32, compile_for, launches, prompt_launches

from lora_kernels.triton_kernels import cross_entropy_rows, dequantize, dropout_mask, gated_activation, prefix_kv

# Matrix instructions of 16-bit tiles, by their number of rows: the wide ones need 64.
INSTRUCTIONS = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}


def stack_bytes(compiled, tmp_path):
    """Stack frame and spilled registers of the machine code."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = re.findall(r"STACK:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    return int(stack) + int(local)


def machine_code(compiled, arch, tmp_path):
    """(address, instruction) of the kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (instructions,) = sass.code(cubin, arch, compiled.metadata.name).values()
    return instructions


PROBLEMS = {
    "large": dict(m=4096, n=4096, k=4096, rank=16, bias=True),
    "large, dropout": dict(m=4096, n=4096, k=4096, rank=64, adapter_dtype=FP32, p=0.1),
    "few rows": dict(m=12, n=4096, k=4096, rank=16),
}
REMAINING = {
    "large, ragged rank": dict(m=4001, n=4112, k=4080, rank=72, adapter_dtype=FP32, p=0.1, bias=True),
    "large, all ranks": dict(m=4096, n=4096, k=4096, rank=256, p=0.1),
    "small": dict(m=128, n=1024, k=1024, rank=64, adapter_dtype=FP32, bias=True),
    "small, dropout": dict(m=128, n=1024, k=1024, rank=8, p=0.1),
    "few rows, dropout": dict(m=12, n=4096, k=4096, rank=72, adapter_dtype=FP32, p=0.1, bias=True),
    "unaligned": dict(m=4001, n=4097, k=3847, rank=17, adapter_dtype=FP32, bias=True),
    "unaligned, dropout": dict(m=4001, n=4097, k=3847, rank=17, adapter_dtype=FP32, p=0.1, bias=True),
    "dual": dict(m=4096, n=64, k=64, rank=32, adapter_dtype=FP32, p=0.1, bias=True),
    "dual, unaligned": dict(m=4096, n=63, k=63, rank=17, adapter_dtype=FP32, p=0.1, bias=True),
}


def target_name(arch):
    return arch if arch.startswith("gfx") else configs.target_of((int(arch[3:-1]), int(arch[-1])))


def check_launches(arch, named, tmp_path):
    """Tensor cores where there are rows for them, no register spilled, and no memory that is not torch's."""
    for name, launch in named:
        compiled = compile_for(arch, launch)
        assert compiled.metadata.shared <= configs.TARGETS[target_name(arch)].shared_bytes, name
        if launch.constants.get("BLOCK_ROWS", 0) >= 64:
            assert INSTRUCTIONS[arch] in compiled.asm["ptx"], name
        assert stack_bytes(compiled, tmp_path) == 0, name
        assert compiled.metadata.global_scratch_size == 0, name


def check(arch, tmp_path, **problem):
    target = target_name(arch)
    for name, launch in launches(target, **problem):
        compiled = compile_for(arch, launch)
        assert compiled.metadata.shared <= configs.TARGETS[target].shared_bytes, name
        code = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
        is_wide = launch.constants["BLOCK_ROWS"] >= 64 or name in ("dA", "dB")
        if problem.get("dtype", BF16) == BF16 and is_wide:
            assert INSTRUCTIONS[arch] in code, name
            uses_tma = configs.TARGETS[target].descriptors and launch.constants["BLOCK_ROWS"] == 128
            assert ("cp.async.bulk.tensor" in code) == uses_tma, name
        if not arch.startswith("gfx"):
            assert stack_bytes(compiled, tmp_path) == 0, name
            assert compiled.metadata.global_scratch_size == 0, f"{name}: memory that is not torch's"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_machine_code(arch, problem, tmp_path):
    check(arch, tmp_path, **PROBLEMS[problem])


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "gfx942"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_machine_code_of_the_other_architectures(arch, problem, tmp_path):
    check(arch, tmp_path, **PROBLEMS[problem])


@pytest.mark.full
@pytest.mark.parametrize("arch", list(INSTRUCTIONS))
@pytest.mark.parametrize("problem", REMAINING)
def test_machine_code_of_the_other_problems(arch, problem, tmp_path):
    check(arch, tmp_path, **REMAINING[problem])


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32(arch, precision, tmp_path, fp32_precision):
    fp32_precision(precision)
    check(arch, tmp_path, m=4096, n=1000, k=1024, rank=64, dtype=FP32, adapter_dtype=FP32, p=0.1, bias=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_order_between_programs(arch):
    (launch,) = (launch for name, launch in launches(arch, **PROBLEMS["large"]) if name == "forward all")
    code = compile_for(arch, launch).asm["ptx"].splitlines()
    barriers = [i for i, line in enumerate(code) if "bar.sync" in line]
    # One thread releases, after a barrier that is behind every thread's stores of s.
    (release,) = (i for i, line in enumerate(code) if ".gpu.release." in line)
    assert not [line for line in code[max(i for i in barriers if i < release) : release] if "st.global" in line]
    # One thread acquires, before a barrier that is ahead of every thread's loads of s.
    (acquire,) = (i for i, line in enumerate(code) if ".gpu.acquire." in line)
    after = code[acquire + 1 : min(i for i in barriers if i > acquire)]
    assert not [line for line in after if "ld.global" in line or "cp.async" in line]


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_dropout_mask_compiles(arch, tmp_path):
    mask = torch.empty(100, 300, dtype=torch.bool)
    launch = dropout_mask.dropout_mask_launch(torch.zeros(1, dtype=torch.int64), mask, 0.3)
    assert stack_bytes(compile_for(arch, launch), tmp_path) == 0


@pytest.mark.parametrize("columns", [128256, 50257])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_cross_entropy_rows(arch, dtype, columns, tmp_path):
    """A barrier between what is read and what a narrow gradient overwrites, and none that the compiler has left out."""
    logits, labels, losses = torch.empty(4, columns), torch.zeros(4, dtype=torch.int64), torch.empty(4)
    gradient = logits if dtype == FP32 else logits.view(dtype)[:, :columns]
    launch = cross_entropy_rows.launch(losses, logits, labels, losses, gradient, -100, 0.0, 30.0, 1.0)
    compiled = compile_for(arch, launch)
    assert stack_bytes(compiled, tmp_path) == 0
    code = compiled.asm["ptx"].splitlines()
    stores = [i for i, line in enumerate(code) if "st.global" in line]
    loads = [i for i, line in enumerate(code) if "ld.global" in line and i < stores[-1]]
    assert any("bar" in line for line in code[loads[-1] : stores[-1]])
    if columns % 16 == 0:
        assert any("ld.global.v4.b32" in line for line in code)


PROMPTS = {
    "aligned": dict(hidden=576),
    "aligned, one dtype": dict(hidden=4096, prompt_dtype=BF16, embeds=True),
    "aligned, nothing optional": dict(hidden=4096, dtype=torch.float16, full=False),
    "unaligned": dict(hidden=577),
}


def check_prompt(arch, tmp_path, **problem):
    for name, launch in prompt_launches(**problem):
        compiled = compile_for(arch, launch)
        if arch.startswith("gfx"):
            continue
        assert stack_bytes(compiled, tmp_path) == 0, name
        code = compiled.asm["ptx"]
        if problem["hidden"] % 16 == 0:
            assert "ld.global.v4.b32" in code, name
            assert "st.global.v4.b32" in code, name
            assert not re.findall(r"(?:ld|st)\.global\.b16", code), f"{name}: an element at a time"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_gated_activation(arch, activation, dtype, tmp_path):
    t = torch.empty(3, 1536, dtype=dtype)
    for launch in (
        gated_activation.forward_launch(t, t, activation, t),
        gated_activation.backward_launch(t, t, t, activation, t, t),
    ):
        compiled = compile_for(arch, launch)
        if arch.startswith("sm_"):
            assert "ld.global.v4" in compiled.asm["ptx"] or "ld.global.v2" in compiled.asm["ptx"]
            assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("problem", ["aligned", "unaligned"])
def test_prompt_embedding(arch, problem, tmp_path):
    check_prompt(arch, tmp_path, **PROMPTS[problem])


@pytest.mark.full
@pytest.mark.parametrize("arch", list(INSTRUCTIONS))
@pytest.mark.parametrize("problem", PROMPTS)
def test_prompt_embedding_on_every_architecture(arch, problem, tmp_path):
    check_prompt(arch, tmp_path, **PROMPTS[problem])


@pytest.mark.parametrize("head_dim", [64, 37])
@pytest.mark.parametrize("dtypes", [(FP32, BF16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_prefix_kv(arch, dtypes, head_dim, tmp_path):
    prefix = torch.empty(100, 8 * 3 * head_dim, dtype=dtypes[0])
    kv = torch.empty(8, 4, 3, 100, head_dim, dtype=dtypes[1])
    for launch in (prefix_kv.forward_launch(kv, prefix), prefix_kv.backward_launch(prefix, kv)):
        compiled = compile_for(arch, launch)
        assert stack_bytes(compiled, tmp_path) == 0
        code = compiled.asm["ptx"]
        if head_dim == 64:
            assert re.search(r"ld\.global\.v[24]\.b32", code)
            assert re.search(r"st\.global\.v[24]\.b32", code)
            assert not re.findall(r"(?:ld|st)\.global\.b16", code), "an element at a time"


@pytest.mark.parametrize(
    ("layout", "block", "dtype", "nested"),
    [
        ("codes4", 64, BF16, True), ("codes4", 64, FP32, False), ("codes4", 4096, FP32, True),
        ("codes4", 48, BF16, True), ("codes4_low", 32, BF16, True),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_dequantize(arch, layout, dtype, block, nested, tmp_path):
    """Kills: scales whose product and sum are one operation; weights that are read, or written, one at a time."""
    k = 3 * block
    launch = dequantize.dequantize_launch(
        torch.empty(96, k, dtype=dtype), list(random_packed(96, k, block, nested).parts), layout, block
    )
    compiled = compile_for(arch, launch)
    assert stack_bytes(compiled, tmp_path) == 0
    code = compiled.asm["ptx"]
    assert not [text for _, text in machine_code(compiled, arch, tmp_path) if "FFMA" in text]
    assert set(re.findall(r"st\.global\.(\S+)", code)) == {"v4.b32"}
    if block != 48:
        assert "ld.global.v4.b32" in code


@pytest.mark.parametrize(
    ("layout", "dtype", "block", "rows"),
    [
        ("int8", BF16, None, "each"),
        ("int8", FP32, 128, "each"),
        ("e4m3", BF16, 128, "squares"),
        ("e4m3", FP32, 48, "all"),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_dequantize_of_eight_bits(arch, layout, dtype, block, rows, tmp_path):
    """Kills: weights that are read, or written, one at a time; arithmetic in which subnormal numbers are zero; a type
    of eight bits that sm_80 does not have.
    """
    weight = random_scaled(96, 768, layout, block, rows)
    launch = dequantize.dequantize_launch(torch.empty(96, 768, dtype=dtype), list(weight.parts), layout, weight.block)
    compiled = compile_for(arch, launch)
    assert stack_bytes(compiled, tmp_path) == 0
    code = compiled.asm["ptx"]
    assert set(re.findall(r"st\.global\.(\S+)", code)) == {"v4.b32"}
    assert "ld.global.v4.b32" in code
    assert ".ftz" not in code


@pytest.mark.parametrize("debug", [False, True])
def test_debugging_stops_at_an_index_out_of_range(debug):
    _, launch = next(prompt_launches(hidden=64))
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.debug = debug
        code = compile_for("sm_80", launch).asm["ptx"]
    # The message is in the code as a list of bytes.
    message = ", ".join(str(byte) for byte in b"input_ids out of range")
    assert ("__assertfail" in code) == (message in code) == debug


def test_arguments_are_what_triton_3_6_takes():
    """Later versions compile and launch with a descriptor in a tuple, and without a constant behind inner tuples."""
    made = [launch for problem in PROBLEMS.values() for _, launch in launches("sm_90", **problem)]
    made += [launch for _, launch in prompt_launches(hidden=64)]
    descriptors = 0
    for launch in made:
        descriptors += sum(isinstance(argument, TensorDescriptor) for argument in launch.args)
        for argument in filter(lambda argument: isinstance(argument, tuple), launch.args):
            inner = [field for field in argument if isinstance(field, tuple)]
            assert not inner or argument[-1] is None, f"{type(argument).__name__} ends without a constant"
            fields = itertools.chain(argument, *inner)
            assert not any(isinstance(field, TensorDescriptor) for field in fields)
    assert descriptors == 8, "of p and q, in two problems, forward and backward"
