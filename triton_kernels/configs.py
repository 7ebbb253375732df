"""Architecture and problem to tile and schedule. Pure Python: no Triton, no GPU.

Tiles were chosen by what the compiler makes of them (no spilled registers, shared memory within the limit, two programs
on a multiprocessor where both fit), not by measurement. The compiler holds ``num_stages`` tiles of both operands in
shared memory for wgmma and tcgen05, and one less for mma.sync, and for tf32, which is rounded in registers.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_RANK = 256
MAX_GROUPS = 4096
"""A program looks for its group among all, which are in its registers."""
ELEMENTWISE_BLOCK = 1024
"""Elements of one program that treats each by itself: 16 bytes per load and thread for 16-bit elements."""
FEW_ROWS = 64
"""Rows that each read their own adapter, in programs of their own: of more, those that share one read it together."""
MAX_MEMBERS = 4
"""A kernel has the code of each member's tiles."""
_BLOCK_RANK = 64
"""Ranks beyond it take several tile columns of ``inner``: its accumulators would not fit into registers."""
_DUAL_RANK = 32
"""Ranks beyond it make the accumulators of schedule "dual" too many registers."""
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the reason."""
        return self[:5]


class Target(NamedTuple):
    """An architecture."""

    shared_bytes: int
    """What one program may use."""
    schedule: str
    large: Tile
    medium: Tile
    """For fewer tiles, and where the low-rank branch needs an accumulator of its own until it is masked."""
    small: Tile
    few_rows: Tile
    reduce: Tile
    """Of [columns, rank], ``rows`` deep."""
    descriptors: bool = False
    """The base product's tiles, where they are ``large`` or ``medium`` and aligned, are fetched by TMA."""


class FusedConfig(NamedTuple):
    """How ``out`` and ``inner`` are computed."""

    tile: Tile
    block_rank: int
    """Columns of a tile of ``inner``."""
    branch_depth: int
    """Ranks that ``out`` takes from ``inner`` at a time."""
    group: int
    """Row blocks whose tickets follow each other."""
    descriptors: bool
    """Tiles of p and q are fetched through descriptors, not by an address per thread."""


class ReduceConfig(NamedTuple):
    """How a sum over the rows is computed, in ``shares`` parts."""

    tile: Tile
    block_rank: int
    shares: int


_SMALL = Tile(64, 64, 64, 4, 3, "for problems that leave SMs idle with the large tile; up to 48 KB")
_SMALL_MMA = Tile(64, 64, 32, 8, 4, "as above; four warps would be short of registers for mma.sync and the mask")
_FEW_ROWS = Tile(16, 64, 128, 4, 3, "one mma of rows; the deep tile keeps many loads of the weight in flight")
_REDUCE = Tile(64, 128, 0, 8, 3, "128 columns are coalesced loads; eight warps leave registers for the mask")
# The same for every architecture.
_NARROW = Tile(64, 64, 32, 8, 4, "unaligned rows need a pointer per element, dual a second accumulator: registers")
_UNALIGNED_REDUCE = Tile(32, 64, 0, 8, 3, _NARROW.why)
_TF32 = Tile(64, 64, 32, 8, 3, "elements are twice as wide")
_IEEE = Tile(32, 32, 32, 4, 3, "float32 without tf32 has no tensor cores: operands of every product are in registers")
_FLOAT32_REDUCE = Tile(32, 64, 0, 8, 2, "as above, and a third stage's addresses are spilled on sm_80")

