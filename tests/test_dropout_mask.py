"""The mask is one function everywhere: known answers of Philox, C++ against torch, statistics, bad arguments."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import philox

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)

# Known answers published with the Random123 library: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    def tensors(values):
        return tuple(torch.tensor(v, dtype=torch.int64) for v in values)

    assert tuple(int(w) for w in philox.philox4x32(tensors(counter), tensors(key))) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789012345, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(
    ("rows", "columns", "p"),
    [(1, 1, 0.5), (7, 13, 0.1), (33, 576, 0.3), (3, 2057, 0.9), (64, 8, 0.0), (3, 100, 1.0), (0, 5, 0.5), (5, 0, 0.5)],
)
def test_cpu_kernel_equals_the_definition(rows, columns, p, seed):
    ours = lk.dropout_mask(rows, columns, p, seed)
    assert lk.stats()["served"] == {("dropout_mask", "cpu"): 1}
    assert torch.equal(ours, philox.keep_mask(torch.tensor([seed]), rows, columns, p))


def test_the_threshold_is_rounded_to_nearest():
    """Kills: one that is cut off. Of 65536 elements one is another then, which only a large mask has."""
    assert [philox.keep_threshold(p) for p in (0.1, 0.3)] == [6554, 19661]
    ours = lk.dropout_mask(512, 2048, 0.3, 2026)
    assert torch.equal(ours, philox.keep_mask(torch.tensor([2026]), 512, 2048, 0.3))


def test_elements_take_16_bits_low_half_first():
    words = philox.philox4x32(
        tuple(torch.tensor(v) for v in (5, 0, 0, 0)), tuple(torch.tensor(v) for v in (0x89ABCDEF, 0x1234567))
    )
    bits = [half for w in words for half in (int(w) & 0xFFFF, int(w) >> 16)]
    # 16 columns are two groups per row: row 2 starts at group 4, its columns 8..15 are group 5.
    mask = lk.dropout_mask(3, 16, 0.25, 0x0123456789ABCDEF)
    assert mask[2, 8:].tolist() == [b >= 0x4000 for b in bits]


def test_group_counter_uses_both_halves():
    # Groups 2**32 - 1 and 2**32 differ in the high word only in the second: no wrap-around.
    group = torch.tensor([0, 2**32])
    low, high, zero = group & 0xFFFFFFFF, group >> 32, torch.zeros(2, dtype=torch.int64)
    words = philox.philox4x32((low, high, zero, zero), (torch.tensor(7), torch.tensor(0)))
    assert int(words[0][0]) != int(words[0][1])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_of_kept_elements(p):
    n = 1 << 20
    kept = lk.dropout_mask(1024, 1024, p, 2026).double().mean().item()
    assert abs(kept - (1 - philox.keep_threshold(p) / 65536)) < 5 * (p * (1 - p) / n) ** 0.5


def test_masks_of_different_seeds_are_independent():
    a, b = (lk.dropout_mask(512, 512, 0.5, seed).double() for seed in (1, 2))
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
    assert abs(correlation) < 5 / 512


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 4, 0.5, 0), ValueError, "rows and columns"),
        ((4, 4, 1.5, 0), ValueError, "p must be a number in"),
        ((4, 4, float("nan"), 0), ValueError, "p must be a number in"),
        ((4, 4, 0.5, 1.0), TypeError, "seed must be an int"),
        ((4, 4, 0.5, torch.tensor([1, 2])), ValueError, "seed must be an int64 tensor of one element"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        lk.dropout_mask(*arguments)
