"""How lora_linear is cut into tiles and tickets (csrc/config, csrc/kernels/lora_linear.cuh)."""

from __future__ import annotations

import emulator
import pytest

A100 = (108, 163 << 10)
H200 = (132, 227 << 10)


def config(
    m, n, rank=16, *, k=4096, aligned=True, has_dropout=False, device=A100, capability=80, schedule="one launch"
):
    return emulator.load_lora_linear().lora_linear_config(
        m, n, k, rank, aligned, has_dropout, *device, capability=capability, schedule=schedule
    )


@pytest.mark.parametrize(
    ("problem", "rows", "reason"),
    [
        (dict(m=8192, n=4096), 128, "large tiles fill the waves of SMs well"),
        (dict(m=64, n=65536, rank=128), 64, "few rows: half of a large tile would be idle"),
        (dict(m=64, n=65536), 64, "blocks share out the depth, too"),
        (dict(m=512, n=512), 64, "small tiles fill the waves of SMs better"),
        (dict(m=1408, n=1408), 64, "small tiles fill the waves of SMs better"),  # 121 large tiles: 2 waves for 1.1
        (dict(m=8192, n=4096, device=(20, 48 << 10)), 64, "the large tile does not fit into shared memory"),
    ],
)
def test_tile_and_its_reason(problem, rows, reason):
    chosen = config(**problem)
    assert (chosen["rows"], chosen["tile_reason"]) == (rows, reason)


@pytest.mark.parametrize(
    ("problem", "schedule"),
    [
        (dict(m=8192, n=4096), "ticketed"),
        (dict(m=8192, n=4096, rank=64), "column-0"),
        (dict(m=8192, n=4096, rank=64, has_dropout=True), "ticketed"),
        (dict(m=8192, n=4096, rank=72), "ticketed"),
        (dict(m=8192, n=64), "dual"),
        (dict(m=16, n=4096), "decode"),
        (dict(m=16, n=4095, rank=4), "decode"),
        (dict(m=17, n=4096), "dual"),
        (dict(m=64, n=4096), "dual"),
        (dict(m=64, n=4096, rank=24), "ticketed"),
        (dict(m=65, n=4096), "ticketed"),
        (dict(m=17, n=4096, rank=4), "ticketed"),
        (dict(m=8192, n=4096, rank=4), "ticketed"),
        (dict(m=8192, n=32001), "ticketed"),
        (dict(m=1, n=4096, rank=128), "ticketed"),
        (dict(m=1, n=4096, aligned=False), "expand"),
        (dict(m=8192, n=4096, schedule="cublas"), "expand"),
        (dict(m=8192, n=4096, schedule="cublas", has_dropout=True), "shrink"),
    ],
)
def test_schedule(problem, schedule):
    chosen = config(**problem)
    assert chosen["schedule"] == schedule
    assert chosen["reason"]


