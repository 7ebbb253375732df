"""``lora-kernels plan``: the CUDA launch that a problem leads to, as JSON. Needs the CUDA extension, but no GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import _native
from ..architectures import ARCHITECTURES
from ..support.cuda import MAX_RANK, MAX_ROW, MAX_SIZE
from . import _arguments as arguments
from ._console import CliError


class _Op(NamedTuple):
    """How an op's problem is given, and who plans it."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    problem: Callable[[argparse.Namespace], dict[str, Any]]
    """Keyword arguments of ``lora_kernels._cuda.plan_<op>``, besides the device's."""


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    size = arguments.integer(1, MAX_ROW)
    parser.add_argument("--m", type=arguments.integer(0, MAX_SIZE), required=True, help="tokens: rows of x")
    parser.add_argument("--n", type=size, required=True, help="output features: rows of the weight")
    parser.add_argument("--k", type=size, required=True, help="input features: columns of the weight")
    parser.add_argument("--r", type=arguments.integer(1, MAX_RANK), required=True, help="rank of the adapter")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "tf32"), required=True, help="tf32: fp32 tensors")
    parser.add_argument("--dropout", action="store_true", help="the branch drops out elements of x")
    parser.add_argument("--unaligned", action="store_true", help="rows of the tensors do not begin at 16 bytes")
    parser.add_argument(
        "--schedule", choices=("auto", "one launch", "cublas"), default="auto", help="(default: what is fastest there)"
    )


def _lora_problem(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "m": options.m,
        "n": options.n,
        "k": options.k,
        "rank": options.r,
        "rows_aligned": not options.unaligned,
        "has_dropout": options.dropout,
        "capability": int(options.arch.removeprefix("sm_")),
        "schedule": options.schedule,
    }


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    size, positive = arguments.integer(0, MAX_SIZE), arguments.integer(1, MAX_SIZE)
    parser.add_argument("--batch", type=size, required=True, help="samples")
    parser.add_argument("--tokens", type=size, required=True, help="tokens of a sample, without the prompt")
    parser.add_argument("--prompt-rows", type=size, required=True, help="rows of the prompt")
    parser.add_argument("--hidden", type=positive, required=True, help="columns of the embeddings")
    parser.add_argument("--tasks", type=positive, default=1, help="prompts to choose from (default: 1)")
    parser.add_argument("--vocabulary", type=size, default=0, help="rows of the table of embeddings (default: 0)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), required=True, help="of the embeddings")
    parser.add_argument("--unaligned", action="store_true", help="rows of the tensors do not begin at 16 bytes")


def _add_prompt_forward_arguments(parser: argparse.ArgumentParser) -> None:
    _add_prompt_arguments(parser)
    parser.add_argument("--left", action="store_true", help="pads are on the left, as an attention mask says")


def _add_prompt_backward_arguments(parser: argparse.ArgumentParser) -> None:
    _add_prompt_arguments(parser)
    parser.add_argument("--weight", action="store_true", help="the table of embeddings trains, too")
    parser.add_argument("--embeds", action="store_true", help="the gradient of inputs_embeds is wanted, too")


def _prompt_problem(options: argparse.Namespace) -> dict[str, Any]:
    backward = options.op == "prompt_embedding_backward"
    sizes = ("dtype", "batch", "tokens", "prompt_rows", "hidden", "tasks", "vocabulary")
    return {
        **{name: getattr(options, name) for name in sizes},
        "rows_aligned": not options.unaligned,
        "need_prompt": True,
        "need_weight": backward and options.weight,
        "need_embeds": backward and options.embeds,
        "looks_for_tokens": not backward and options.left,
    }


def _add_prefix_arguments(parser: argparse.ArgumentParser) -> None:
    size, positive = arguments.integer(0, MAX_SIZE), arguments.integer(1, MAX_SIZE)
    parser.add_argument("--tokens", type=size, required=True, help="virtual tokens of the prefix")
    parser.add_argument("--layers", type=positive, required=True, help="layers that attend to it")
    parser.add_argument("--heads", type=positive, required=True, help="heads of the keys and values")
    parser.add_argument("--head-dim", type=positive, required=True, help="elements of a head")
    parser.add_argument("--batch", type=size, default=1, help="samples whose copies are written (default: 1)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), required=True, help="of the keys and values")
    parser.add_argument("--prefix-dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: fp32)")
    parser.add_argument("--unaligned", action="store_true", help="rows of the tensors do not begin at 16 bytes")


def _prefix_problem(options: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "prefix_dtype", "tokens", "layers", "heads", "head_dim", "batch")
    return {**{name: getattr(options, name) for name in names}, "rows_aligned": not options.unaligned}


_OPS = {
    "lora_linear": _Op(_add_lora_arguments, _lora_problem),
    "lora_linear_backward": _Op(_add_lora_arguments, _lora_problem),
    "prompt_embedding": _Op(_add_prompt_forward_arguments, _prompt_problem),
    "prompt_embedding_backward": _Op(_add_prompt_backward_arguments, _prompt_problem),
    "prefix_kv": _Op(_add_prefix_arguments, _prefix_problem),
    "prefix_kv_backward": _Op(_add_prefix_arguments, _prefix_problem),
}


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "plan",
        help="the CUDA launch of an op for given sizes and GPU, as JSON",
        description="Print how an op would be launched on a GPU that need not be present: schedule and why, kernel, "
        "grid, shared memory, workspace, and the layout of the kernel's one parameter struct. Several launches are a list.",
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
