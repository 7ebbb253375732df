"""The problem of ``prefix_kv`` and its gradient."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    size, positive = arguments.integer(0, MAX_SIZE), arguments.integer(1, MAX_SIZE)
    parser.add_argument("--tokens", type=size, required=True, help="virtual tokens of the prefix")
    parser.add_argument("--layers", type=positive, required=True, help="layers that attend to it")
    parser.add_argument("--heads", type=positive, required=True, help="heads of the keys and values")
    parser.add_argument("--head-dim", type=positive, required=True, help="elements of a head")
    parser.add_argument("--batch", type=size, default=1, help="samples whose copies are written (default: 1)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), required=True, help="of the keys and values")
    parser.add_argument("--prefix-dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: fp32)")
    parser.add_argument("--unaligned", action="store_true", help="rows of the tensors do not begin at 16 bytes")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "prefix_dtype", "tokens", "layers", "heads", "head_dim", "batch")
    return {**{name: getattr(options, name) for name in names}, "rows_aligned": not options.unaligned}


register("prefix_kv", _add_arguments, _problem)
register("prefix_kv_backward", _add_arguments, _problem)
