"""Architecture and problem to tile and schedule. Pure Python: no Triton, no GPU.

Tiles were chosen by what the compiler makes of them (no spilled registers, shared memory within the limit, room for two
programs on a multiprocessor where that is possible), not by measurement.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_RANK = 256
_BLOCK_RANK = 64
"""Ranks beyond it take several tile columns of ``inner``: its accumulators would not fit into registers."""
_GROUP_ROWS = 1024
"""Rows of p whose tickets follow each other: its tiles share them through the L2 cache."""


class Tile(NamedTuple):
    """The tile of one program, and why."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    why: str


class Target(NamedTuple):
    """An architecture."""

    shared_bytes: int
    """What one program may use."""
    schedule: str
    large: Tile
    small: Tile
    few_rows: Tile
    reduce: Tile


class FusedConfig(NamedTuple):
    """How ``out`` and ``inner`` are computed. ``reason`` is what ``lk.why`` shows."""

    schedule: str
    reason: str
    rows: int
    columns: int
    depth: int
    rank: int
    group: int
    num_warps: int
    num_stages: int


class ReduceConfig(NamedTuple):
    """How a sum over the rows is computed, in ``shares`` parts."""

    rows: int
    columns: int
    rank: int
    shares: int
    num_warps: int
    num_stages: int


# Two accumulators of 128 x 128 live at the end of a tile, the product and the low-rank branch: with four warps they
# alone are 256 registers per thread, hence eight wherever they are registers.
_SMALL = Tile(64, 64, 64, 4, 3, "48 KB, four programs per SM, for problems that leave SMs idle with the large tile")
_FEW_ROWS = Tile(16, 64, 128, 4, 3, "one mma of rows; the deep tile keeps loads of the weight in flight")
_REDUCE = Tile(64, 128, 0, 4, 3, "72 KB at rank 64; 128 columns are coalesced loads")
_FLOAT32 = Tile(64, 64, 32, 4, 2, "elements are twice as wide, and without tf32 the products take registers")
_FLOAT32_REDUCE = Tile(32, 64, 0, 4, 2, _FLOAT32.why)

TARGETS = {
    "sm_80": Target(
        163 << 10,
        "ticketed",
        large=Tile(128, 128, 32, 8, 4, "64 KB: two programs per SM hide each other's epilogue"),
        small=_SMALL,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    "sm_86": Target(
        99 << 10,
        "ticketed",
        large=Tile(128, 128, 32, 8, 3, "48 KB: two programs per SM within 100 KB"),
        small=_SMALL,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    "sm_90": Target(
        227 << 10,
        "ticketed",
        large=Tile(128, 128, 64, 8, 3, "96 KB: two programs of two warpgroups per SM; wgmma reads 64 deep"),
        small=_SMALL,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    "sm_100": Target(
        227 << 10,
        "ticketed",
        large=Tile(128, 128, 64, 4, 3, "accumulators are in tensor memory: four warps suffice; two programs per SM"),
        small=_SMALL,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    "sm_120": Target(
        99 << 10,
        "ticketed",
        large=Tile(128, 128, 32, 8, 3, "48 KB: two programs per SM within 100 KB; mma.sync, no tensor memory"),
        small=_SMALL,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    # Programs of one launch that wait for each other are not what HIP promises to run: two launches.
    "gfx942": Target(
        64 << 10,
        "split",
        large=Tile(128, 128, 32, 4, 2, "16 KB per stage of 64 KB; wavefronts are 64 wide"),
        small=Tile(64, 64, 64, 4, 2, "as the large tile, for problems that leave compute units idle"),
        few_rows=Tile(16, 64, 128, 4, 2, "as elsewhere, two stages within 64 KB"),
        reduce=Tile(64, 128, 0, 4, 2, "48 KB at rank 64"),
    ),
}


def target_of(capability: tuple[int, int] | None) -> str | None:
    """The row of ``TARGETS`` for a CUDA compute capability, None (ROCm) for AMD's; None below sm_80."""
    if capability is None:
        return "gfx942"
    if capability < (8, 0):
        return None
    # sm_87 has sm_80's shared memory, sm_103 and sm_110 have tensor memory like sm_100.
    return {8: "sm_80" if capability in ((8, 0), (8, 7)) else "sm_86", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(
        capability[0], "sm_120"
    )


def fused(target: str, sms: int, rows: int, columns: int, rank: int, itemsize: int) -> FusedConfig:
    """For ``out`` [rows, columns] and ``inner`` [rows, rank] of elements of ``itemsize`` bytes."""
    row = TARGETS[target]
    if itemsize == 4:
        tile, reason = _FLOAT32, "float32 tile"
    elif rows <= row.few_rows.rows:
        tile, reason = row.few_rows, f"at most {row.few_rows.rows} rows"
    elif rows <= row.small.rows:
        tile, reason = row.small, "few rows: half of a large tile would be idle"
    elif blocks(rows, row.large.rows) * blocks(columns, row.large.columns) < sms:
        tile, reason = row.small, "fewer large tiles than SMs"
    else:
        tile, reason = row.large, "enough large tiles for every SM"
    block_rank = min(_BLOCK_RANK, max(16, _power_of_two(rank)))
    schedule = row.schedule
    if columns <= tile.columns and rank <= block_rank:
        schedule, reason = "dual", f"{reason}; one tile column: s costs no second pass"
    return FusedConfig(
        schedule, reason, tile.rows, tile.columns, tile.depth, block_rank, max(1, _GROUP_ROWS // tile.rows),
        tile.num_warps, tile.num_stages,
    )  # fmt: skip


def reduce(target: str, sms: int, rows: int, columns: int, rank: int, itemsize: int) -> ReduceConfig:
    """For a sum over ``rows`` that has [columns, rank] elements."""
    tile = _FLOAT32_REDUCE if itemsize == 4 else TARGETS[target].reduce
    block_rank = min(_BLOCK_RANK, max(16, _power_of_two(rank)))
    tiles = blocks(columns, tile.columns) * blocks(rank, block_rank)
    # Two programs per SM; a share has at least four steps, or writing its part costs more than it saves.
    shares = max(1, min(2 * sms // tiles, rows // (4 * tile.rows)))
    return ReduceConfig(tile.rows, tile.columns, block_rank, shares, tile.num_warps, tile.num_stages)


def blocks(size: int, tile: int) -> int:
    """Tiles that cover ``size``."""
    return -(-size // tile)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
