"""``lora-kernels plan``: the CUDA launch that a problem leads to, as JSON. Needs the CUDA extension, but no GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import _native
from ..architectures import ARCHITECTURES
from ..ops._cuda import MAX_RANK, MAX_SIZE
from . import _arguments as arguments
from ._console import CliError


class _Op(NamedTuple):
    """How an op's problem is given, and who plans it."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    problem: Callable[[argparse.Namespace], dict[str, Any]]
    """Keyword arguments of ``lora_kernels._cuda.plan_<op>``, besides the device's."""


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    size = arguments.integer(1, MAX_SIZE)
    parser.add_argument("--m", type=arguments.integer(0, MAX_SIZE), required=True, help="tokens: rows of x")
    parser.add_argument("--n", type=size, required=True, help="output features: rows of the weight")
    parser.add_argument("--k", type=size, required=True, help="input features: columns of the weight")
    parser.add_argument("--r", type=arguments.integer(1, MAX_RANK), required=True, help="rank of the adapter")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), required=True)
    parser.add_argument("--dropout", action="store_true", help="the branch drops out elements of x")
    parser.add_argument("--unaligned", action="store_true", help="rows of the tensors do not begin at 16 bytes")


def _lora_problem(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "m": options.m,
        "n": options.n,
        "k": options.k,
        "rank": options.r,
        "rows_aligned": not options.unaligned,
        "has_dropout": options.dropout,
    }


_OPS = {
    "lora_linear": _Op(_add_lora_arguments, _lora_problem),
    "lora_linear_backward": _Op(_add_lora_arguments, _lora_problem),
}


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "plan",
        help="the CUDA launch of an op for given sizes and GPU, as JSON",
        description="Print how an op would be launched on a GPU that need not be present: schedule and why, kernel, "
        "grid, shared memory, workspace, and the layout of the kernel's one parameter struct. Two launches are a list.",
    )
    ops = parser.add_subparsers(dest="op", required=True, metavar="OP")
    devices = ", ".join(f"{a.device}: {a.sms}" for a in ARCHITECTURES.values())
    for name, op in _OPS.items():
        of_op = ops.add_parser(name, help=f"plan {name}")
        op.add_arguments(of_op)
        of_op.add_argument("--arch", choices=tuple(ARCHITECTURES), required=True, help="architecture of the GPU")
        of_op.add_argument(
            "--sms", type=arguments.integer(1), help=f"its multiprocessors (default: those of a common one; {devices})"
        )
        of_op.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command."""
    if _native.cuda is None:
        raise CliError(f"plan asks lora_kernels._cuda, which cannot be loaded: {_native.cuda_error}")
    arch = ARCHITECTURES[options.arch]
    sms = arch.sms if options.sms is None else options.sms
    plan = getattr(_native.cuda, f"plan_{options.op}")
    try:
        launch = plan(**_OPS[options.op].problem(options), sms=sms, shared_per_block=arch.shared_per_block)
    except ValueError as problem:
        raise CliError(str(problem)) from None
    print(json.dumps(launch, indent=2))
    return 0
