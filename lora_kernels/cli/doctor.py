"""``lora-kernels doctor``: one page on an installation, and whether anything in it is wrong."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lora_kernels as lk

from .. import _native
from ..formats import zero_points
from ..functional.why import examples
from ..text import one_line, table
from . import _machine, info
from ._conflicts import CONFLICTS, OLDEST, Installation
from ._models import DTYPES

_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "asimd", "sve", "bf16")
"""Of a CPU, those that decide which kernels run or which library is asked."""
_SWITCHES = re.compile(
    r"(LORA_KERNELS|TRITON|ONEDNN|DNNL)_\w+|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|ATEN_CPU_CAPABILITY"
)
_OK = "Nothing is wrong."
_NOT_BUILT = "Nothing is wrong, but the C++ extension was not built: on the CPU plain torch serves every op."
_PROOFS = (
    ("lora-kernels verify --model DIR --adapter DIR", "every fused layer of a model beside its original"),
    ("lora-kernels check-gpu", "on a GPU: its tests, compute-sanitizer, a benchmark"),
)


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "doctor",
        help="one page on this installation: what serves what here, and what is known to go wrong",
        description="Show what was built, what this machine has, which backend serves each op and format here and why "
        "no other does, and versions that are known to conflict. Exit status 1 if something that was built cannot "
        "serve, or if a known conflict concerns every use.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; see ``main`` for the exit status."""
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else _render(facts))
    return 1 if facts["wrong"] else 0


def collect() -> dict[str, Any]:
    """Everything the command reports, as plain data; ``wrong`` has a line for each thing that is."""
    facts = info.installation()
    facts["packages"] |= {name: _machine.version(name) for name in (*OLDEST, "numpy")}
    flags = cpu_flags()
    facts["machine"] |= {
        "flags": [flag for flag in _FLAGS if flag in flags],
        "kernels": getattr(_native.cpu, "isa", None),
        "driver": _machine.clocks(_machine.Machine(torch.device("cpu"))).get("driver_version"),
        "toolkit of torch": torch.version.cuda,
        "nvcc": shutil.which("nvcc"),
    }
    here = Installation(facts["packages"], flags, torch.cuda.is_available())
    facts |= {
        "switches": {name: value for name, value in sorted(os.environ.items()) if _SWITCHES.fullmatch(name)},
        "ops": served_ops(),
        "formats": served_formats(),
        "conflicts": conflicts(here),
    }
    wrong = cannot_serve(facts["build"], facts["backends"], facts["machine"])
    return facts | {"wrong": [*wrong, *served_by_nobody(facts["ops"]), *broken_by(here)]}


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the CPU can do, as Linux names it; nothing where it does not say."""
    if not cpuinfo.is_file():
        return frozenset()
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    return frozenset(lines[0].split()) if lines else frozenset()


# -------------------------------------------------------------------------------------------------- who serves


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _zeros(device: str, dtype: torch.dtype) -> Any:
    return lambda *shape, dtype=dtype: torch.zeros(shape, device=device, dtype=dtype)


def served_ops() -> list[dict[str, str]]:
    """Dispatch's answer for each public function on its example, dtypes with the same answer together."""
    found: dict[tuple[str, str, lk.Choice], list[str]] = {}
    for device in _devices():
        for name, example in examples().items():
            for label, dtype in DTYPES.items():
                choice = info.ask(name, *example(_zeros(device, dtype)))
                found.setdefault((name, device, choice), []).append(label)
    return [
        {"op": op, "device": device, "dtypes": " ".join(labels), **_in_words(choice)}
        for (op, device, choice), labels in found.items()
    ]


def _in_words(choice: lk.Choice) -> dict[str, str]:
    return {field: one_line(value) for field, value in choice._asdict().items()}


def served_formats() -> list[dict[str, str]]:
    """The same of ``lora_linear`` over a weight in each format, those that are only read included."""
    found = []
    for device in _devices():
        zeros = _zeros(device, torch.float32 if device == "cpu" else torch.bfloat16)
        weights = {name: fmt.quantize(zeros(256, 256)) for name, fmt in lk.FORMATS.items()}
        for name, weight in (weights | zero_points.blanks(256, 256, zeros(1, 256))).items():
            choice = info.ask("lora_linear", zeros(512, 256), weight, zeros(16, 256), zeros(256, 16))
            found.append({"format": name, "device": device, **_in_words(choice)})
    return found


