"""Argument checks: each turns a string into a value or explains in a few words why it cannot."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from ._console import CliError


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An integer of at least ``low`` and, where given, at most ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"must be at least {low}, got {value}" if value < low else f"must be at most {high}, got {value}"
            )
        return value

    return parse


def positive(text: str) -> float:
    """A finite number above zero."""
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def probability(text: str) -> float:
    """A number in [0, 1)."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {text}")
    return value


def names(text: str) -> list[str]:
    """Comma-separated names."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("expected at least one name")
    return found


def path(text: str) -> str:
    """The name of a file or directory; an empty one would mean the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def add_model_and_adapter(parser: argparse.ArgumentParser) -> None:
    """What a command reads that works on an adapter and its base model."""
    parser.add_argument(
        "--model", required=True, type=path, metavar="DIR", help="base model: a directory, or a name on the hub"
    )
    parser.add_argument(
        "--adapter", required=True, type=path, metavar="DIR", help="adapter directory, from finetune or PEFT"
    )


def threads(text: str) -> int:
    """CPU threads: more than a machine has processors help nobody, and far more cannot be started."""
    return integer(1, 4 * (os.cpu_count() or 1))(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def output_directory(name: str, overwrite: bool, hint: str = "") -> Path:
    """``name`` as a path that can be written to: a new or empty directory, or any directory with ``overwrite``."""
    path = Path(name)
    try:
        if path.exists() and not path.is_dir():
            raise CliError(f"{path} is a file; --out must be a directory")
        if not overwrite and path.is_dir() and any(path.iterdir()):
            raise CliError(f"{path} is not empty; {hint}replace its files with --overwrite")
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise CliError(f"--out {path}: {error.strerror}") from None
    if not existing.is_dir():
        raise CliError(f"--out {path}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CliError(f"--out {path}: {existing} may not be written to")
    return path
