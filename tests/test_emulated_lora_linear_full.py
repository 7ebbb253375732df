"""Every combination of what the suite covers in pairs: the emulated forward of lora_linear (`make test-full`)."""

from __future__ import annotations

import itertools

import pytest
import test_emulated_lora_linear as quick

RANKS = (1, 8, 16, 17, 64, 256)


def combinations():
    """(variant, case) as test_emulated_lora_linear has them, with every rank that leads to the variant."""
    for variant, shapes in quick.SHAPES.items():
        _, aligned, rank_tile = variant
        ranks = [r for r in RANKS if (r <= 16) == (rank_tile == 16) and (r % 8 == 0 or not aligned)]
        axes = {**shapes, "rank": ranks, "name": quick.DTYPES, "p": (0.0, 0.3), "bias": (False, True)}
        for values in itertools.product(*axes.values()):
            case = dict(zip(axes, values))
            # The bound compares our largest error with torch's: of a single element, one draw with another.
            if case["m"] * case["n"] > 1:
                yield variant, case


@pytest.mark.full
@pytest.mark.parametrize(("variant", "case"), combinations(), ids=str)
def test_forward_is_as_accurate_as_torch(variant, case):
    quick.test_forward_is_as_accurate_as_torch(variant, case)