# ------------------------------------------------------------------------------------------------ what is wrong


def cannot_serve(
    build: Mapping[str, str], backends: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any]
) -> list[str]:
    """What was built and cannot be used here. CUDA kernels on a machine without a GPU can: there is nothing to do."""
    found = []
    for kind, name in (("C++", "cpu"), ("CUDA", "cuda")):
        was_built, status = build.get(kind, "").startswith("built"), backends[name]
        has_work = name == "cpu" or machine["gpus"] or machine["driver"] or "failed to load" in status["detail"]
        if was_built and has_work and not status["available"]:
            found.append(f"{kind} was {build[kind]}, but does not serve: {status['detail']}")
    return found


def served_by_nobody(ops: Sequence[Mapping[str, str]]) -> list[str]:
    """Calls that raise, because the environment asks for a backend that cannot serve them."""
    refused = sorted({row["op"] for row in ops if row["backend"] == "none"})
    return [f"LORA_KERNELS_BACKEND asks for what cannot serve {', '.join(refused)}: they raise"] if refused else []


def conflicts(here: Installation) -> list[dict[str, str]]:
    """The table of what is known to go wrong, with what applies here."""
    return [
        {
            "applies here": "yes" if conflict.applies(here) else "no",
            "what": conflict.what,
            "concerns": conflict.concerns or "every use",
            "remedy": conflict.remedy,
            "proof": conflict.proof,
        }
        for conflict in CONFLICTS
    ]


def broken_by(here: Installation) -> list[str]:
    """Conflicts that apply here and concern every use."""
    return [f"{c.what}; {c.remedy}" for c in CONFLICTS if c.applies(here) and not c.concerns]


# ---------------------------------------------------------------------------------------------------- the page


def _render(facts: dict[str, Any]) -> str:
    return "\n".join(
        [
            *info.heading(facts),
            "",
            *_machine_lines(facts["machine"], facts["switches"]),
            "",
            *info.built(facts),
            "",
            "A call of some hundred rows is served by (`lk.why` says it of yours)",
            _rows(facts["ops"]),
            "",
            "lora_linear over a quantised weight",
            _rows(facts["formats"]),
            "",
            "Known to go wrong",
            *_conflict_lines(facts["conflicts"]),
            "",
            "To see for yourself",
            *[f"  {command}: {what}" for command, what in _PROOFS],
            "",
            *_verdict(facts),
        ]
    )


def _machine_lines(machine: Mapping[str, Any], switches: Mapping[str, str]) -> list[str]:
    return [
        "Machine",
        f"  {machine['platform']}",
        f"  CPU: {' '.join(machine['flags']) or 'flags unknown'}; torch uses {machine['cpu']}, our kernels "
        f"{machine['kernels'] or 'are not built'}; {machine['cores']} cores, {machine['threads']} threads",
        f"  GPU: {', '.join(machine['gpus']) or 'none'}; driver {machine['driver'] or 'none'}; torch built with CUDA "
        f"{machine['toolkit of torch'] or 'none'}; nvcc {machine['nvcc'] or 'none'}",
        *[f"  {name}={value}" for name, value in switches.items()],
    ]


def _rows(rows: Sequence[Mapping[str, str]]) -> str:
    columns = tuple(rows[0])
    return table(columns, [tuple(row[column] for column in columns) for row in rows])


def _conflict_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(f"  applies here: {row['applies here']:3}  {row['what']}")
        if row["applies here"] == "yes":
            lines += [f"{name:>15}: {row[name]}" for name in ("concerns", "remedy", "proof")]
    return lines


def _verdict(facts: Mapping[str, Any]) -> list[str]:
    if facts["wrong"]:
        return [f"WRONG: {line}" for line in facts["wrong"]]
    return [_OK if facts["backends"]["cpu"]["available"] else _NOT_BUILT]
