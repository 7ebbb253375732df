"""Machine code of the CUDA kernels, as cuobjdump reads it from a module: the toolkit's, or Triton's."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import setup_script

LISTINGS = Path(__file__).resolve().parents[2] / "build" / "sass"


def disassembler() -> Path | None:
    """The program, None where there is none. It calls nvdisasm, which must lie beside it."""
    triton = find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    toolkit = setup_script.load().CUDA_HOME
    folders += [toolkit / "bin"] if toolkit is not None else []
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)) + os.pathsep + os.environ["PATH"])
    return None if found is None else Path(found)


def _run(*arguments: str) -> str:
    tool = disassembler()
    assert tool is not None
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    return subprocess.run([tool, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


def architectures(module: Path) -> list[str]:
    """Those that the module has machine code for."""
    return sorted(set(re.findall(r"\.(sm_\d+\w*)\.cubin", _run("-lelf", str(module)))))


@functools.cache
def registers(module: Path) -> dict[str, int]:
    """Registers of a thread of each kernel, by its mangled name."""
    found = re.findall(r"^ Function (\w+):\n +REG:(\d+)", _run("-res-usage", str(module)), re.MULTILINE)
    return {name: int(count) for name, count in found}


def _listing(module: Path, arch: str, kernels: tuple[str, ...]) -> str:
    """What the program prints, which takes it half a minute for a hundred kernels; kept, for other processes, too."""
    digest = hashlib.sha256(module.read_bytes() + repr((arch, kernels)).encode()).hexdigest()[:16]
    LISTINGS.mkdir(parents=True, exist_ok=True)
    listing = LISTINGS / f"{digest}.txt"
    with open(listing.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not listing.exists():
            unfinished = listing.with_suffix(".tmp")
            unfinished.write_text(_run("-sass", "-arch", arch, "-fun", ",".join(kernels), str(module)))
            unfinished.replace(listing)
    return listing.read_text()


@functools.cache
def code(module: Path, arch: str, *kernels: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of each of these kernels, by its mangled name; predicates and operands included."""
    text = _listing(module, arch, kernels)
    found = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        instructions = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;", body)
        found[name.strip()] = [(int(address, 16), instruction) for address, instruction in instructions]
    assert found.keys() == set(kernels), f"not built for {arch}"
    return found


def branches(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(address, target) of every branch of a kernel."""
    found = ((address, re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for address, text in instructions)
    return [(address, int(branch[1], 16)) for address, branch in found if branch]


def loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Every loop of a kernel: the instructions from a backward branch's target to the branch."""
    backward = ((begin, end) for end, begin in branches(instructions) if begin < end)
    return [[text for address, text in instructions if begin <= address <= end] for begin, end in backward]