@pytest.mark.parametrize("k", [64, 264, 1024, 4096, 14336])
@pytest.mark.parametrize("n", [64, 4096, 28672])
def test_splits_of_decode_cover_the_depth(n, k):
    chosen = config(4, n, k=k)
    assert (chosen["splits"] - 1) * chosen["split_depth"] < k <= chosen["splits"] * chosen["split_depth"]
    assert chosen["blocks"] == -(-n // chosen["columns"]) * chosen["splits"]
    assert chosen["counters"] == (-(-n // chosen["columns"]) if chosen["splits"] > 1 else 0)


def test_no_depth_is_not_split():
    chosen = config(4, 4096, k=0)
    assert (chosen["schedule"], chosen["splits"], chosen["blocks"]) == ("decode", 1, 64)


@pytest.mark.parametrize("m", [1, 255, 256, 1000, 8192])
@pytest.mark.parametrize("rank", [16, 64])
def test_splits_of_the_adapter_gradients_cover_the_rows(m, rank):
    chosen = emulator.load_lora_linear().lora_backward_config(m, 4096, 1024, rank, True, True, True, True, *A100)
    assert (chosen["grads_splits"] - 1) * chosen["split_rows"] < m <= chosen["grads_splits"] * chosen["split_rows"]


@pytest.mark.parametrize(
    ("problem", "cublas", "reason"),
    [
        (dict(m=8192, n=4096, capability=90), True, "three fifths"),
        (dict(m=8192, n=4096, capability=100), True, "tcgen05"),
        (dict(m=8192, n=4096, capability=80), True, "four fifths"),
        (dict(m=1408, n=1408, capability=80), False, "one launch costs less"),
        (dict(m=8192, n=4096, capability=86), False, "mma.sync is what the vendor's GEMM uses here"),
        (dict(m=8192, n=4096, capability=120), False, "mma.sync is what the vendor's GEMM uses here"),
        (dict(m=64, n=4096, capability=90), False, "few rows"),
        (dict(m=65, n=1024, capability=90), True, "fewer tiles than SMs"),
        (dict(m=64, n=4096, rank=24, capability=90), True, "fewer tiles than SMs"),
        (dict(m=64, n=4096, rank=4, capability=86), True, "fewer tiles than SMs"),
        (dict(m=16, n=4096, capability=90), False, "few rows"),
        (dict(m=16, n=4096, rank=4, capability=90), False, "few rows"),
        (dict(m=16, n=4096, rank=128, capability=90), True, "fewer tiles than SMs"),
        (dict(m=16, n=4096, has_dropout=True, capability=90), True, "fewer tiles than SMs"),
        (dict(m=8192, n=32001, capability=90), False, "rows of y are not whole chunks"),
        (dict(m=8192, n=4096, k=4095, capability=86), True, "are not whole chunks of 16 bytes"),
        (dict(m=8192, n=4096, capability=90, schedule="one launch"), False, "as asked"),
        (dict(m=8192, n=4096, capability=86, schedule="cublas"), True, "as asked"),
    ],
)
def test_one_launch_or_the_vendors_gemm(problem, cublas, reason):
    chosen = config(**{"schedule": "auto", **problem})
    assert chosen["cublas"] == cublas
    assert reason in chosen["why"]
    assert (chosen["schedule"] in ("shrink", "expand")) == cublas


ON_H200 = dict(m=8192, n=4096, capability=90, device=H200, schedule="wgmma")


@pytest.mark.parametrize(
    ("changes", "columns", "blocks", "rank_tile"),
    [
        (dict(), 256, 132, 16),
        (dict(rank=24, has_dropout=True), 256, 132, 48),
        (dict(m=1), 128, 32, 16),  # half of the SMs would have no wide tile
        (dict(m=1024, n=2048, rank=256), 128, 128, 48),
    ],
)
def test_wgmma_is_taken_where_it_is_asked_for(changes, columns, blocks, rank_tile):
    chosen = config(**{**ON_H200, **changes})
    assert (chosen["schedule"], chosen["rows"], chosen["columns"]) == ("wgmma", 128, columns)
    assert (chosen["blocks"], chosen["rank_tile"], chosen["splits"]) == (blocks, rank_tile, 1)
    assert not chosen["cublas"]
    assert chosen["why"].startswith("as asked: wgmma")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(capability=80), "sm_90's alone"),
        (dict(capability=100), "sm_90's alone"),
        (dict(device=A100), "sm_90's alone"),
        (dict(rank=1), "whole chunks"),
        (dict(rank=12), "whole chunks"),
        (dict(k=4100), "whole chunks"),
        (dict(n=4100), "whole chunks"),
        (dict(aligned=False), "whole chunks"),
        (dict(k=0), "nothing to sum"),
    ],
)
def test_what_does_not_fit_wgmma_is_served_as_without_asking(changes, why):
    asked, best = (config(**{**ON_H200, **changes, "schedule": schedule}) for schedule in ("wgmma", "auto"))
    assert asked["why"].startswith("wgmma does not fit: ")
    assert why in asked["why"]
    assert {**asked, "why": ""} == {**best, "why": ""}
    assert best["schedule"] != "wgmma"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(rank=72, has_dropout=True), None),
        (dict(m=256, n=8448), None),  # as many narrow tiles as SMs
        (dict(m=256, n=8320), "fewer tiles than SMs"),
        (dict(m=255, n=16384), "three fifths"),
        (dict(rank=4), "three fifths"),
        (dict(n=4100), "rows of y are not whole chunks"),
        (dict(capability=100), "tcgen05"),
        (dict(schedule="cublas"), "as asked"),
        (dict(schedule="one launch"), "as asked"),
    ],
)
def test_wgmma_is_best_for_many_rows_of_many_tiles(changes, reason):
    """Of sm_90, unasked, in the forward and in dX, which is as wide here as y and as deep."""
    problem = {**ON_H200, "schedule": "auto", **changes}
    forward = config(**problem)
    sizes = problem["m"], 4096, problem["n"]
    backward = emulator.load_lora_linear().lora_backward_config(
        *sizes, problem.get("rank", 16), True, True, True, True, *H200,
        capability=problem["capability"], schedule=problem["schedule"],
    )  # fmt: skip
    for chosen in (forward, backward):
        assert (chosen["schedule"] == "wgmma") == (reason is None)
    assert (reason or "one more stage of a main loop by wgmma") in forward["why"]


