"""What GPUs offer to a kernel, for plans and for the build's table. No imports from the package: setup.py runs it."""

from __future__ import annotations

from typing import NamedTuple


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
