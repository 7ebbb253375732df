"""The ``lora-kernels`` command: doctor, info, finetune, merge, verify, bench, plan, check-gpu."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from .._version import __version__
from ..text import first_sentence
from . import bench, check_gpu, doctor, finetune, info, merge, plan, verify
from ._console import CliError, error

_COMMANDS = (doctor, info, finetune, merge, verify, bench, plan, check_gpu)


class _Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = _Parser(
        prog="lora-kernels",
        description="Fused kernels for LoRA and prompt tuning: inspect the installation, train, merge, measure.",
    )
    parser.add_argument("--version", action="version", version=f"lora-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done. 1: failed while running. 2: the request cannot be carried out as given. 130: interrupted.
    141: nobody reads the output any more, as behind ``| head``.
    """
    try:
        options = build_parser().parse_args(argv)
        status = options.run(options)
        sys.stdout.flush()
        return status
    except CliError as problem:
        error(str(problem))
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _forget_output()
        return 141
    except OSError as problem:
        error(first_sentence(problem))
        try:
            sys.stdout.flush()
        except OSError:  # the output's own disk is full
            _forget_output()
        return 1
    except (MemoryError, RuntimeError) as problem:
        if not _is_out_of_memory(problem):
            raise
        error(f"out of memory: {first_sentence(problem)}")
        return 1


def _forget_output() -> None:
    """What is left of the output goes nowhere: Python flushes it once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(problem: MemoryError | RuntimeError) -> bool:
    # torch's allocator for CPUs has no exception of its own.
    return isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(problem)
