"""From timed layers to the backends and schedules that ``support/winners.py`` remembers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..support import winners
from .cases import OURS, Result

_DTYPES = (torch.bfloat16, torch.float16)
_FORWARDS = ("forward", "decode")


def winners_of(results: Sequence[Result], *, captured: bool) -> dict[str, str]:
    """The fastest candidate of each problem, forward and backward; of two results for one problem, by the first.

    ``captured``: whether CUDA graphs were timed.

    A backward's time is that of both less the forward's, by the same candidate. Left out is what says nothing: results
    beside which PEFT differed from itself, or with one candidate.
    """
    timed = [
        (result, dtype, times)
        for result in results
        if result.quotable and (dtype := _dtype(result)) is not None and len(times := _candidates(result)) > 1
    ]
    forward: dict[str, dict[str, float]] = {}
    for result, dtype, times in timed:
        if result.what in _FORWARDS:
            forward.setdefault(_problem(result, dtype, False, captured), times)
    found = {problem: min(times, key=times.__getitem__) for problem, times in forward.items()}
    for result, dtype, times in timed:
        alone = forward.get(_problem(result, dtype, False, captured), {})
        rest = {name: seconds - alone[name] for name, seconds in times.items() if name in alone}
        if result.what == "forward+backward" and rest:
            found.setdefault(_problem(result, dtype, True, captured), min(rest, key=rest.__getitem__))
    return found


def _candidates(result: Result) -> dict[str, float]:
    """Seconds by candidate."""
    times = {name: result.seconds.get(f"{OURS}, {name}") for name in winners.CANDIDATES}
    return {name: seconds for name, seconds in times.items() if seconds is not None}


def _dtype(result: Result) -> torch.dtype | None:
    """Of 16 bits; None for others, which have one candidate."""
    return next((dtype for dtype in _DTYPES if str(dtype).removeprefix("torch.") in result.name), None)


def _problem(result: Result, dtype: torch.dtype, backward: bool, captured: bool) -> str:
    m, n, k, rank = (int(result.shape[name]) for name in ("m", "n", "k", "rank"))
    columns, depth = (k, n) if backward else (n, k)
    dropout, float_adapters = result.shape["dropout"] > 0, result.shape["fp32_adapters"] > 0
    return winners.problem(
        dtype, m, columns, depth, rank, float_adapters=float_adapters, dropout=dropout, backward=backward,
        captured=captured,
    )  # fmt: skip
