"""What the Triton kernels of several ops agree on. Imports neither Triton nor the kernels: the first call does."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import Any

import torch

from .. import dispatch
from ..plain import float32_products
from ..reasons import Reason
from ..spec import Verdict
from ..triton_kernels import configs
from ..triton_kernels.launching import device_of

OLDEST = (3, 6)
"""Version of Triton that compiles and launches the kernels; no older one was tried."""
MAX_SIZE = 2**31 - 1024
"""Rows, columns and tiles are counted in int32; the margin is what the last, partly filled tiles reach beyond."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SCHEDULES = {
    "ticketed": Verdict("ticketed", "one launch: tiles of the low-rank product first, other tiles wait for theirs"),
    "split": Verdict("split", "two launches: programs of one launch may not wait for each other on this GPU"),
    "dual": Verdict("dual", "one tile column: both products from one pass"),
}
_MULTI_FEW_ROWS = Verdict("by row", "few rows: each reads its own adapter; torch multiplies by the weight")
_MULTI = Verdict("by adapter", "rows are looked up by adapter; torch multiplies by the weight")
_BRANCH = {
    "by row": Verdict("by row", "few rows: each reads its own adapter"),
    "by adapter": Verdict("by adapter", "rows are looked up by adapter"),
}
_NOT_INSTALLED = Verdict(None, Reason.TRITON_NOT_INSTALLED)
_TOO_OLD = Verdict(None, Reason.TRITON_TOO_OLD)
_NOT_INTERPRETED = Verdict(None, Reason.NOT_INTERPRETED)
_DTYPE = Verdict(None, Reason.DTYPE)
_LAYOUT = Verdict(None, Reason.LAYOUT)
_FP32_STRICT = Verdict(None, Reason.FP32_STRICT)
_RANK = Verdict(None, Reason.RANK)
_SIZE = Verdict(None, Reason.SIZE)
_ARCHITECTURE = Verdict(None, Reason.ARCHITECTURE)
_MEMBERS = Verdict(None, Reason.MEMBERS)


@functools.cache
def is_installed() -> bool:
    """True where ``import triton`` finds a package."""
    return find_spec("triton") is not None


@functools.cache
def version() -> tuple[int, int]:
    """Of the Triton that is installed."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def refusal(device: torch.device) -> Verdict | None:
    """Why no Triton kernel runs for tensors on ``device``; None where one does."""
    if not is_installed():
        return _NOT_INSTALLED
    # Triton reads the variable when kernels are defined. The CPU is only asked by force, because it is very slow.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return _NOT_INTERPRETED
    if version() < OLDEST:
        return _TOO_OLD
    return _ARCHITECTURE if device_of(device) is None else None


def lora_verdict(x: torch.Tensor, columns: int, depth: int, rank: int) -> Verdict:
    """Whether, and in which schedule, ``out`` [M, columns] and ``inner`` [M, rank] of a LoRA linear are computed.

    Args:
        x: an activation of M rows, in the dtype of the products.
        columns, depth: N and K in the forward, K and N in the backward.
    """
    refused = refusal(x.device)
    if refused is not None:
        return refused
    if x.dtype not in _FLOATS:
        return _DTYPE
    float32 = float32_products(x.dtype)
    if float32 == "ieee" and dispatch.forced_backend() != "triton":
        return _FP32_STRICT
    if rank > configs.MAX_RANK:
        return _RANK
    if columns == 0 or depth == 0:
        return _LAYOUT
    rows = x.numel() // x.shape[-1]
    if configs.most_programs(rows, columns) > MAX_SIZE or max(rows, columns, depth) > MAX_SIZE:
        return _SIZE
    gpu: Any = device_of(x.device)  # not too old: it was not refused
    return _SCHEDULES[configs.schedule(gpu.target, columns, rank, float32)]


def grouped_verdict(x: torch.Tensor, columns: int, depth: int, groups: int, rank: int) -> Verdict:
    """The same of rows in groups, without the schedule of one tile column."""
    verdict = lora_verdict(x, columns, depth, rank)
    if verdict.schedule is None:
        return verdict
    if groups > configs.MAX_GROUPS or configs.most_programs(x.shape[0], columns, groups) > MAX_SIZE:
        return _SIZE
    return _SCHEDULES[configs.TARGETS[device_target(x)].schedule]


def pack_verdict(x: torch.Tensor, columns: list[int], depths: list[int], ranks: list[int]) -> Verdict:
    """The same of several members: their ``out`` have these columns, and their products these depths."""
    if min(*columns, *depths) == 0:
        return _LAYOUT
    if len(ranks) > configs.MAX_MEMBERS:
        return _MEMBERS
    verdict = lora_verdict(x, sum(columns), max(depths), max(ranks))
    return verdict if verdict.schedule is None else _SCHEDULES[configs.TARGETS[device_target(x)].schedule]


def device_target(x: torch.Tensor) -> str:
    """Key of ``configs.TARGETS`` for a GPU that was not refused."""
    gpu: Any = device_of(x.device)
    return gpu.target


def multi_verdict(x: torch.Tensor, columns: int, depth: int, adapters: int, rank: int, *, backward: bool) -> Verdict:
    """The same of rows that have adapters in pools; the product with the weight is torch's."""
    verdict = lora_verdict(x, columns, depth, rank)
    if verdict.schedule is None:
        return verdict
    rows = x.numel() // x.shape[-1]
    if adapters > configs.MAX_GROUPS or configs.most_programs(rows, columns, adapters) > MAX_SIZE:
        return _SIZE
    return _MULTI_FEW_ROWS if rows <= configs.FEW_ROWS and not backward else _MULTI


def branch_verdict(x: torch.Tensor, columns: int, depth: int, adapters: int, rank: int) -> Verdict:
    """The same of one half of their branch, which has these columns and this depth; ``rank`` is what bounds it."""
    verdict = multi_verdict(x, columns, depth, adapters, rank, backward=False)
    return verdict if verdict.schedule is None else _BRANCH[verdict.schedule]


def rows_refusal(
    device: torch.device, dtypes: tuple[torch.dtype, ...], batch: int, rows: int, hidden: int
) -> Verdict | None:
    """Why rows of a [batch, rows, hidden] tensor are not copied or summed; None where they are."""
    refused = refusal(device)
    if refused is not None:
        return refused
    if any(dtype not in _FLOATS for dtype in dtypes):
        return _DTYPE
    return _SIZE if configs.most_copying_programs(batch, rows, hidden) > MAX_SIZE else None


def elementwise_refusal(t: torch.Tensor) -> Verdict | None:
    """Why no kernel goes over the elements of tensors like ``t``; None where one does."""
    refused = refusal(t.device)
    if refused is not None:
        return refused
    if t.dtype not in _FLOATS:
        return _DTYPE
    return _SIZE if t.numel() > MAX_SIZE * configs.ELEMENTWISE_BLOCK else None
