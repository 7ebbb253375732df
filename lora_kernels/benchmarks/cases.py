"""A benchmark case: the same work by several implementations, and what measuring them gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import dispatch
from .measure import MAX_NULL, Ratio, Step, Timer, interleave, peak_bytes, repeats_for, saved_bytes, synchronizer

BASELINE, OURS, NULL = "PEFT", "fused", "PEFT again"
SAMPLE_S = 0.05
"""A shorter sample would measure the noise of clock and scheduler."""
EVENT_SAMPLE_S = 0.005
"""The same for times that a GPU's own events give."""


class WrongResult(RuntimeError):
    """An implementation does not compute what it should; nothing is timed then."""


@dataclass(frozen=True)
class Case:
    """Work to time. Its results have been checked when it is made."""

    level: str
    name: str
    what: str
    """"forward", "forward+backward", "decode" or "step"."""
    steps: Mapping[str, Step]
    """Implementations by name; ``BASELINE`` and ``OURS`` are among them."""
    forwards: Mapping[str, Step] = field(default_factory=dict)
    """Forward passes whose result holds the graph, for the bytes saved for backward."""
    constants: Sequence[Tensor] = ()
    """Parameters and buffers: not counted as saved."""
    flops: int = 0
    bytes: int = 0
    """Least work and traffic of the fused result; 0 where the share of the speed of light is not asked for."""
    shape: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the problem for plots: m, n, k, rank, dropout."""
    within: Callable[[], AbstractContextManager] = nullcontext
    """Entered once around all samples: a context of each call's own would be timed with it."""
    schedules: Callable[[], Mapping[str, str]] = dict
    """By op, what dispatch chooses now for the fused calls, and why, where the case can tell."""


@dataclass(frozen=True)
class Result:
    """What ``measure`` found. Ratios are medians over rounds, of samples taken in the same round."""

    level: str
    name: str
    what: str
    seconds: dict[str, float]
    speedup: dict[str, Ratio]
    """Time of PEFT over time of each implementation: above 1 means faster than PEFT."""
    over_frozen: dict[str, Ratio]
    """Time of each over that of the frozen layer, where the case has one."""
    saved: dict[str, int]
    peak: dict[str, int]
    flops: int
    bytes: int
    light_share: float | None
    shape: dict[str, float]
    served: dict[str, int]
    """Calls of ours in one step, by op and backend."""
    declined: dict[str, int]
    """The same of the faster paths that were passed over, by op and reason."""
    schedules: dict[str, str]

    @property
    def quotable(self) -> bool:
        """Whether PEFT against itself was near enough to 1."""
        return is_quiet(self.speedup[NULL])


def is_quiet(null: Ratio) -> bool:
    """Whether a null run allows to quote what was measured beside it."""
    return abs(null.median - 1) <= MAX_NULL


def measure(
    case: Case, rounds: int, timer: Timer, device: torch.device, light: Callable[[Case], float], attempts: int = 1,
    sample_s: float = SAMPLE_S,
) -> Result:  # fmt: skip
    """Times every implementation of ``case``, interleaved, and PEFT twice.

    Args:
        case: what to time.
        rounds: samples per implementation.
        attempts: how often to start anew at most while PEFT differs from itself by more than ``MAX_NULL``. Nothing
            else decides it; the last attempt counts.
        timer: takes one sample.
        device: where it runs.
        light: seconds that the least work of a case takes at this machine's measured speeds; 0 where unknown.
        sample_s: how long a sample of ours takes, about.
    """
    saved = {name: saved_bytes(forward, case.constants) for name, forward in case.forwards.items()}
    steps = {**case.steps, NULL: case.steps[BASELINE]}
    with case.within():
        peak = {name: peak_bytes(step, device) for name, step in case.steps.items()}
        counts, schedules = _observe(case, timer)
        repeats = repeats_for(case.steps[OURS], sample_s, synchronizer(device))
        for _ in range(attempts):
            times = interleave(steps, rounds, repeats=repeats, warmup=2, timer=timer)
            if is_quiet(times.ratio(BASELINE, NULL)):
                break
    shortest = light(case)
    return Result(
        case.level, case.name, case.what,
        seconds={name: times.median(name) for name in steps},
        speedup={name: times.ratio(BASELINE, name) for name in steps if name != BASELINE},
        over_frozen={name: times.ratio(name, "frozen") for name in steps if "frozen" in steps and name != "frozen"},
        saved=saved, peak=peak, flops=case.flops, bytes=case.bytes,
        light_share=shortest / times.median(OURS) if shortest else None,
        shape=dict(case.shape),
        served={f"{op} on {backend}": n for (op, backend), n in counts["served"].items()},
        declined={f"{op}: {reason}": n for (op, reason), n in counts["fallback"].items()},
        schedules=schedules,
    )  # fmt: skip


def _observe(case: Case, timer: Timer) -> tuple[dict[str, dict[tuple[str, str], int]], dict[str, str]]:
    """What serves one fused step where ``timer`` has it run, which may be in a graph: counters, and schedules."""
    schedules: dict[str, str] = {}

    def step() -> None:
        case.steps[OURS]()
        schedules.update(case.schedules())

    with dispatch.own_stats():
        once = getattr(timer, "once", None)
        step() if once is None else once(step)
        return dispatch.stats(), schedules
