"""The problem of ``dequantize``."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    size = arguments.integer(1, MAX_SIZE)
    parser.add_argument("--n", type=size, required=True, help="output features: rows of the weight")
    parser.add_argument("--k", type=size, required=True, help="input features: columns of the weight")
    parser.add_argument("--block", type=size, default=64, help="weights that share a scale (default: 64)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), required=True, help="of the weights written")
    parser.add_argument("--unaligned", action="store_true", help="the packed weights do not begin at 16 bytes")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {**{name: getattr(options, name) for name in ("n", "k", "block", "dtype")}, "aligned": not options.unaligned}


register("dequantize", _add_arguments, _problem)
