"""A launch as a value, and the counters that it is given."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs


class Device(NamedTuple):
    """What a configuration depends on."""

    target: str
    """Key of ``configs.TARGETS``."""
    sms: int


@functools.cache
def device_of(device: torch.device) -> Device | None:
    """None for a GPU that is too old. The interpreter, which runs on the CPU, plays an A100."""
    if device.type == "cpu":
        return Device("sm_80", 108)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    target = configs.target_of(capability)
    return None if target is None else Device(target, torch.cuda.get_device_properties(device).multi_processor_count)


LAST_CONSTANT = None
"""What a tuple of tuples ends with. Triton 3.6 forgets the constants of an inner tuple, strides of 1, where it enters a
loop, unless the outer tuple has a constant of its own behind them.
"""


class Launch(NamedTuple):
    """One kernel launch; nothing of it depends on whether a GPU is present."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    counters: int = 0
    """How many the kernel's argument ``counters`` points to: int32, zero when the kernel begins. 0: it is None."""

    def run(self, counters: Tensor | None = None) -> None:
        """Launch on the current stream of the device that the first tensor is on; ``run_all`` makes the counters."""
        named = self.constants if counters is None else {**self.constants, "counters": counters}
        self.kernel[self.grid](*self.args, **named, num_warps=self.num_warps, num_stages=self.num_stages)


def run_all(launches: Sequence[Launch], device: torch.device) -> None:
    """One after the other; one memset zeroes the counters of them all.

    Counters that are kept for the next call would save the memset, but nothing may outlive a call: torch allocates from
    whatever pool is in use, and that may belong to CUDA graphs (``torch.compile(mode="reduce-overhead")``) or be
    unmapped between two steps.
    """
    # 16 bytes are what Triton compiles a pointer for.
    words = [configs.blocks(launch.counters, 4) * 4 for launch in launches]
    zeros = torch.zeros(sum(words), dtype=torch.int32, device=device)
    for launch, counters in zip(launches, zeros.split(words)):
        launch.run(counters if launch.counters else None)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes ``tensor``'s GPU the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
