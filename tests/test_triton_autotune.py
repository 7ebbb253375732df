"""Tiles chosen by measurement: what is measured, what is remembered, and that nothing is unless asked for."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from lora_kernels.triton_kernels import autotune, configs
from lora_kernels.triton_kernels.launching import Device

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from lora_kernels.triton_kernels import lora_linear

CPU = torch.device("cpu")
TILES = [(64, 64, 64, 4, 3), (128, 128, 32, 8, 4), (16, 64, 128, 4, 3)]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock whose times are what ``run`` returns, and a cache of its own. Returns the times that were taken."""
    taken = []

    def milliseconds(run):
        taken.append(run())
        return taken[-1]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(autotune, "device_name", lambda device: "GPU of (this) test")
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return taken


def fastest(problem="p", times=(3.0, 1.0, 2.0), tiles=TILES):
    return autotune.fastest(problem, tiles, lambda i: lambda: times[i], CPU)


def forget():
    autotune._known.clear()


def test_each_candidate_is_measured_once(clock):
    assert fastest() == 1
    assert clock == [3.0, 1.0, 2.0]
    assert fastest(times=(0.0, 9.0, 9.0)) == 1
    assert fastest("another", times=(0.5, 9.0, 9.0)) == 0
    assert len(clock) == 6


def test_the_winner_is_remembered_on_disk(clock):
    fastest()
    (path,) = autotune.cache_path(CPU).parent.glob("*.json")
    assert path == autotune.cache_path(CPU)
    assert "GPU-of-this-test-triton-3." in path.name
    assert json.loads(path.read_text()) == {"p": list(TILES[1])}
    forget()
    assert fastest(times=(0.0, 9.0, 9.0)) == 1
    assert len(clock) == 3, "read, not measured"
    assert fastest(tiles=TILES[::-1]) == 1, "a tile is remembered by its sizes, not by its place in the table"


def test_what_other_processes_found_is_kept(clock):
    fastest()
    path = autotune.cache_path(CPU)
    path.write_text(json.dumps({"p": TILES[1], "theirs": TILES[2]}))
    fastest("mine")
    assert set(json.loads(path.read_text())) == {"p", "theirs", "mine"}


def test_a_tile_that_is_no_candidate_any_more_is_measured_again(clock):
    fastest()
    forget()
    assert fastest(times=(2.0, 1.0), tiles=[TILES[0], TILES[2]]) == 1
    assert len(clock) == 5


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"p": 3}', '{"p": ["wide"]}', "\0\1"])
def test_a_broken_cache_is_ignored_with_a_warning(clock, content):
    path = autotune.cache_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match="not a cache of tiles and is ignored"):
        assert fastest() == 1
    assert json.loads(path.read_text()) == {"p": list(TILES[1])}


def test_a_cache_that_cannot_be_written_is_done_without(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not remembered"):
        assert fastest() == 1
    assert fastest(times=(0.0, 9.0, 9.0)) == 1, "in this process it is"


def test_off_unless_asked_for(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("LORA_KERNELS_AUTOTUNE", raising=False)
    assert not autotune.is_enabled(cuda)
    monkeypatch.setenv("LORA_KERNELS_AUTOTUNE", "1")
    assert autotune.is_enabled(cuda)
    assert not autotune.is_enabled(CPU), "the interpreter's time says nothing"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not autotune.is_enabled(cuda)


def launches(rows, n=4096, k=4096, p=0.0, drops="p"):
    sizes = (rows, n), (rows, 16), (rows, k), (n, k), (16, k), (n, 16)  # y, s, x, weight, A, B
    tensors = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
    seed = torch.zeros(1, dtype=torch.int64) if p > 0 else None
    task = lora_linear.forward_task(*tensors, None, seed, 1.7, p)
    return lora_linear.fused_launches(Device("sm_90", 132), "ticketed", task, drops)


def tile_of(launch):
    return launch.constants["BLOCK_ROWS"], launch.constants["BLOCK_COLUMNS"]


def test_lora_linear_takes_the_fastest_tile(clock, monkeypatch):
    (untuned,) = launches(4096)
    assert tile_of(untuned) == (128, 256)
    assert clock == []
    monkeypatch.setattr(autotune, "is_enabled", lambda device: True)
    measured = []

    def milliseconds(run):
        (launch,), _ = run.args
        measured.append(tile_of(launch))
        return abs(launch.constants["BLOCK_COLUMNS"] - 128)

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    (tuned,) = launches(4096)
    assert measured == [(128, 256), (128, 128), (64, 64)]
    assert tile_of(tuned) == (128, 128)
    launches(3000)
    assert len(measured) == 3, "of the same power of two"
    for other in (
        {"rows": 2000},
        {"rows": 4096, "k": 1024},
        {"rows": 4096, "p": 0.1},
        {"rows": 4096, "drops": "branch"},
    ):
        before = len(measured)
        launches(**other)
        assert len(measured) > before, other
    before = len(measured)
    launches(0)
    launches(4096, k=4095)
    assert len(measured) == before, "nothing to compute, and one candidate"


def test_candidates_begin_with_what_the_table_says():
    for rows in (1, 16, 40, 64, 65, 128, 4096):
        args = "sm_80", 108, "ticketed", rows, 4096, 16, None, True, False
        candidates = configs.fused_candidates(*args)
        assert candidates[0] == configs.fused(*args)
        shapes = [c.tile.shape for c in candidates]
        assert len(set(shapes)) == len(shapes) > 1
    assert len(configs.fused_candidates("sm_80", 108, "ticketed", 4096, 4096, 16, "tf32", True, False)) == 1
