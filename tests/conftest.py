"""Shared set-up: one thread per worker (the suite runs under xdist), counters at zero before each test."""

import pytest
import torch

import lora_kernels as lk


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_slate():
    torch.manual_seed(0)
    lk.reset_stats()
