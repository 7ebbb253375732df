"""The problem of ``grouped_lora_linear`` and its gradients."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register
from .lora_linear import add_sizes, sizes


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, 1)
    parser.add_argument("--groups", type=arguments.integer(1, MAX_SIZE), required=True, help="groups of rows: adapters")
    parser.add_argument("--shared", action="store_true", help="one weight of all groups")
    parser.add_argument("--in-columns", action="store_true", help="weights lie in memory as their transposes")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **sizes(options),
        "groups": options.groups,
        "is_shared": options.shared,
        "in_columns": options.in_columns,
    }


register("grouped_lora_linear", _add_arguments, _problem)
register("grouped_lora_linear_backward", _add_arguments, _problem)
