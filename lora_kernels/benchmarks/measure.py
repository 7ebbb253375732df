"""Measuring without fooling oneself: interleaved timings with a null run, and the bytes autograd keeps for backward."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]
Timer = Callable[[Step, int], float]
"""Seconds per call of a step, over a number of calls."""

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


def host_timer(sync: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Reads ``clock`` on the host, after ``sync``.

    ``time.process_time`` as the clock counts what all threads of this process computed, and not the time that a busy
    machine gave to others: a fair measure for one thread.
    """

    def seconds(step: Step, repeats: int) -> float:
        sync()
        start = clock()
        for _ in range(repeats):
            step()
        sync()
        return (clock() - start) / repeats

    return seconds


class EventTimer:
    """Times an eager step by CUDA events. Calls follow each other, as the layers of a model do: the host runs ahead of
    the GPU where it can, and what the GPU waits for is in it where it cannot.
    """

    _FEWEST_CALLS = 8
    """In a sample: the first one has nothing to hide behind."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * l2, dtype=torch.int8, device=device)

    def __call__(self, step: Step, repeats: int) -> float:
        return self._seconds(step, max(repeats, self._FEWEST_CALLS))

    def _seconds(self, step: Step, calls: int) -> float:
        """Per call, from an L2 cache that was overwritten."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


class GraphTimer(EventTimer):
    """Times the replay of a CUDA graph of a step by events, each replay after the L2 cache was overwritten.

    What the host does between launches is not in it. A step that a graph cannot hold raises torch's error.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._graphs: dict[Step, torch.cuda.CUDAGraph] = {}

    def __call__(self, step: Step, repeats: int) -> float:
        graph = self._graphs.get(step)
        if graph is None:
            graph = self._graphs[step] = self._capture(step)
        return sum(self._seconds(graph.replay, 1) for _ in range(repeats)) / repeats

    def once(self, step: Step) -> None:
        """Has a step that ran before captured, as those that are timed are."""
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()

    @staticmethod
    def _capture(step: Step) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph


def interleave(
    variants: Mapping[str, Step],
    rounds: int,
    *,
    repeats: int = 1,
    warmup: int = 1,
    sync: Callable[[], None] = lambda: None,
    timer: Timer | None = None,
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
        timer: takes a sample, in place of the wall clock and ``sync``.
        after_round: called with the number of finished rounds, outside the timed part.
    """
    timer = timer or host_timer(sync)
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
                seconds[name].append(timer(variants[name], repeats))
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


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that ``step`` holds at a time, beyond what was there before it."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library reports there that there is no GPU, at every start and whatever its log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
