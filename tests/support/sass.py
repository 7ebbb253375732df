"""Machine code of the CUDA kernels, as cuobjdump reads it from a module: the toolkit's, or Triton's."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
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


def _run(*arguments: str, folder: Path | None = None) -> str:
    tool = disassembler()
    assert tool is not None
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    done = subprocess.run([tool, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def architectures(module: Path) -> list[str]:
    """Those that the module has machine code for."""
    return sorted(set(re.findall(r"\.(sm_\d+\w*)\.cubin", _run("-lelf", str(module)))))


@functools.cache
def registers(module: Path) -> dict[str, int]:
    """Registers of a thread of each kernel, by its mangled name."""
    found = re.findall(r"^ Function (\w+):\n +REG:(\d+)", _run("-res-usage", str(module)), re.MULTILINE)
    return {name: int(count) for name, count in found}


@functools.cache
def _cubins(module: Path, arch: str) -> list[bytes]:
    """Those of the module that are for the architecture."""
    if module.suffix == ".cubin":
        return [module.read_bytes()]
    with tempfile.TemporaryDirectory() as folder:
        _run("-xelf", arch, str(module), folder=Path(folder))
        return [path.read_bytes() for path in sorted(Path(folder).glob(f"*.{arch}.cubin"))]


def _listing(cubin: bytes) -> str:
    """What the program prints, which takes it some seconds; kept, for other processes, too."""
    LISTINGS.mkdir(parents=True, exist_ok=True)
    listing = LISTINGS / f"{hashlib.sha256(cubin).hexdigest()[:16]}.txt"
    with open(listing.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not listing.exists():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                unfinished = listing.with_suffix(".tmp")
                unfinished.write_text(_run("-sass", file.name))
            unfinished.replace(listing)
    return listing.read_text()


@functools.cache
def code(module: Path, arch: str, *kernels: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of each of these kernels, by its mangled name; predicates and operands included."""
    found = {}
    for cubin in _cubins(module, arch):
        if not any(name.encode() in cubin for name in kernels):
            continue
        for part in _listing(cubin).split("Function : ")[1:]:
            name, _, body = part.partition("\n")
            if name.strip() in kernels:
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
