"""The problem of ``lora_pack`` and its gradients."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_RANK, MAX_ROW, MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    size = arguments.integer(1, MAX_ROW)
    parser.add_argument("--m", type=arguments.integer(1, MAX_SIZE), required=True, help="tokens: rows of x")
    parser.add_argument("--k", type=size, required=True, help="input features: columns of the weights")
    parser.add_argument("--n", type=size, nargs="+", required=True, help="output features of each member")
    parser.add_argument(
        "--r", type=arguments.integer(0, MAX_RANK), nargs="+", required=True, help="rank of each; 0: no adapter"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "tf32"), required=True, help="tf32: fp32 tensors")
    parser.add_argument(
        "--schedule", choices=("auto", "one launch", "cublas"), default="auto",
        help='"cublas": members one by one (default: what is fastest there)',
    )  # fmt: skip


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "m": options.m,
        "n": options.n,
        "k": options.k,
        "rank": options.r,
        "is_served": True,
        "capability": int(options.arch.removeprefix("sm_")),
        "schedule": options.schedule,
    }


register("lora_pack", _add_arguments, _problem)
register("lora_pack_backward", _add_arguments, _problem)