def test_wgmma_takes_the_gradient_of_x_where_it_is_wanted():
    """It leaves parts of dB where ranks are few; else dA and dB are reduced as where the vendor multiplies."""
    config = emulator.load_lora_linear().lora_backward_config
    sizes, device = (8192, 4096, 4096, 16, True), dict(capability=90, schedule="wgmma")
    asked = config(*sizes, True, True, True, *H200, **device)
    assert (asked["schedule"], asked["columns"], asked["blocks"], asked["counters"]) == ("wgmma", 256, 132, 2 + 64)
    assert (asked["cublas"], asked["parts_of_grad_b"]) == (False, 64)
    many = (8192, 4096, 4096, 24, True)
    wide, by_vendor = (
        config(*many, True, True, True, *H200, **{**device, "schedule": name}) for name in ("wgmma", "cublas")
    )
    assert (wide["schedule"], wide["parts_of_grad_b"]) == ("wgmma", 0)
    assert [wide[name] for name in ("grads_blocks", "grads_splits")] == [
        by_vendor[name] for name in ("grads_blocks", "grads_splits")
    ]
    assert not config(*sizes, True, True, False, *H200, **device)["parts_of_grad_b"]
    without = config(*sizes, False, True, True, *H200, **device)
    assert without["schedule"] != "wgmma"
    assert "no gradient of x is wanted" in without["why"]


@pytest.mark.parametrize(
    ("changes", "cluster", "blocks", "group_rows"),
    [
        (dict(), 2, 132, 4),
        (dict(m=300, n=512), 2, 8, 2),  # two pairs of blocks of rows, one of which has one
        (dict(device=(5, 232448)), 2, 4, 4),
        (dict(m=128), 1, 32, 1),  # one block of rows
        (dict(device=(1, 232448)), 1, 1, 8),
    ],
)
def test_clusters_are_taken_where_they_are_asked_for(changes, cluster, blocks, group_rows):
    chosen = config(**{**ON_H200, **changes, "schedule": "wgmma, clusters"})
    assert (chosen["schedule"], chosen["cluster"], chosen["blocks"]) == ("wgmma", cluster, blocks)
    assert chosen["group_rows"] == group_rows
    assert ("without" in chosen["tile_reason"]) == (cluster == 1)
    assert cluster == 1 or (chosen["columns"], "no GPU has shown" in chosen["tile_reason"]) == (256, True)
    single = config(**{**ON_H200, **changes, "schedule": "wgmma"})
    assert (single["cluster"], single["counters"]) == (1, chosen["counters"])


