"""How the CPU kernels share rows in groups among threads.

A group's product is the vendor's. In fp32, and in 16 bits that the CPU multiplies, it is made in one of two ways:

- spread: rows are cut into panels of at most ``PANEL_ROWS`` that share a group, and a thread computes a panel from
  beginning to end. Every number is the same on any number of threads, and threads wait for each other once.
- one group after the other, each by all threads: where neither rows nor groups give every thread something to do.

That is decided by sizes, not by where groups end: a large group has several panels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..spec import Verdict
from . import cpu

PANEL_ROWS = 256
_ENOUGH_ROWS = PANEL_ROWS // 4
"""Rows that are worth a thread."""


def verdict(rows: int, dtype: torch.dtype, weight: Tensor, groups: int, x_by_rows: bool, is_k_by_n: bool) -> Verdict:
    """The schedule of ``rows`` rows in ``groups`` groups by a weight [N, K] of all, or [groups, N, K]."""
    if dtype == torch.float64:
        return cpu.REFUSED_DTYPE  # the branch is computed in fp32
    if weight.dim() == 2:
        product = cpu.product_verdict(dtype, rows, weight, is_k_by_n, x_by_rows)
    else:
        product = cpu.product_verdict(dtype, -(-rows // groups), weight[0], is_k_by_n, x_by_rows)
        if dtype != torch.float32 and not cpu.is_native_16bit(dtype):
            return product  # weights go through fp32 as those of lora_linear do
    if product.schedule is None:
        return product
    threads = torch.get_num_threads()
    return _shared_among(product, groups >= threads or rows >= _ENOUGH_ROWS * threads)


@functools.lru_cache(maxsize=256)
def _shared_among(product: Verdict, spread: bool) -> Verdict:
    how = f"panels of up to {PANEL_ROWS} rows of a group, a thread each" if spread else "one group after the other"
    return Verdict(f"spread {product.schedule}" if spread else product.schedule, f"{product.reason}; {how}")
