"""A MODEL, not a measurement: traffic and tensor-core work of the CUDA forward, from csrc/config's tile and schedule.

Bytes are those that blocks ask of the L2 cache: a tile of y reads its rows of x and its columns of w over all of k.
What hits in L2 is not told apart from what does not. Beside it: the compulsory bytes (each operand once), the same base
product followed by PEFT's unfused operations, and a split pair of kernels (s first, then the base with s·Bᵀ in its
epilogue), whose tiles are assumed to be the same.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

ELEMENT = 2
"""Bytes of bf16."""
PROBLEMS = (
    (8192, 4096, 4096, 16),
    (2048, 4096, 4096, 64),
    (512, 1536, 576, 16),
    (512, 64, 4096, 16),
    (1, 4096, 4096, 16),
)
"""m, n, k, rank."""


class Row(NamedTuple):
    """Modelled bytes and FLOPs of one forward."""

    problem: tuple[int, int, int, int]
    schedule: str
    tile: tuple[int, int]
    compulsory: int
    fused: int
    split: int
    peft: int
    flops: int
    """mma work of the schedule, as launched: 2mk(n + r) + 2mnr where no tile repeats s."""
    least_flops: int


_TILE = re.compile(r"4GemmI.*?Li(\d+)ELi(\d+)E")
"""Rows and columns of y: the first numbers among the template arguments of ``Gemm`` (csrc/kernels/gemm.cuh)."""


def _up(size: int, tile: int) -> int:
    return -(-size // tile)


def model(problem: tuple[int, int, int, int], launch: dict[str, Any]) -> Row:
    """The row of one problem, whose planned ``launch`` is given (``lora-kernels plan``)."""
    m, n, k, r = problem
    tile: Any = _TILE.search(launch["kernel"])
    rows, columns = (int(size) for size in tile.groups())
    schedule = launch["schedule"]
    y_tiles = _up(m, rows) * _up(n, columns)
    base_reads = y_tiles * (min(m, rows) + min(n, columns)) * k
    reads_of_s = m * r * _up(n, columns)
    b_reads = n * r * _up(m, rows)
    shrink_alone = m * k * _up(r, 64) + r * k * _up(m, rows)  # x and A once per block of rows and 64 ranks
    if schedule == "ticketed":
        branch = shrink_alone + m * r + reads_of_s + b_reads
    elif schedule == "column-0":  # x is there already
        branch = r * k * _up(m, rows) + m * r + reads_of_s + b_reads
    else:  # dual, decode: every tile (and split) has its own s
        branch = r * k * y_tiles + b_reads + m * r
    repeated = _up(n, columns) if schedule in ("dual", "decode") else 1
    stored = m * n
    return Row(
        problem, schedule, (rows, columns),
        compulsory=ELEMENT * (m * k + n * k + r * (k + n) + m * n + m * r),
        fused=ELEMENT * (base_reads + branch + stored),
        split=ELEMENT * (base_reads + shrink_alone + m * r + reads_of_s + b_reads + stored),
        # lora_B writes its result, scaling reads and writes it, the sum reads both and writes.
        peft=ELEMENT * (base_reads + stored + shrink_alone + m * r + m * r + n * r + stored + 2 * stored + 3 * stored),
        flops=2 * m * k * (n + r * repeated) + 2 * m * n * r,
        least_flops=2 * m * k * (n + r) + 2 * m * n * r,
    )  # fmt: skip
