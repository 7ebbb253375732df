"""The problem of ``grouped_lora_linear`` and its gradients."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_RANK, MAX_ROW, MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    size = arguments.integer(1, MAX_ROW)
    parser.add_argument("--m", type=arguments.integer(1, MAX_SIZE), required=True, help="tokens: rows of x")
    parser.add_argument("--groups", type=arguments.integer(1, MAX_SIZE), required=True, help="groups of rows: adapters")
    parser.add_argument("--n", type=size, required=True, help="output features: rows of a weight")
    parser.add_argument("--k", type=size, required=True, help="input features: columns of a weight")
    parser.add_argument("--r", type=arguments.integer(1, MAX_RANK), required=True, help="rank of the adapters")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "tf32"), required=True, help="tf32: fp32 tensors")
    parser.add_argument("--shared", action="store_true", help="one weight of all groups")
    parser.add_argument("--in-columns", action="store_true", help="weights lie in memory as their transposes")
    parser.add_argument(
        "--schedule", choices=("auto", "one launch", "cublas"), default="auto", help="(default: what is fastest there)"
    )


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "m": options.m,
        "n": options.n,
        "k": options.k,
        "rank": options.r,
        "groups": options.groups,
        "is_shared": options.shared,
        "in_columns": options.in_columns,
        "capability": int(options.arch.removeprefix("sm_")),
        "schedule": options.schedule,
    }


register("grouped_lora_linear", _add_arguments, _problem)
register("grouped_lora_linear_backward", _add_arguments, _problem)
