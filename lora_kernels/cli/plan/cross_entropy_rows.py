"""The problem of ``cross_entropy_rows``, a chunk of ``linear_cross_entropy``."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    size = arguments.integer(1, MAX_SIZE)
    parser.add_argument("--rows", type=size, required=True, help="rows of logits")
    parser.add_argument("--columns", type=size, required=True, help="classes")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), required=True, help="of the gradient")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("rows", "columns", "dtype")}


register("cross_entropy_rows", _add_arguments, _problem)
