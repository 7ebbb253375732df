"""``lora-kernels verify``: is every layer of a model with this adapter fused, right, and trained?"""

from __future__ import annotations

import argparse
from typing import Any

import lora_kernels as lk

from ..text import first_sentence
from . import _arguments as arguments
from ._console import CliError
from ._models import DTYPES, load_model, pick_device, require


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "verify",
        help="compare every fused layer of a model with the layer that it replaces",
        description="Load a model and its adapter with PEFT, patch it, and run every fused layer and its original on "
        "the same random rows, forward and backward. Exit status 1 if one differs or raises.",
    )
    arguments.add_model_and_adapter(parser)
    parser.add_argument(
        "--rows", type=arguments.integer(1), default=8, metavar="N", help="rows of x per layer (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype to load the model in; auto keeps the stored one (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="go on although files and model do not hold the same weights"
    )
    parser.add_argument("--device", default="auto", help='"cpu", "cuda", ...; auto takes a GPU if there is one')
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; see ``main`` for the exit status."""
    device = pick_device(options.device)
    peft = require("peft", "verify")
    model = load_model(
        options.model, DTYPES.get(options.dtype, options.dtype), device, allow_missing=options.allow_missing
    )
    try:
        model = peft.PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CliError(f"cannot load the adapter {options.adapter!r}: {first_sentence(error)}") from None
    print(lk.patch(model))
    print()
    found = lk.verify(model, options.rows)
    print(found)
    return 0 if found.ok else 1
