"""Who computes a LoRA linear on a GPU, by measurement instead of by model: off, unless LORA_KERNELS_WINNERS is 1.

``lora-kernels check-gpu --write-winners`` and ``lora-kernels bench --device cuda --write-winners`` time layers with
each backend and schedule, and remember the fastest in ``$XDG_CACHE_HOME/lora_kernels`` (``~/.cache``), by the names of
the device and of the versions of torch, whose cuBLAS is a candidate's, and of Triton.
Problems that were not timed are left to the model. Which one wins can change the rounding of a result.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import measured
from ..plain import float32_products
from . import cuda, triton

_OF_SM90 = tuple(f"cuda, {schedule}" for schedule in (cuda.WGMMA, cuda.CLUSTERS))
CANDIDATES = ("cuda, one launch", "cuda, cublas", *_OF_SM90, "triton")
"""Backend and, behind the first comma, its schedule."""
ENABLED = os.environ.get("LORA_KERNELS_WINNERS") == "1"
_WHAT = "winners"


def candidates(device: torch.device) -> tuple[str, ...]:
    """Those that differ on a GPU: elsewhere than on a capability of 9.0, wgmma is what is taken without asking."""
    has_wgmma = cuda.capability(device) == (9, 0)
    return tuple(name for name in CANDIDATES if has_wgmma or name not in _OF_SM90)


def problem(
    dtype: torch.dtype, rows: int, columns: int, depth: int, rank: int, *, float_adapters: bool, dropout: bool,
    backward: bool, captured: bool,
) -> str:  # fmt: skip
    """What an answer is remembered by: numbers of rows and ranks up to the next power of two count as the same.

    Args:
        columns, depth: N and K in the forward, K and N in the backward.
        float_adapters: under activations of 16 bits, adapters are of float32.
        captured: into a CUDA graph, where what a launch costs the host does not count.
    """
    kind = f"{'backward' if backward else 'forward'} {float32_products(dtype) or str(dtype).removeprefix('torch.')}"
    sizes = f"{columns}x{depth} rows<={_power_of_two(rows)} rank<={_power_of_two(rank)}"
    return f"{kind} {sizes}" + " fp32 adapters" * float_adapters + " dropout" * dropout + " captured" * captured


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def winner(
    x: torch.Tensor, columns: int, depth: int, lora_A: torch.Tensor, *, dropout: bool, backward: bool
) -> str | None:
    """One of ``CANDIDATES`` for the rows of ``x``; None where nothing was measured, or that is not wanted."""
    if not ENABLED:
        return None
    rows, captured = x.numel() // x.shape[-1], torch.cuda.is_current_stream_capturing()
    name = problem(
        x.dtype, rows, columns, depth, lora_A.shape[0], float_adapters=lora_A.dtype != x.dtype, dropout=dropout,
        backward=backward, captured=captured,
    )  # fmt: skip
    return known(x.device).get(name)


@functools.cache
def known(device: torch.device) -> Mapping[str, str]:
    """The winners of a device, as its file has them when it is first asked for."""
    return measured.read(path(device), _WHAT, _candidate)


def remember(device: torch.device, winners: Mapping[str, str]) -> Path:
    """Adds to the device's file, and returns where that is."""
    measured.write(path(device), _WHAT, winners, _candidate)
    known.cache_clear()
    return path(device)


def path(device: torch.device) -> Path:
    """The file of a device, under the versions of torch and Triton that are installed."""
    compiler = f"triton-{'.'.join(map(str, triton.version()))}" if triton.is_installed() else "no-triton"
    return measured.file_of(_WHAT, device_name(device), f"torch-{torch.__version__}", compiler)


def device_name(device: torch.device) -> str:
    """As the driver calls it."""
    return torch.cuda.get_device_name(device)


def _candidate(value: str) -> str:
    if value not in CANDIDATES:
        raise ValueError(f"{value!r} is none of {', '.join(CANDIDATES)}")
    return value
