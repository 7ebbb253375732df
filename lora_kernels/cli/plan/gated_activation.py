"""The problem of ``gated_activation`` and its gradients."""

from __future__ import annotations

import argparse
from typing import Any

from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=arguments.integer(0, 2**40), required=True, help="elements of each tensor")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), required=True, help="of the tensors")
    parser.add_argument("--unaligned", action="store_true", help="a tensor does not begin at 16 bytes")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": options.dtype, "count": options.count, "aligned": not options.unaligned}


register("gated_activation", _add_arguments, _problem)
register("gated_activation_backward", _add_arguments, _problem)