# Descriptors are made on the host (TensorDescriptor): those that a kernel makes (tl.make_tensor_descriptor) need
# memory from triton.set_allocator, which is the caller's to set. A loop of wgmma or tcgen05 then has no address to
# compute: the large forward on sm_90 has 166 registers, without descriptors 212. sm_120 has TMA too, but feeds
# mma.sync, whose operands pass through registers anyway. Small tiles are for launches so short that encoding two
# descriptors would show.
TARGETS = {
    "sm_80": Target(
        163 << 10,
        "ticketed",
        large=Tile(128, 128, 32, 8, 4, "48 KB; with four warps the accumulator leaves too few registers for the rest"),
        medium=Tile(128, 128, 32, 8, 4, "two accumulators of 128 x 128 are 256 registers with four warps"),
        small=_SMALL_MMA,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    "sm_86": Target(
        99 << 10,
        "ticketed",
        large=Tile(128, 128, 32, 8, 4, "as sm_80"),
        medium=Tile(128, 128, 32, 8, 4, "as sm_80"),
        small=_SMALL_MMA,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    "sm_90": Target(
        227 << 10,
        "ticketed",
        large=Tile(128, 256, 64, 8, 4, "192 KB: the widest wgmma needs the least L2 traffic per product"),
        medium=Tile(128, 128, 64, 8, 3, "two accumulators of 128 x 256 would spill"),
        small=_SMALL,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
        descriptors=True,
    ),
    "sm_100": Target(
        227 << 10,
        "ticketed",
        large=Tile(128, 128, 64, 8, 3, "96 KB: two programs per SM; 256 columns spill when tensor memory is read back"),
        medium=Tile(128, 128, 64, 8, 3, "as large"),
        small=_SMALL,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE._replace(num_stages=2, why="as for the others; a third stage costs registers for its addresses"),
        descriptors=True,
    ),
    "sm_120": Target(
        99 << 10,
        "ticketed",
        large=Tile(128, 128, 32, 8, 4, "mma.sync like sm_86, without its spare registers at four warps"),
        medium=Tile(128, 128, 32, 8, 4, "as large"),
        small=_SMALL_MMA,
        few_rows=_FEW_ROWS,
        reduce=_REDUCE,
    ),
    # Programs of one launch that wait for each other are not what HIP promises to run: two launches.
    "gfx942": Target(
        64 << 10,
        "split",
        large=Tile(128, 128, 64, 8, 2, "32 KB of 64: two programs per compute unit; wavefronts are 64 wide"),
        medium=Tile(128, 128, 64, 8, 2, "as large"),
        small=Tile(64, 64, 64, 4, 2, "for problems that leave compute units idle"),
        few_rows=Tile(16, 64, 128, 4, 2, "one mfma of rows"),
        reduce=Tile(64, 128, 0, 8, 2, "24 KB at rank 64"),
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


def schedule(target: str, columns: int, rank: int, float32: str | None) -> str:
    """The schedule for ``out`` [rows, columns] and ``inner`` [rows, rank]; ``float32`` as for ``fused``."""
    widest = _NARROW.columns if float32 is None else (_TF32 if float32 == "tf32" else _IEEE).columns
    return "dual" if columns <= widest and rank <= _DUAL_RANK else TARGETS[target].schedule


def fused(
    target: str, sms: int, schedule: str, rows: int, columns: int, rank: int, float32: str | None, aligned: bool,
    separate_branch: bool,
) -> FusedConfig:  # fmt: skip
    """For ``out`` [rows, columns] and ``inner`` [rows, rank].

    Args:
        float32: how float32 is multiplied, "tf32" or "ieee"; None for 16-bit elements.
        aligned: rows of all operands begin at multiples of 16 elements, and their elements follow each other.
        separate_branch: the low-rank branch needs an accumulator of its own.
    """
    return fused_candidates(target, sms, schedule, rows, columns, rank, float32, aligned, separate_branch)[0]


def fused_candidates(
    target: str, sms: int, schedule: str, rows: int, columns: int, rank: int, float32: str | None, aligned: bool,
    separate_branch: bool,
) -> list[FusedConfig]:  # fmt: skip
    """What ``fused`` chooses, and then what else could be faster; the results are right with any of them."""
    row = TARGETS[target]
    wide = (row.medium,) if separate_branch else (row.large, row.medium)
    others: tuple[Tile, ...] = ()
    if float32 is not None:
        tile = _TF32 if float32 == "tf32" else _IEEE
    elif schedule == "dual" or not aligned:
        tile = _NARROW
    else:
        tile = next((tile for tile in wide if fills(tile, sms, rows, columns)), row.small)
        if rows <= row.few_rows.rows:
            tile = row.few_rows
        others = (*wide, row.small) if rows > row.small.rows else (row.small, row.few_rows)
    # Rows of the table may hold one tile twice, with two reasons.
    distinct = {t.shape: t for t in (tile, *others)} | {tile.shape: tile}
    # Of a rank that is no multiple of 16 every element of A and B needs its own pointer.
    branch_depth = _block_rank(rank) if rank % 16 == 0 else 16
    fits_descriptors = row.descriptors and float32 is None and aligned and schedule != "dual"
    return [
        FusedConfig(
            tile=t,
            block_rank=_block_rank(rank),
            branch_depth=branch_depth,
            group=max(1, _GROUP_ROWS // t.rows),
            descriptors=fits_descriptors and t in (row.large, row.medium),
        )
        for t in distinct.values()
    ]


def fills(tile: Tile, sms: int, rows: int, columns: int) -> bool:
    """Whether there is such a tile for every SM, and none has half of its rows empty."""
    return 2 * rows > tile.rows and blocks(rows, tile.rows) * blocks(columns, tile.columns) >= sms


def most_programs(rows: int, columns: int, groups: int = 0) -> int:
    """Bound on the programs of a launch, whatever the tile."""
    return grouped_blocks(rows, _FEW_ROWS.rows, groups) * (blocks(columns, _IEEE.columns) + MAX_RANK // 16)


def reduce(
    target: str, sms: int, rows: int, columns: int, rank: int, float32: str | None, aligned: bool
) -> ReduceConfig:
    """For a sum over ``rows`` that has [columns, rank] elements; the other arguments are those of ``fused``."""
    tile = TARGETS[target].reduce if aligned else _UNALIGNED_REDUCE
    if float32 is not None:
        tile = _FLOAT32_REDUCE
    block_rank = _block_rank(rank)
    tiles = blocks(columns, tile.columns) * blocks(rank, block_rank)
    # Two programs per SM; a share has at least four steps, or writing its part costs more than it saves.
    shares = max(1, min(2 * sms // tiles, rows // (4 * tile.rows)))
    return ReduceConfig(tile, block_rank, shares)


def grouped(
    target: str, sms: int, rows: int, columns: int, rank: int, groups: int, float32: str | None, aligned: bool,
    separate_branch: bool,
) -> FusedConfig:  # fmt: skip
    """``fused`` for rows in groups, which are taken to be equal. A tile's rows begin where a group does, not where a
    descriptor of all rows has a block.
    """
    rows_of_one = blocks(rows, groups)
    one = fused(target, sms, "", rows_of_one, columns * groups, rank, float32, aligned, separate_branch)
    tile = TARGETS[target].medium if one.descriptors else one.tile
    return one._replace(tile=tile, descriptors=False)


def grouped_blocks(rows: int, tile_rows: int, groups: int) -> int:
    """Numbers that blocks of rows have, of groups and of the rows behind them."""
    return blocks(rows, tile_rows) + groups


class GroupedReduceConfig(NamedTuple):
    """How a sum over every group's rows is computed, ``rows`` of them in a program."""

    tile: Tile
    block_rank: int
    rows: int


def grouped_reduce(
    target: str, sms: int, rows: int, columns: int, rank: int, float32: str | None, aligned: bool
) -> GroupedReduceConfig:
    """So many rows that a group of everything has two programs per SM, and a program at least four steps. It is a power
    of two: a constant of the kernel, which is not to be compiled for every number of rows.
    """
    one = reduce(target, sms, rows, columns, rank, float32, aligned)
    tiles = blocks(columns, one.tile.columns) * blocks(rank, one.block_rank)
    least = max(4 * one.tile.rows, blocks(rows * tiles, 2 * sms))
    return GroupedReduceConfig(one.tile, one.block_rank, 1 << (least - 1).bit_length())


class RowTile(NamedTuple):
    """The tile of a program that copies or adds up rows."""

    rows: int
    columns: int
    num_warps: int


MIN_COPY_COLUMNS = 64


def copy_tile(hidden: int, element_size: int) -> RowTile:
    """For copies of rows: 64 bytes per thread, four loads of 16 bytes in flight."""
    return _row_tile(hidden, 8192 // element_size)


def sum_tile(hidden: int, element_size: int) -> RowTile:
    """For sums of rows: 16 bytes per thread of each row, because a prompt is small and several rows are in flight."""
    return _row_tile(hidden, 2048 // element_size)


def packed_tile(block_bytes: int) -> RowTile:
    """For packed weights: rows are blocks of them that have one scale each. 32 bytes per thread are two loads of 16, in
    flight at a time, and up to 16 stores.
    """
    columns = min(1 << (block_bytes - 1).bit_length(), 4096)
    return RowTile(4096 // columns, columns, 4)


def scaled_tile(k: int, scale_columns: int | None) -> RowTile:
    """For weights of eight bits: as many bytes per thread. A tile is as wide as a block of columns that has one scale,
    where that is a power of two, so that it loads one for each of its rows.
    """
    tile = _row_tile(k, 4096)
    if scale_columns is None or scale_columns < 16 or scale_columns & (scale_columns - 1):
        return tile
    columns = min(tile.columns, scale_columns)
    return RowTile(4096 // columns, columns, tile.num_warps)


def row_block(columns: int) -> int:
    """Columns that a program with a whole row takes at a time: eight per thread of 8 warps, two loads of 16 bytes.

    With 16 warps Triton 3.9 spills registers on sm_90.
    """
    return min(2048, max(256, 1 << (columns - 1).bit_length()))


def most_copying_programs(batch: int, rows: int, hidden: int) -> int:
    """Bound on the programs of a launch that copies or adds up rows of a [batch, rows, hidden] tensor."""
    return batch * (1 + rows * blocks(hidden, MIN_COPY_COLUMNS))


def _row_tile(hidden: int, elements: int) -> RowTile:
    """As wide as it can be without more idle threads than a narrower one has."""
    widths = [width for width in (1024, 512, 256, 128, MIN_COPY_COLUMNS) if width <= elements]
    columns = min(widths, key=lambda width: blocks(hidden, width) * width)
    return RowTile(elements // columns, columns, 4)


def blocks(size: int, tile: int) -> int:
    """Tiles that cover ``size``."""
    return -(-size // tile)


def _block_rank(rank: int) -> int:
    """The power of two that covers rank, as far as one tile may."""
    return min(_BLOCK_RANK, max(16, 1 << (rank - 1).bit_length()))
