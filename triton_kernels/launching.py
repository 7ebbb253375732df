"""A launch as a value, and the counters that launches share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

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


class Launch(NamedTuple):
    """One kernel launch, complete; nothing of it depends on whether a GPU is present."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch on the current stream of the device that the first tensor is on."""
        self.kernel[self.grid](*self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


def run_all(launches: Iterable[Launch]) -> None:
    """One after the other."""
    for launch in launches:
        launch.run()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes ``tensor``'s GPU the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_counters: dict[tuple[int, int], torch.Tensor] = {}


def counters(device: torch.device, words: int) -> torch.Tensor:
    """int32 [>= words], zero. A kernel that uses them leaves them zero.

    Launches on one stream follow each other and share one tensor. A captured graph gets its own, zeroed by a memset in
    the graph, because it may be replayed on any stream.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(words, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    held = _counters.get(key)
    if held is None or held.numel() < words:
        held = _counters[key] = torch.zeros(max(words, 4096), dtype=torch.int32, device=device)
    return held
