"""Fixtures that a file of tests has for all of them once it imports them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lora_kernels as lk


@pytest.fixture(autouse=True)
def memory_of_nan() -> Iterator[None]:
    """What torch.empty returns is NaN, so that an element nobody writes is noticed."""
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms, which would import a compiler
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    """Every call takes Triton's kernels, or raises."""
    with lk.use_backend("triton"):
        yield
