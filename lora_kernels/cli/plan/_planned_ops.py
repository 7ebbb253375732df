"""The ops that ``lora-kernels plan`` knows: each file of this folder registers its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple


class PlannedOp(NamedTuple):
    """How an op's problem is given on the command line."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    problem: Callable[[argparse.Namespace], dict[str, Any]]
    """Keyword arguments of ``lora_kernels._cuda.plan_<op>``, besides the device's."""


PLANNED_OPS: dict[str, PlannedOp] = {}


def register(name: str, add_arguments: Callable[..., None], problem: Callable[..., dict[str, Any]]) -> None:
    """Makes ``lora-kernels plan <name>`` known."""
    PLANNED_OPS[name] = PlannedOp(add_arguments, problem)
