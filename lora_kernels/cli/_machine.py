"""What ``check-gpu`` runs on: the GPU, commands in processes of their own, and what the results depend on."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lora_kernels as lk

from ..benchmarks import gpu
from ..benchmarks.measure import Timer
from ..support import winners
from ._console import CliError


class Finished(NamedTuple):
    """A command that has ended; the status is None where it ran out of time."""

    status: int | None
    output: str
    seconds: float


def run_command(command: Sequence[str], environment: Mapping[str, str], limit: float) -> Finished:
    """Runs it with these variables added, for at most so many seconds, after which it and all that it began are killed:
    a pytest worker that lives on, or the Python under ``compute-sanitizer``, would disturb what is timed next.
    """
    start = time.monotonic()
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", stdin=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        _running.add(process.pid)
        try:
            output, _ = process.communicate(timeout=limit)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            _kill_group(process.pid)
            output, status = process.communicate()[0], None
        finally:
            _running.discard(process.pid)
    return Finished(status, output, time.monotonic() - start)


_running: set[int] = set()
"""Leaders of the process groups of commands; a terminal's Ctrl-C does not reach those."""


def kill_commands() -> None:
    """Ends every command of ``run_command`` that has not ended, with what it began."""
    for leader in tuple(_running):
        _kill_group(leader)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@dataclass(frozen=True)
class Machine:
    """What the command asks of where it runs; a dry run gives it another."""

    device: torch.device
    run: Callable[[Sequence[str], Mapping[str, str], float], Finished] = run_command
    find: Callable[[str], str | None] = shutil.which
    timers: Mapping[str, Callable[[torch.device], Timer]] = field(default_factory=lambda: gpu.TIMERS)
    speeds: Callable[[torch.device, Timer], gpu.Speeds] = gpu.measure_speeds
    remember: Callable[[torch.device, Mapping[str, str]], Path] = winners.remember


def this_machine() -> Machine:
    """The current GPU of this process.

    Raises:
        CliError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise CliError(f"check-gpu needs a GPU: torch {torch.__version__} sees no CUDA device")
    return Machine(torch.device("cuda", torch.cuda.current_device()))


def environment(machine: Machine) -> dict[str, Any]:
    """What the results depend on."""
    packages = ("torch", "triton", "peft", "transformers", "unsloth", "lorafusion")
    facts: dict[str, Any] = {
        "lora_kernels": lk.__version__, "python": platform.python_version(), "platform": platform.platform(),
        "packages": {name: version(name) for name in packages}, "toolkit of torch": torch.version.cuda,
        "build": lk.build_info(), "backends": {name: status._asdict() for name, status in lk.backends().items()},
        "device": str(machine.device), "clocks before": clocks(machine),
    }  # fmt: skip
    if machine.device.type == "cuda":
        found: Any = torch.cuda.get_device_properties(machine.device)
        facts |= {
            "device": found.name, "capability": f"sm_{found.major}{found.minor}", "sms": found.multi_processor_count,
            "memory GiB": round(found.total_memory / 2**30, 1), "L2 MiB": found.L2_cache_size / 2**20,
        }  # fmt: skip
    return facts


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_CLOCKS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "temperature.gpu",
    "utilization.gpu",
)


def clocks(machine: Machine) -> dict[str, str]:
    """The driver's version and what the card does now, as nvidia-smi reads it; empty where that is not there."""
    tool = machine.find("nvidia-smi")
    if tool is None:
        return {}
    card = []
    if machine.device.type == "cuda":
        # nvidia-smi numbers the cards of the machine, torch those that CUDA_VISIBLE_DEVICES leaves, in another order.
        card = [f"--id=GPU-{torch.cuda.get_device_properties(machine.device).uuid}"]
    done = machine.run([tool, f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader", *card], {}, 20.0)
    values = done.output.strip().splitlines()
    return dict(zip(_CLOCKS, values[0].split(", "))) if done.status == 0 and values else {}