def test_clusters_are_for_forwards_that_fit_wgmma():
    asked = dict(capability=90, schedule="wgmma, clusters")
    of_x = emulator.load_lora_linear().lora_backward_config(
        8192, 4096, 4096, 16, True, True, True, True, *H200, **asked
    )
    assert (of_x["schedule"], of_x["cluster"]) == ("wgmma", 1)
    assert "forwards alone: without" in of_x["tile_reason"]
    for rank in (1, 17):
        chosen = config(**{**ON_H200, **asked, "rank": rank})
        assert (chosen["schedule"], chosen["cluster"]) != ("wgmma", 2)
        assert chosen["why"].startswith("wgmma does not fit: ")


@pytest.mark.parametrize(("m", "k", "rank"), [(1, 4096, 16), (100, 776, 24), (8192, 4096, 16), (512, 14336, 200)])
def test_splits_of_shrink_cover_the_depth_and_fill_the_sms(m, k, rank):
    chosen = config(m, 4096, rank, k=k, has_dropout=True, schedule="cublas")
    assert (chosen["splits"] - 1) * chosen["split_depth"] < k <= chosen["splits"] * chosen["split_depth"]
    tiles = -(-m // chosen["rows"]) * -(-rank // chosen["columns"])
    assert chosen["blocks"] == tiles * chosen["splits"]
    assert chosen["splits"] == 1 or chosen["partials"] == tiles * chosen["splits"] * chosen["rows"] * chosen["columns"]
    assert chosen["blocks"] >= A100[0] or chosen["split_depth"] < 2 * 8 * 64, "idle SMs could take part of the depth"


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 256])
def test_rank_tile(rank):
    assert config(8192, 4096, rank)["rank_tile"] == (16 if rank <= 16 else 64)


@pytest.mark.parametrize(("m", "n", "rank"), [(1, 1, 1), (130, 72, 17), (1025, 513, 256), (5000, 300, 72)])
def test_every_tile_has_one_ticket_and_waits_only_for_lower_ones(m, n, rank):
    chosen = config(m, n, rank, has_dropout=True)
    row_blocks = -(-m // chosen["rows"])
    shrink_columns, base_columns = -(-rank // chosen["rank_tile"]), -(-n // chosen["columns"])
    assert chosen["blocks"] == row_blocks * (shrink_columns + base_columns)
    work = [
        emulator.load_lora_linear().work_of_ticket(t, row_blocks, shrink_columns, base_columns, chosen["group_rows"])
        for t in range(chosen["blocks"])
    ]
    shrink = {(True, row, column) for row in range(row_blocks) for column in range(shrink_columns)}
    base = {(False, row, column) for row in range(row_blocks) for column in range(base_columns)}
    assert set(work) == shrink | base
    for row in range(row_blocks):
        last_shrink = max(t for t, (is_shrink, r, _) in enumerate(work) if is_shrink and r == row)
        first_base = min(t for t, (is_shrink, r, _) in enumerate(work) if not is_shrink and r == row)
        assert last_shrink < first_base


@pytest.mark.parametrize(("m", "n"), [(8192, 4096), (4096, 14336), (16384, 1024)])
def test_tiles_that_run_together_share_rows_and_columns(m, n):
    # Of what fills an A100, two blocks per SM: a square of tiles would read the fewest rows of x and w, and a raster
    # by rows alone reads w again for every block of rows.
    chosen = config(m, n)
    row_blocks, columns = -(-m // chosen["rows"]), -(-n // chosen["columns"])
    work_of_ticket = emulator.load_lora_linear().work_of_ticket
    tickets = range(row_blocks * (columns + 1))
    work = [work_of_ticket(t, row_blocks, 1, columns, chosen["group_rows"]) for t in tickets]
    wave = 2 * A100[0]
    read = 0
    for first in range(0, len(work), wave):
        base = [(row, column) for is_shrink, row, column in work[first : first + wave] if not is_shrink]
        read += len({row for row, _ in base}) + len({column for _, column in base})
    squares = len(work) / wave * 2 * wave**0.5
    assert read <= 1.5 * squares


def test_counters_hold_a_flag_per_block_of_rows():
    assert config(8192, 4096)["counters"] == 2 + 8192 // 128
