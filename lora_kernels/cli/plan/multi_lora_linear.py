"""The problem of ``multi_lora_linear`` and its gradients."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register
from .lora_linear import add_sizes, sizes


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, 1)
    parser.add_argument("--adapters", type=arguments.integer(1, MAX_SIZE), required=True, help="adapters in the pools")
    parser.add_argument("--dropout", action="store_true", help="the branch drops out elements of x")
    parser.add_argument("--in-columns", action="store_true", help="the weight lies in memory as its transpose")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **sizes(options),
        "adapters": options.adapters,
        "w_is_whole": not options.in_columns,
        "has_dropout": options.dropout,
    }


register("multi_lora_linear", _add_arguments, _problem)
register("multi_lora_linear_backward", _add_arguments, _problem)
