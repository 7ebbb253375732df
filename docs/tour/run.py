"""The five steps of the tour: runs each on the host emulator, races checked, and prints a table of what each one costs.

    python docs/tour/run.py             all five
    python docs/tour/run.py --step 3    one
    python docs/tour/run.py --page      the tables of README.md

From a checkout, with numpy, pybind11 and g++; no torch and no GPU. Rows on machine code need nvcc and cuobjdump.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pybind11
from numpy.typing import NDArray

TOUR = Path(__file__).resolve().parent
ROOT = TOUR.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import emulator_objects  # noqa: E402
import sass  # noqa: E402
import setup_script  # noqa: E402


class Step(NamedTuple):
    """What the emulator does not know of a step: its name, its machine code, and the tile of y that a block computes.

    ``products``: instructions for 64 of a tile's depth, of a warp that multiplies, by which its loop is found.
    """

    name: str
    arch: str
    kernel: str
    tile: tuple[int, int]
    multiplying_warps: int
    product: str
    products: int
    copy: str
    copies_by_engine: bool = False


STEPS = {
    1: Step("naive", "sm_80", "step1_y", (1, 128), 4, "FFMA", 64, "LDG"),
    2: Step("tiled", "sm_80", "step2_y", (128, 128), 4, "HMMA", 128, "LDGSTS"),
    3: Step("ticketed", "sm_80", "step3", (128, 128), 4, "HMMA", 128, "LDGSTS"),
    4: Step("TMA ring", "sm_90a", "step4", (128, 128), 4, "HMMA", 128, "UTMALDG", True),
    5: Step("warp-specialised", "sm_90a", "step5", (128, 256), 8, "HGMMA.64x256x16", 4, "UTMALDG", True),
}
HEADERS = {"sm_80": ("step1_naive.cuh", "step3_ticketed.cuh"), "sm_90a": ("step5_warp_specialised.cuh",)}
SCALING = 0.5


class Case(NamedTuple):
    """y is [m, n], the depth k."""

    m: int
    n: int
    k: int
    rank: int


RAGGED = Case(200, 328, 264, 72)  # no tile is whole; more stages than any ring has, and two of the branch
WHOLE = Case(256, 256, 128, 16)  # whose bytes are counted
SCHEDULES = tuple(
    dict(seed=i, resident_blocks=1 + i, stall_release=i % 2 == 1, persistent_blocks=1 + i % 3) for i in range(4)
)

# ---------------------------------------------------------------------------------------------------- the emulator


made = functools.partial(emulator_objects.made, folders=(emulator_objects.CSRC, TOUR))


@functools.cache
def emulator() -> ModuleType:
    """The steps, compiled for the host; once for the sources as they are."""
    includes = (f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"]))
    flags = (f"-I{emulator_objects.CSRC}", *includes)
    steps = made("_tour.o", "-c", *flags, str(TOUR / "on_emulator.cpp"))
    objects = map(str, (*emulator_objects.machine(), steps))
    return emulator_objects.imported(made("_tour.so", "-shared", *objects))


def rounded(values: NDArray[Any]) -> NDArray[np.uint16]:
    """To bf16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def exactly(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Of bf16."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def operands(case: Case) -> dict[str, NDArray[np.uint16]]:
    """Random ones, other ones each time."""
    m, n, k, rank = case
    shapes = dict(x=(m, k), w=(n, k), a=(rank, k), b=(n, rank), bias=(n,))
    normal = np.random.default_rng().standard_normal
    return {name: rounded(normal(shape)) for name, shape in shapes.items()}


def run(
    step: int, given: dict[str, NDArray[np.uint16]], *, persistent_blocks: int = 2, **options: Any
) -> tuple[NDArray[np.uint16], list[Any]]:
    """(y, a report for each launch); what is not written is NaN.

    Raises:
        RuntimeError: a race, a deadlock, an access out of bounds.
    """
    m, n, rank = len(given["x"]), len(given["w"]), len(given["a"])
    y, s = (np.full(shape, 0xFFFF, np.uint16) for shape in ((m, n), (m, rank)))
    counters = np.zeros(1 + -(-m // 128), np.uint32)
    arrays = {**given, "y": y, "s": s, "counters": counters}
    return y, emulator().run(step, arrays, SCALING, persistent_blocks, options)


def references(given: dict[str, NDArray[np.uint16]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(y in float64, y as separate bf16 operations make it)."""
    x, w, a, b, bias = (exactly(given[name]) for name in ("x", "w", "a", "b", "bias"))
    y = x @ w.T + bias + SCALING * (x @ a.T) @ b.T
    s = exactly(rounded(x @ a.T))
    branch = exactly(rounded(SCALING * exactly(rounded(s @ b.T))))
    return y, exactly(rounded(exactly(rounded(x @ w.T + bias)) + branch))


def error(step: int, case: Case = RAGGED, **options: Any) -> float:
    """The largest error of y, in units of the largest of separate bf16 operations; NaN, if an element is none."""
    given = operands(case)
    exact, unfused = references(given)
    y, _ = run(step, given, **options)
    return float(np.abs(exactly(y) - exact).max() / np.abs(unfused - exact).max())


# ---------------------------------------------------------------------------------------------------- machine code


@functools.cache
def compiler() -> str:
    """The version of nvcc, or why there is no machine code to count in."""
    home = setup_script.load().CUDA_HOME
    if home is None:
        return setup_script.load().CUDA_REASON
    if sass.disassembler() is None:
        return "cuobjdump not found"
    told = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.findall(r"\bV([\d.]+)", told)[0]


def has_machine_code() -> bool:
    return compiler().startswith("nvcc ")


def cubin(arch: str) -> Path:
    """The steps for one architecture, compiled once for the sources as they are."""
    *others, last = HEADERS[arch]
    flags = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={arch}", f"-I{emulator_objects.CSRC}", "-cubin")
    sources = (*(f"-include={TOUR / other}" for other in others), "-x=cu", str(TOUR / last))
    return made(
        f"tour_{arch}.cubin",
        *flags,
        *sources,
        settings=(compiler(),),
        compiler=(str(setup_script.load().CUDA_HOME / "bin" / "nvcc"),),
    )


class Code(NamedTuple):
    """Instructions are per 64 of the depth: of a warp that multiplies, and of the thread that tells the engine to copy.

    Registers of a thread at launch, and what warps make of them; loads and stores of spilled ones.
    """

    instructions: int
    fragment_loads: int
    copies: int
    of_loader: int
    registers: str
    spills: int


def code(step: int) -> Code:
    """Of the loop over the depth of x wᵀ, as the compiler made it."""
    of, module = STEPS[step], cubin(STEPS[step].arch)
    registers = {name: count for name, count in sass.registers(module).items() if "4tour" in name}
    (kernel,) = (name for name in registers if of.kernel in name)
    instructions = sass.code(module, of.arch, *sorted(registers))[kernel]
    texts = [text for _, text in instructions]

    def part(span: tuple[int, int]) -> list[str]:
        return [text for address, text in instructions if span[0] <= address <= span[1]]

    def length(span: tuple[int, int]) -> int:
        return len(part(span))

    def count(name: str, span: tuple[int, int]) -> int:
        return sum(name in text for text in part(span))

    branches = sass.branches(instructions)
    loops = [(begin, end) for end, begin in branches if begin < end]
    # s has narrower products, the rest of a depth is unrolled less, and loops around it are longer.
    most = max(found for loop in loops if (found := count(of.product, loop)) and of.products % found == 0)
    loop = min((loop for loop in loops if count(of.product, loop) == most), key=length)
    times, of_loader, of_others = of.products // most, 0, length(loop)
    if of.copies_by_engine:
        # The others skip it within the loop, or it is a loop of its own.
        skipped = [(begin + 1, end - 1) for begin, end in branches if begin < end]
        loads = [span for span in skipped + loops if count(of.copy, span) == 2 and not count(of.product, span)]
        within = [(begin, end) for begin, end in loads if loop[0] <= begin and end <= loop[1]]
        of_loader = length(min(within or loads, key=length))
        of_others -= of_loader if within else 0
    claimed = sorted(int(text.split()[-1], 16) for text in texts if "USETMAXREG" in text)
    return Code(
        instructions=times * of_others,
        fragment_loads=times * count("LDSM", loop),
        copies=0 if of.copies_by_engine else times * count(of.copy, loop),
        of_loader=of_loader,
        registers=f"{registers[kernel]}" + (f" ({', '.join(map(str, claimed))})" if claimed else ""),
        spills=sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in texts),
    )


# ---------------------------------------------------------------------------------------------------- tables


def rows(step: int) -> dict[str, str]:
    """What the table says of a step."""
    of, (m, n) = STEPS[step], STEPS[step].tile
    _, reports = run(step, operands(WHOLE))
    found = {"launches": f"{len(reports)}", "tile of y, threads": f"{m} x {n}, {emulator().THREADS[step - 1]}"}
    if has_machine_code():
        machine = code(step)
        of_all = (machine.instructions * of.multiplying_warps + machine.of_loader) * 128 * 128 / (m * n)
        found |= {
            "instructions of a warp": f"{machine.instructions}",
            "- products": f"{of.products} {of.product.partition('.')[0]}",
            "- loads of fragments": f"{machine.fragment_loads} LDSM" if machine.fragment_loads else "0",
            "- copies": f"{machine.copies} {of.copy}" if machine.copies else "0",
            "of a thread that loads": f"{machine.of_loader}: 2 {of.copy}" if machine.of_loader else "none",
            "of all warps, 128 x 128": f"{of_all:,.0f}",
            "registers": machine.registers,
            "spills": f"{machine.spills}",
        }
    return found | {
        "shared memory, KB": f"{emulator().SHARED_BYTES[step - 1] / 1024:.1f}",
        "global memory read, KB": f"{sum(r.bytes_read + r.bytes_loaded for r in reports) / 1024:,.1f}",
    }


def every_operand_once() -> str:
    return f"{sum(array.nbytes for array in operands(WHOLE).values()) / 1024:.1f} KB"


def table(columns: dict[str, dict[str, str]], *, changes_only: bool = False) -> str:
    """Markdown, aligned; by the columns' heads, what their rows say."""
    labels = list(next(iter(columns.values())))
    if changes_only:
        labels = [label for label in labels if len({column[label] for column in columns.values()}) > 1]
    cells = [["", *columns], *([label, *(column[label] for column in columns.values())] for label in labels)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def head(step: int) -> str:
    return f"{step} {STEPS[step].name}"


def page_tables() -> list[str]:
    """The tables of README.md: the whole one, and for each step from the second on what changed."""
    of_steps = {head(step): rows(step) for step in STEPS}
    changes = ({head(i): of_steps[head(i)] for i in (step - 1, step)} for step in list(STEPS)[1:])
    return [table(of_steps), *(table(change, changes_only=True) for change in changes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--step", type=int, choices=STEPS, help="this one alone")
    parser.add_argument("--page", action="store_true", help="print the tables of README.md, and check nothing")
    arguments = parser.parse_args()
    if arguments.page:
        print(*page_tables(), sep="\n\n")
        return
    steps = list(STEPS) if arguments.step is None else [arguments.step]
    print("bf16 on the host emulator; errors as parts of what separate operations in bf16 make:")
    for step in steps:
        try:
            errors = [error(step, **schedule) for schedule in SCHEDULES]
        except RuntimeError as race:
            raise SystemExit(f"{head(step)}: {race}") from None
        if not max(errors) <= 2.0:
            raise SystemExit(f"{head(step)}: wrong, {max(errors)} times the error of separate bf16 operations")
        print(f"  {head(step):18} {len(errors)} schedules, 0 races, error {max(errors):.2f}")
    m, n, k, rank = WHOLE
    per = 'those of the loop, per 64 of the depth; "of all warps" for 128 x 128 elements of y'
    print(f"\nInstructions ({compiler()}) are {per}." if has_machine_code() else f"\nNo instructions: {compiler()}.")
    print(f"Global memory is read for y [{m}, {n}], depth {k}, rank {rank}; every operand once would be", end=" ")
    print(f"{every_operand_once()}.\n\n{table({head(step): rows(step) for step in steps})}")


if __name__ == "__main__":
    main()
