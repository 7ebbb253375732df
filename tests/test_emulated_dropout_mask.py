"""The CUDA kernel of dropout_mask and its binding, emulated: the definition's mask, and missing stores."""

from __future__ import annotations

import emulator
import pytest
import torch

from lora_kernels import philox
from lora_kernels.ops.dropout_mask import SPEC

SEEDS = (0, -1, 123456789012345, -(2**63))


@pytest.fixture(scope="module", autouse=True)
def native():
    """The module that the tests steer the launches with."""
    library = torch.library.Library("lora_kernels_emulated_mask", "DEF")
    arguments, returns = SPEC.schema.split(" -> ")
    library.define(f"{SPEC.name}{arguments[:-1]}, str schedule) -> {returns}")
    yield emulator.load_dropout_mask()
    library._destroy()


def run(seed, rows, columns, p, **options):
    """The mask's bytes; what is not stored is 255."""
    emulator.load_dropout_mask().set_options(options)
    mask = torch.ops.lora_kernels_emulated_mask.dropout_mask(torch.tensor([seed]), rows, columns, p, "")
    assert mask.dtype == torch.bool
    assert mask.shape == (rows, columns)
    return mask.view(torch.uint8)


def expected(seed, rows, columns, p):
    return philox.keep_mask(torch.tensor([seed]), rows, columns, p).view(torch.uint8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("rows", "columns", "p"),
    [(1, 1, 0.5), (7, 13, 0.1), (33, 576, 0.3), (3, 2057, 0.9), (64, 8, 0.0), (3, 100, 1.0), (0, 5, 0.5), (5, 0, 0.5)],
)
def test_mask_is_the_definitions(rows, columns, p, seed):
    assert torch.equal(run(seed, rows, columns, p), expected(seed, rows, columns, p))


@pytest.mark.parametrize("columns", [1024, 1021])
def test_three_blocks_stride_over_a_large_mask(native, columns):
    assert torch.equal(run(7, 20, columns, 0.4), expected(7, 20, columns, 0.4))
    assert native.last_launch()[1] == 3
    run(7, 1, columns, 0.4)
    assert native.last_launch()[1] == 1


@pytest.mark.parametrize("columns", [64, 61])
def test_a_missing_store_is_noticed(native, columns):
    run(7, 5, columns, 0.4)
    assert len(native.last_launch()[2].global_store_sites) == 1
    assert not torch.equal(run(7, 5, columns, 0.4, drop_global_store=0), expected(7, 5, columns, 0.4))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("row0", [0, 1020, 2**20])
def test_a_tile_of_a_large_matrix_has_the_definitions_mask(native, bits, row0):
    # Groups are counted in 64 bits: 2^22 a row, so that the 2^32nd is in row 1024.
    columns, column0, seed, p = 2**25, 2**24 + 32, -987654321012345, 0.4
    group = (torch.arange(16)[:, None] + row0) * (columns // 8) + column0 // 8 + torch.arange(4)
    keep = philox.keep_groups(torch.tensor([seed]), group, p).view(16, 32)
    native.set_options({})
    kept_in_tile = getattr(native, f"kept_in_tile_{bits}")
    for found in kept_in_tile(seed, philox.keep_threshold(p), columns, row0, column0):
        assert torch.equal(torch.frombuffer(bytearray(found), dtype=torch.uint8).view(16, 32), keep.view(torch.uint8))


def test_the_launch_goes_to_the_callers_stream(native):
    native.set_stream(0x77)
    run(7, 5, 64, 0.4)
    assert native.last_launch()[3] == 0x77
    native.set_stream(0)


@pytest.mark.parametrize(
    ("error", "problem"),
    [(0, ""), (35, "driver"), (222, "driver"), (209, "architecture"), (98, "architecture"), (719, "other")],
)
def test_what_stands_in_the_way_of_the_kernels(native, error, problem):
    # cudaErrorInsufficientDriver, UnsupportedPtxVersion, NoKernelImageForDevice, InvalidDeviceFunction, LaunchFailure
    told, detail = native.usable(error)
    assert told == problem
    assert bool(detail) == (error != 0)
    assert ("driver for CUDA 12.4, runtime 13.0" in detail) == (error != 0)
    assert native.last_error() == 0, "the next launch would return it"


def test_a_seed_that_is_no_int64_is_refused():
    with pytest.raises(RuntimeError, match="seed must be one int64 number"):
        torch.ops.lora_kernels_emulated_mask.dropout_mask(torch.tensor([1], dtype=torch.int32), 2, 8, 0.5, "")
