"""``lora-kernels plan``: the CUDA launch that a problem leads to, as JSON. Needs the CUDA extension, but no GPU.

The files beside this one, one per op, say how a problem is given, and register themselves (``_planned_ops.py``).
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ... import _native
from .. import _arguments as arguments
from .._console import CliError
from ._planned_ops import PLANNED_OPS
from .architectures import ARCHITECTURES

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "plan",
        help="the CUDA launch of an op for given sizes and GPU, as JSON",
        description="Print how an op would be launched on a GPU that need not be present: schedule and why, kernel, "
        "grid, shared memory, workspace, and the layout of the kernel's one parameter struct. A list of several.",
    )
    ops = parser.add_subparsers(dest="op", required=True, metavar="OP")
    devices = ", ".join(f"{a.device}: {a.sms}" for a in ARCHITECTURES.values())
    for name, op in PLANNED_OPS.items():
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
        launch = plan(**PLANNED_OPS[options.op].problem(options), sms=sms, shared_per_block=arch.shared_per_block)
    except ValueError as problem:
        raise CliError(str(problem)) from None
    print(json.dumps(launch, indent=2))
    return 0
