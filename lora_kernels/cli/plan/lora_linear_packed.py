"""The problem of ``lora_linear_packed``, where it is one launch: few rows."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_RANK, MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    size = arguments.integer(1, MAX_SIZE)
    parser.add_argument("--m", type=size, required=True, help="tokens: rows of x")
    parser.add_argument("--n", type=size, required=True, help="output features: rows of the weight")
    parser.add_argument("--k", type=size, required=True, help="input features: columns of the weight")
    parser.add_argument("--block", type=size, default=64, help="weights that share a scale (default: 64)")
    parser.add_argument("--r", type=arguments.integer(1, MAX_RANK), required=True, help="rank of the adapter")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), required=True, help="of x")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    sizes = {name: getattr(options, name) for name in ("dtype", "m", "n", "k", "block")}
    return {**sizes, "rank": options.r, "capability": int(options.arch.removeprefix("sm_"))}


register("lora_linear_packed", _add_arguments, _problem)
