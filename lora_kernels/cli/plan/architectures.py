"""What GPUs offer to a kernel, and what kernels use of it: for plans and for the build's table.

No imports from the package: setup.py runs this file before there is one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """The limits of a compute capability, and a well-known device of it."""

    device: str
    sms: int
    """Of that device."""
    shared_per_block: int
    """Bytes that a block may opt in to."""
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int


ARCHITECTURES = {
    "sm_80": Architecture("A100", 108, 163 << 10, 164 << 10, 2048, 32),
    "sm_86": Architecture("RTX 3090", 82, 99 << 10, 100 << 10, 1536, 16),
    "sm_89": Architecture("RTX 4090", 128, 99 << 10, 100 << 10, 1536, 24),
    "sm_90": Architecture("H100 SXM", 132, 227 << 10, 228 << 10, 2048, 32),
    "sm_100": Architecture("B200", 148, 227 << 10, 228 << 10, 2048, 32),
    "sm_120": Architecture("RTX 5090", 170, 99 << 10, 100 << 10, 1536, 24),
}

_WARP = 32
_SCHEDULERS = 4
_REGISTERS_PER_SCHEDULER = 16384
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_OF_SYSTEM = 1024
"""Bytes that the driver keeps in each block."""


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_sm(arch: Architecture, registers: int, threads: int, shared: int) -> int:
    """How many blocks of a kernel fit on an SM at once.

    Args:
        registers: per thread.
        shared: bytes per block, static and dynamic.
    """
    warps = -(-threads // _WARP)
    warps_by_registers = _SCHEDULERS * (_REGISTERS_PER_SCHEDULER // _ceil(registers * _WARP, _REGISTER_UNIT))
    return min(
        arch.blocks_per_sm,
        arch.threads_per_sm // (warps * _WARP),
        warps_by_registers // warps,
        arch.shared_per_sm // _ceil(shared + _SHARED_OF_SYSTEM, _SHARED_UNIT),
    )


class KernelUse(NamedTuple):
    """What ptxas says of a kernel."""

    kernel: str
    arch: str
    registers: int
    memory: int
    """Bytes of stack and spills, which the compiler had to add."""
    shared: int
    """Bytes of static shared memory."""


def kernel_resources(log: str) -> list[KernelUse]:
    """What every kernel in the output of ``ptxas -v`` uses.

    Raises:
        ValueError: a kernel's lines are not as they were, or there is none.
    """
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        re.DOTALL,
    )
    found = []
    for match in pattern.finditer(log):
        memory = sum(int(match[group]) for group in ("stack", "stores", "loads"))
        shared = int(match["shared"] or 0)
        found.append(KernelUse(match["kernel"], match["arch"], int(match["registers"]), memory, shared))
    if not found or len(found) != log.count("Compiling entry function"):
        raise ValueError("the output of ptxas -v cannot be read")
    return found


def resource_table(kernels: list[KernelUse], described: dict[str, tuple[int, int]]) -> str:
    """A line per kernel and architecture. blocks/SM: how many blocks are resident at once.

    Args:
        described: threads and bytes of dynamic shared memory of each kernel, by its mangled name.
    """
    lines = ["registers  stack+spills  threads  shared  blocks/SM  arch    kernel"]
    for use in kernels:
        threads: Any
        shared: Any
        blocks: Any
        threads = shared = blocks = "?"
        if use.kernel in described:
            threads, dynamic = described[use.kernel]
            shared = use.shared + dynamic
            arch = ARCHITECTURES.get(use.arch.rstrip("af"))
            if arch is not None:
                blocks = blocks_per_sm(arch, use.registers, threads, shared)
        lines.append(
            f"{use.registers:9}  {use.memory:12}  {threads:>7}  {shared:>6}  {blocks:>9}  {use.arch:6}  "
            f"{readable(use.kernel)}"
        )
    return "\n".join(lines) + "\n"


def readable(kernel: str) -> str:
    """A mangled kernel name for people, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return kernel
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |lk::|\(.*\)$", "", re.sub(r"\((?:int|bool|lk::\w+)\)", "", name))
