"""Every combination of what the suite covers in pairs: the emulated kernels of lora_linear (`make test-full`)."""

from __future__ import annotations

import itertools

import pytest
import test_emulated_lora_backward as backward
import test_emulated_lora_linear as forward
from emulated import DTYPES

RANKS = (1, 8, 16, 17, 64, 256)


def ranks_of(axes, rank_tile, access):
    """The ranks that lead to a kernel, and those of its own that are not among RANKS."""
    fits = {forward.WHOLE: lambda r: r % 8 == 0, forward.RANKS: lambda r: r % 2 == 1, forward.ALL: lambda _: True}
    fitting = [r for r in RANKS if rank_tile == (16 if r <= 16 else rank_tile) and fits[access](r)]
    return sorted({r for r in fitting if min(axes["rank"]) <= r <= max(axes["rank"])} | set(axes["rank"]))


def combinations(kernels, **more):
    """(kernel, case) with every value of every axis."""
    for kernel, axes in kernels.items():
        *_, access, rank_tile = kernel
        axes = {**axes, **more, "rank": ranks_of(axes, rank_tile, access)}
        for values in itertools.product(*axes.values()):
            yield kernel, dict(zip(axes, values))


COMMON = dict(name=tuple(DTYPES), float_adapters=(False, True))


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "case"), list(combinations(forward.KERNELS, **COMMON, bias=(False, True))), ids=str)
def test_forward_is_as_accurate_as_torch(kernel, case):
    forward.test_forward_is_as_accurate_as_torch(kernel, case)


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "case"), list(combinations(backward.KERNELS, **COMMON, p=(0.0, 0.3))), ids=str)
def test_gradients_are_as_accurate_as_torch(kernel, case):
    backward.test_gradients_are_as_accurate_as_torch(kernel, case)
