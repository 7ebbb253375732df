"""How lora_linear is cut into tiles and tickets (csrc/config.h, csrc/kernels/lora_linear.cuh)."""

from __future__ import annotations

import emulator
import pytest

A100 = (108, 163 << 10)


def config(m, n, rank=16, *, aligned=True, device=A100):
    return emulator.load().lora_linear_config(m, n, rank, aligned, *device)


@pytest.mark.parametrize(
    ("problem", "rows", "reason"),
    [
        (dict(m=8192, n=4096), 128, "enough large tiles for every SM"),
        (dict(m=64, n=65536), 64, "few rows: half of a large tile would be idle"),
        (dict(m=512, n=512), 64, "fewer large tiles than SMs"),
        (dict(m=8192, n=4096, aligned=False), 64, "rows are not aligned to 16 bytes"),
        (dict(m=8192, n=4096, device=(20, 48 << 10)), 64, "the large tile does not fit into shared memory"),
    ],
)
def test_tile_and_its_reason(problem, rows, reason):
    chosen = config(**problem)
    assert (chosen["rows"], chosen["reason"]) == (rows, reason)


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 256])
def test_rank_tile(rank):
    assert config(8192, 4096, rank)["rank_tile"] == (16 if rank <= 16 else 64)


@pytest.mark.parametrize(("m", "n", "rank"), [(1, 1, 1), (130, 72, 17), (1025, 513, 256), (5000, 300, 64)])
def test_every_tile_has_one_ticket_and_waits_only_for_lower_ones(m, n, rank):
    chosen = config(m, n, rank)
    row_blocks = -(-m // chosen["rows"])
    shrink_columns, base_columns = -(-rank // chosen["rank_tile"]), -(-n // chosen["columns"])
    assert chosen["blocks"] == row_blocks * (shrink_columns + base_columns)
    work = [
        emulator.load().work_of_ticket(t, row_blocks, shrink_columns, base_columns, chosen["group_rows"])
        for t in range(chosen["blocks"])
    ]
    shrink = {(True, row, column) for row in range(row_blocks) for column in range(shrink_columns)}
    base = {(False, row, column) for row in range(row_blocks) for column in range(base_columns)}
    assert set(work) == shrink | base
    for row in range(row_blocks):
        last_shrink = max(t for t, (is_shrink, r, _) in enumerate(work) if is_shrink and r == row)
        first_base = min(t for t, (is_shrink, r, _) in enumerate(work) if not is_shrink and r == row)
        assert last_shrink < first_base


def test_counters_hold_a_flag_per_block_of_rows():
    assert config(8192, 4096)["counters"] == 2 + 8192 // 128
