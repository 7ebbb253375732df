"""Measuring without fooling oneself: interleaved timings with a null run, and the bytes autograd keeps for backward."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]

MAX_NULL = 0.02
"""How far from 1 the median ratio of a null run may be for timings to be quoted."""
NOISE = "PEFT differs from itself by more than 2 %, so these times are too noisy to quote; is the machine busy?"


class Ratio(NamedTuple):
    """Median of the per-round ratios of two variants, with their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Timings(NamedTuple):
    """Seconds per call of each variant, one entry per round. Entry i of every variant was taken in the same round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one variant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Ratio:
        """``name`` relative to ``base``: below 1 means that ``name`` is faster."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return Ratio(statistics.median(ratios), low, high)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until ``device`` has finished what was queued on it."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def interleave(
    variants: Mapping[str, Step],
    rounds: int,
    *,
    repeats: int = 1,
    warmup: int = 1,
    sync: Callable[[], None] = lambda: None,
    after_round: Callable[[int], None] = lambda done: None,
) -> Timings:
    """Time all variants once per round, so that a change in the machine's speed hits them alike.

    The order rotates from round to round and runs backwards in every other one: no variant always follows the same
    neighbour or always comes first. To know what difference the machine alone produces, pass one variant twice under
    two names (a null run).

    Args:
        variants: what to time, by name.
        rounds: number of samples per variant.
        repeats: calls per sample; the sample is their mean.
        warmup: untimed calls of each variant first.
        sync: called before the clock is read.
        after_round: called with the number of finished rounds, outside the timed part.
    """
    for step in variants.values():
        for _ in range(warmup):
            step()
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    try:
        for done in range(rounds):
            gc.collect()  # here and not inside a sample, where it would hit one variant at random
            gc.disable()
            shift = (done // 2) % len(names)
            order = names[shift:] + names[:shift]
            for name in order if done % 2 == 0 else reversed(order):
                sync()
                start = time.perf_counter()
                for _ in range(repeats):
                    variants[name]()
                sync()
                seconds[name].append((time.perf_counter() - start) / repeats)
            after_round(done + 1)
    finally:
        if collecting:
            gc.enable()
    return Timings(seconds)


def repeats_for(step: Step, seconds: float, sync: Callable[[], None] = lambda: None) -> int:
    """How many calls of ``step`` make a sample of about ``seconds``; at least one."""
    step()
    sync()
    start = time.perf_counter()
    step()
    sync()
    return max(1, round(seconds / max(time.perf_counter() - start, 1e-9)))


def saved_bytes(forward: Step, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd holds between forward and backward.

    Storages are counted once, however many views of them are saved. Storages of ``exclude`` (pass the parameters and
    buffers) do not count: they exist anyway.

    Args:
        forward: runs the forward pass and returns its result; the graph must be alive until then.
        exclude: tensors whose storage is not counted.
    """
    skipped = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # keeps the storage alive, so that no address is counted for two tensors

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(sizes.values())
