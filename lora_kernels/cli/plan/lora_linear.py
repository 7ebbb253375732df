"""The problem of ``lora_linear`` and its gradients."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import CLUSTERS, MAX_RANK, MAX_ROW, MAX_SIZE, WGMMA
from .. import _arguments as arguments
from ._planned_ops import register


def add_sizes(parser: argparse.ArgumentParser, fewest_rows: int, *more_schedules: str) -> None:
    """What rows in groups are told by, too."""
    size = arguments.integer(1, MAX_ROW)
    parser.add_argument("--m", type=arguments.integer(fewest_rows, MAX_SIZE), required=True, help="tokens: rows of x")
    parser.add_argument("--n", type=size, required=True, help="output features: rows of a weight")
    parser.add_argument("--k", type=size, required=True, help="input features: columns of a weight")
    parser.add_argument("--r", type=arguments.integer(1, MAX_RANK), required=True, help="rank of an adapter")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "tf32"), required=True, help="tf32: fp32 tensors")
    parser.add_argument(
        "--schedule", choices=("auto", "one launch", "cublas", *more_schedules), default="auto",
        help="(default: what is fastest there)",
    )  # fmt: skip


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """What ``add_sizes`` has read, and the architecture."""
    return {
        "dtype": options.dtype,
        "m": options.m,
        "n": options.n,
        "k": options.k,
        "rank": options.r,
        "capability": int(options.arch.removeprefix("sm_")),
        "schedule": options.schedule,
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, 0, WGMMA, CLUSTERS)
    parser.add_argument("--dropout", action="store_true", help="the branch drops out elements of x")
    parser.add_argument("--unaligned", action="store_true", help="rows of the tensors do not begin at 16 bytes")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {**sizes(options), "rows_aligned": not options.unaligned, "has_dropout": options.dropout}


register("lora_linear", _add_arguments, _problem)
register("lora_linear_backward", _add_arguments, _problem)
