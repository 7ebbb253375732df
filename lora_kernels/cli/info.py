"""``lora-kernels info``: what is installed, what was built, and what would run where."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from typing import Any

import torch

import lora_kernels as lk

from .. import _native
from ..text import first_sentence, table
from . import _machine
from ._models import DTYPES

_PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "bitsandbytes")
_SAMPLE = {"tokens": 512, "in_features": 576, "out_features": 1536, "rank": 16}


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "info",
        help="what is installed, what was built, which backend serves which op",
        description="Show the installation: package versions, what was compiled, the backends and their state, and "
        "which backend serves each op on this machine, with the reason.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command."""
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else _render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything the command reports, as plain data."""
    return installation() | {"ops": _choices()}


def installation() -> dict[str, Any]:
    """What is there, without who serves what."""
    return {
        "lora_kernels": lk.__version__,
        "python": platform.python_version(),
        "packages": {name: _machine.version(name) for name in _PACKAGES},
        "machine": machine(),
        "build": lk.build_info(),
        "backends": {name: status._asdict() for name, status in lk.backends().items()},
    }


def machine() -> dict[str, Any]:
    """The CPU, its threads, and the GPUs that torch sees, with why the extension does not run on one."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            problem = None if _native.cuda is None else _native.cuda_problem(torch.device("cuda", index))
            reason = "" if problem is None else f", {problem[0]}"
            found["gpus"].append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}{reason})")
    return found


def ask(op: str, *args: Any) -> lk.Choice:
    """``lk.why``; backend "none" where one is asked for, by the environment, that cannot serve the call."""
    try:
        return lk.why(op, *args)
    except RuntimeError as refusal:
        return lk.Choice("none", "", first_sentence(refusal))


def _choices() -> list[dict[str, str]]:
    """Dispatch's answer for each op on a sample call per device and dtype."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    m, k, n, r = _SAMPLE.values()
    found = []
    for device in devices:
        for label, dtype in DTYPES.items():

            def zeros(*shape: int) -> torch.Tensor:
                return torch.zeros(shape, dtype=dtype, device=device)  # noqa: B023  called within this iteration

            x, weight = zeros(m, k), zeros(n, k)
            calls = {
                "lora_linear": (x, weight, zeros(r, k), zeros(n, r)),
                "frozen_linear": (x, weight),
                "prompt_embedding": (torch.zeros((1, m), dtype=torch.long, device=device), weight, zeros(r, k)),
            }
            for op, args in calls.items():
                choice = ask(op, *args)
                found.append({"op": op, "device": device, "dtype": label, **choice._asdict()})
    return [{key: str(value) for key, value in row.items()} for row in found]


def _render(facts: dict[str, Any]) -> str:
    machine = facts["machine"]
    columns = ("op", "device", "dtype", "backend", "schedule", "reason")
    lines = [
        *heading(facts),
        f"{machine['platform']}; CPU capability {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; {', '.join(machine['gpus']) or 'no GPU'}",
        "",
        *built(facts),
        "",
        "A call with {tokens} tokens, {in_features} -> {out_features}, rank {rank}, would run on:".format(**_SAMPLE),
        table(
            columns,
            [tuple(row[key] for key in columns) for row in facts["ops"]],
        ),
    ]
    return "\n".join(lines)


def heading(facts: dict[str, Any]) -> list[str]:
    """The versions, as lines."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in facts["packages"].items())
    return [f"lora_kernels {facts['lora_kernels']}, Python {facts['python']} ({sys.executable})", versions]


def built(facts: dict[str, Any]) -> list[str]:
    """What was compiled, and which backends there are, as lines."""
    rows = [(name, "yes" if s["available"] else "no", _brief(s["detail"])) for name, s in facts["backends"].items()]
    return [
        "Built",
        *[f"  {key}: {value}" for key, value in facts["build"].items()],
        "",
        table(("backend", "available", "detail"), rows),
    ]


def _brief(detail: str) -> str:
    """Without the names of the ops that a backend serves, which are many."""
    return re.sub(r"serves (.+)$", lambda found: f"serves {found[1].count(',') + 1} ops", detail)
