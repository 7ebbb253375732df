"""What the commands print: errors, counters, and a progress bar where there is a terminal to draw it on."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import lora_kernels as lk

from ..text import one_line

_PLAIN_INTERVAL_S = 10.0
_PLAIN_LINES = 20


class CliError(Exception):
    """A mistake the user can correct: printed as one line; the command exits with status 2."""


def error(message: str) -> None:
    """Print ``message`` to stderr as one line."""
    print(f"error: {one_line(message)}", file=sys.stderr)


def counters() -> list[str]:
    """``lk.stats()`` as lines: what served the calls, and what was declined for which reason."""
    counts = lk.stats()
    served = ", ".join(f"{op} on {backend} {n:,}" for (op, backend), n in sorted(counts["served"].items()))
    lines = [f"calls served: {served or 'none'}"]
    for (op, reason), n in sorted(counts["fallback"].items()):
        lines.append(f"declined by {op}: {n:,} ({reason})")
    return lines


class Progress(Protocol):
    """A running display of a loop."""

    def update(self, done: int, status: str) -> None:
        """Report that ``done`` steps are complete; ``status`` is shown beside the bar."""

    def note(self, message: str) -> None:
        """Print a line without disturbing the bar."""


@contextlib.contextmanager
def progress(total: int, label: str, done: int = 0) -> Iterator[Progress]:
    """A progress display for ``total`` steps, ``done`` of them already complete.

    A rich bar on a terminal; a line every now and then when the output goes to a file or rich is not installed.
    """
    if sys.stdout.isatty():
        try:
            from rich import progress as rich_progress
        except ImportError:
            pass
        else:
            bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TextColumn("{task.fields[status]}"),
                rich_progress.TimeRemainingColumn(),
            )
            with bar:
                yield _RichProgress(bar, bar.add_task(label, total=total, completed=done, status=""))
            return
    yield _PlainProgress(total, label, done)


class _RichProgress:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, done: int, status: str) -> None:
        self._bar.update(self._task, completed=done, status=status)

    def note(self, message: str) -> None:
        self._bar.console.print(message, highlight=False, markup=False)


class _PlainProgress:
    def __init__(self, total: int, label: str, done: int) -> None:
        self._total, self._label = total, label
        self._every = max(1, total // _PLAIN_LINES)
        self._printed_at = time.monotonic()

    def update(self, done: int, status: str) -> None:
        now = time.monotonic()
        due = done % self._every == 0 or now - self._printed_at >= _PLAIN_INTERVAL_S
        if due or done in (1, self._total):
            self._printed_at = now
            print(f"{self._label} {done}/{self._total}  {status}", flush=True)

    def note(self, message: str) -> None:
        print(message, flush=True)
