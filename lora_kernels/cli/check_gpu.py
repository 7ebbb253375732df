"""``lora-kernels check-gpu``: is everything right on this GPU, and what is it worth? One command, one file.

The GPU tests and ``compute-sanitizer`` run side by side, in processes of their own; then the GPU is left to the
benchmark. Nothing of the card's settings is changed: clocks are read.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lora_kernels as lk

from ..benchmarks import gpu
from ..benchmarks.gpu import Failure
from ..benchmarks.winners import winners_of
from ..text import one_line
from . import _arguments as arguments
from ._console import CliError
from ._machine import Machine, clocks, environment, kill_commands, this_machine
from ._models import require

TESTS, SANITIZER, BENCH = "tests", "sanitizer", "bench"
PARTS = (TESTS, SANITIZER, BENCH)
QUICK_TESTS = "leading_sizes or the_same_bits or captured_step or prefix_kv or verify"
SANITIZERS = ("memcheck", "racecheck")
MEMORY_OF_WORKER = 6 * 2**30
"""Bytes of the GPU for a process of tests, with its CUDA context."""


class Limits(NamedTuple):
    """Seconds."""

    checks: float
    """For tests and sanitizers, which run at the same time."""
    all: float
    """After which no further case is begun."""


FULL, QUICK = Limits(300, 570), Limits(75, 110)


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "check-gpu",
        help="test, sanitize and time everything on this GPU, and write one file",
        description="Run the GPU tests and compute-sanitizer (memcheck, racecheck), then time layers, decoding, "
        "prompts and a model's step beside the frozen model, stock PEFT, compiled PEFT and others, and write what was "
        "found to one JSON file. Takes up to ten minutes. Exit status 0: all right; 1: something failed; 2: no GPU.",
    )
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer tests, memcheck alone, fewer cases")
    parser.add_argument("--parts", type=arguments.names, default=list(PARTS), metavar="PART,...",
                        help=f"only these of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--only", metavar="TEXT", help="time only the cases whose name contains TEXT, and nothing else")
    parser.add_argument("--write-winners", action="store_true", help="remember which schedule was fastest for which "
                        "layer on this kind of GPU; LORA_KERNELS_WINNERS=1 makes dispatch follow it")  # fmt: skip
    parser.add_argument("--tests", type=arguments.path, metavar="DIR", help="where test_gpu_*.py are")
    parser.add_argument("--out", type=arguments.path, default="check_gpu.json", metavar="FILE",
                        help="the file to write (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command."""
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        raise CliError(f"unknown part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    return check(this_machine(), options)


Part = tuple[dict[str, Any], list[Failure]]
"""What a part found, and what of it failed."""


def check(machine: Machine, options: argparse.Namespace) -> int:
    """Everything, on ``machine``; the exit status. The file is written after each part, so that none is lost with a
    later one.
    """
    start = time.monotonic()
    limits = QUICK if options.quick else FULL
    parts = [BENCH] if options.only else options.parts
    planned: list[gpu.Planned] = []
    if BENCH in parts:
        require("peft", "check-gpu, which compares with stock PEFT,")
        planned = list(gpu.selected(gpu.plan(machine.device, options.quick and not options.only), options.only))
        if not planned:
            raise CliError(f"--only {options.only!r}: no case has that in its name")
    report: dict[str, Any] = {"environment": environment(machine), "quick": options.quick}
    failures: list[Failure] = []
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _say_heading(report["environment"])

    def add(name: str, part: Part) -> None:
        report[name], found = part
        failures.extend(found)
        write()

    def write() -> None:
        report["failures"] = [failure._asdict() for failure in failures]
        report["seconds"] = round(time.monotonic() - start, 1)
        out.write_text(json.dumps(report, indent=1) + "\n")

    write()
    jobs: dict[str, Callable[[], Part]] = {}
    if TESTS in parts:
        jobs[TESTS] = lambda: run_tests(machine, tests_folder(options.tests), options.quick, limits.checks)
    if SANITIZER in parts:
        for tool in SANITIZERS[:1] if options.quick else SANITIZERS:
            jobs[tool] = lambda tool=tool: sanitize(machine, tool, limits.checks)  # type: ignore[misc]
    if jobs:
        print(f"running {', '.join(jobs)}, for {limits.checks:.0f} s at most", flush=True)
    with ThreadPoolExecutor(max_workers=max(1, len(jobs))) as pool:
        running = {pool.submit(_or_failure, name, job): name for name, job in jobs.items()}
        try:
            for future in as_completed(running):
                name = running[future]
                add(name, future.result())
                print(f"{name}: {report[name].get('summary', '')}", flush=True)
        except KeyboardInterrupt:
            kill_commands()
            raise
    if BENCH in parts:

        def bench() -> Part:
            timed = gpu.run(
                machine.device, machine.timers, planned, lambda: time.monotonic() - start < limits.all,
                rounds=gpu.QUICK_ROUNDS if options.quick else gpu.ROUNDS, speeds=machine.speeds,
                say=lambda line: print(line, flush=True),
            )  # fmt: skip
            report["environment"]["clocks after"] = clocks(machine)
            report["winners"] = _winners(timed)
            return timed.as_json(), timed.failures

        add(BENCH, _or_failure(BENCH, bench))
        if options.write_winners and "winners" in report:
            print(f"wrote {machine.remember(machine.device, report['winners'])}")
    _say_end(report, failures, out)
    return 1 if failures else 0


def _or_failure(name: str, job: Callable[[], Part]) -> Part:
    """What a part finds; an error that nobody foresaw is a failure of that part alone."""
    try:
        return job()
    except Exception as error:
        traceback.print_exc()
        message = one_line(traceback.format_exception_only(error)[-1])
        part = SANITIZER if name in SANITIZERS else name
        return {"summary": f"broken off: {message}"}, [Failure(name, message, f"lora-kernels check-gpu --parts {part}")]


def _winners(timed: gpu.Timed) -> dict[str, str]:
    """The fastest candidates, into CUDA graphs and outside of them."""
    return {
        problem: winner
        for captured, kind in ((True, gpu.GRAPH), (False, gpu.EAGER))
        for problem, winner in winners_of(
            [result for timer, result in timed.results if timer == kind], captured=captured
        ).items()
    }


# ------------------------------------------------------------------------------------------------------- tests


def tests_folder(given: str | None) -> Path:
    """``given``, or the folder beside the package, as a checkout has it."""
    return Path(given) if given else Path(lk.__file__).resolve().parents[1] / "tests"


def run_tests(machine: Machine, folder: Path, quick: bool, limit: float) -> Part:
    """pytest over ``test_gpu_*.py`` of ``folder``."""
    files = sorted(str(path) for path in folder.glob("test_gpu_*.py") if path.stem != "test_gpu_rehearsal")
    if not files:
        return _left_out(f"no test_gpu_*.py in {folder}: an installed package has no tests, a checkout does")
    if importlib.util.find_spec("pytest") is None:
        return _left_out("pytest is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *files]
        command += ["-k", QUICK_TESTS] if quick else []
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(_workers(machine.device)), "--dist", "worksteal"]
        done = machine.run(command, _importing(folder.parent), limit)
        counts, failures = _read_junit(results, folder)
    report: dict[str, Any] = {
        "command": shlex.join(command), "status": done.status, "seconds": round(done.seconds, 1), **counts,
        "schedules": _schedules(done.output),
    }  # fmt: skip
    whole = f"python -m pytest {shlex.join(files)}"
    if done.status is None:
        failures.append(Failure("tests", f"not finished within {limit:.0f} s", whole))
    elif done.status != 0 and not failures:
        failures.append(Failure("tests", f"pytest ended with status {done.status}: {_end(done.output)}", whole))
    report["summary"] = ", ".join(f"{count} {name}" for name, count in counts.items()) + f" in {done.seconds:.0f} s"
    return report, failures


def _workers(device: torch.device) -> int:
    """pytest's processes: as many as cores and the GPU's free memory allow."""
    most = min(10, (os.cpu_count() or 2) - 2)
    if device.type == "cuda":
        most = min(most, torch.cuda.mem_get_info(device)[0] // MEMORY_OF_WORKER)
    return max(1, most)


def _importing(root: Path) -> dict[str, str]:
    """PYTHONPATH with ``root`` first, so that a checkout that is not installed is found."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}


def _read_junit(path: Path, folder: Path) -> tuple[dict[str, int], list[Failure]]:
    """Counts by outcome, and the failures."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    with contextlib.suppress(FileNotFoundError, ElementTree.ParseError):
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error")), None)
            if problem is not None:
                file = folder / f"{case.get('classname', '').rpartition('.')[2]}.py"
                name = f"{file}::{case.get('name')}"
                message = one_line(problem.get("message") or problem.text or "")[:500]
                failures.append(Failure(name, message, f"python -m pytest {shlex.quote(name)}"))
            outcome = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
            counts[outcome] += 1
    return counts, failures


def _schedules(output: str) -> dict[str, int]:
    """What the suite's own summary counts: tests by the schedule that served them."""
    lines = re.findall(r"^ *(\d+) (lora\w+: .+)$", output, flags=re.MULTILINE)
    return {schedule: int(count) for count, schedule in lines}


# --------------------------------------------------------------------------------------------------- sanitizer


def sanitize(machine: Machine, tool: str, limit: float) -> Part:
    """``compute-sanitizer --tool <tool>`` over every kernel at small sizes."""
    sanitizer = machine.find("compute-sanitizer") or machine.find("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return _left_out("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    launches = [sys.executable, "-m", "lora_kernels.verification.launches"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", *launches]
    # torch's allocator would hide a row beyond the end of a tensor inside its own larger block.
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    done = machine.run(command, _importing(Path(lk.__file__).resolve().parents[1]) | caching, limit)
    lines = [line.lstrip("= ") for line in done.output.splitlines()]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), _end(done.output))
    if done.status != 0 and "Device not supported" in done.output:
        return _left_out("compute-sanitizer does not support this device")
    report = {
        "command": shlex.join(command), "status": done.status, "seconds": round(done.seconds, 1), "summary": summary,
        "calls": sum(line.startswith("ok") for line in lines),
        "refused": [line for line in lines if line.startswith("-  ")],
    }  # fmt: skip
    repro = shlex.join([f"{key}={value}" for key, value in caching.items()] + command)
    if done.status is None:
        return report, [Failure(tool, f"not finished within {limit:.0f} s", repro)]
    return report, [] if done.status == 0 else [Failure(tool, summary, repro)]


def _left_out(reason: str) -> Part:
    return {"summary": f"left out: {reason}"}, []


def _end(output: str) -> str:
    return one_line(output[-500:])


# ------------------------------------------------------------------------------------------------------ output


def _say_heading(facts: dict[str, Any]) -> None:
    driver = facts["clocks before"].get("driver_version", "unknown")
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    print(f"{facts['device']}, driver {driver}, {packages}", flush=True)
    for name, status in facts["backends"].items():
        print(f"  {name}: {'' if status['available'] else 'NOT AVAILABLE: '}{status['detail']}", flush=True)


def _say_end(report: dict[str, Any], failures: Sequence[Failure], out: Path) -> None:
    bench = report.get(BENCH, {})
    for line in bench.get("slower", ()):
        print(f"slower than PEFT: {line}")
    if bench.get("left_out"):
        print(f"no time was left for {len(bench['left_out'])} cases")
    for failure in failures:
        print(f"FAILED {failure.what}: {failure.message}\n  {failure.repro}")
    print(f"{len(failures)} failed; {report['seconds']} s; wrote {out}")
