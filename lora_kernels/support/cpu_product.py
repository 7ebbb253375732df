"""Which library makes an fp32 product on a CPU: torch's own choice, MKL, or oneDNN, which torch carries too.

Neither is faster everywhere. It depends on the instruction set, on the number of threads, on the shape, and, with
oneDNN, on where the weight begins: one that is mapped from a file is seldom at a multiple of 64 bytes. No property that
a program can ask a processor for tells, so the first product of a kind is made by both, on stand-ins of a bounded size,
and the kind keeps the winner for as long as the process lives. A tie is torch's own.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import _native
from ..spec import Verdict

FROM_ROWS = 16
"""Below, a product is a matter of reading the weight, which oneDNN would also write in a layout of its own."""
MKL = Verdict("aten", "vendor GEMM, low-rank branch accumulated into its output")

_VARIABLE = "LORA_KERNELS_CPU_PRODUCT"
_MODES = ("measure", "mkl", "onednn")
_GAIN = 1.03
"""By how much oneDNN must win: choosing it in a tie would change bits for nothing."""
_ROUNDS, _SECONDS, _MOST_ROUNDS = 5, 0.01, 50
"""How often each takes its turn: so many times at least, and until this much time has gone into them."""
_LONGEST = 1024
_MOST_MULTIPLICATIONS = 1 << 27
"""Sides and work of a stand-in: a few milliseconds per product."""
_CACHE_LINE = 64


class Kind(NamedTuple):
    """What a product ``a bᵀ`` has in common with others that take as long; sides by the power of two above them."""

    m: int
    n: int
    k: int
    a_by_rows: bool
    b_by_rows: bool
    is_aligned: bool
    """Whether b begins at a cache line."""
    threads: int


def _checked_mode(mode: str) -> str:
    if mode not in _MODES:
        raise ValueError(f"{_VARIABLE}: expected one of {', '.join(_MODES)}, got {mode!r}")
    return mode


_mode = _checked_mode(os.environ.get(_VARIABLE, "measure"))
_chosen: dict[Kind, Verdict] = {}
_lock = threading.Lock()


def choose(rows: int, a_by_rows: bool, b: Tensor, b_is_k_by_n: bool = False) -> Verdict:
    """The schedule for ``a @ b.T`` in fp32, "aten" or "onednn", and why.

    Args:
        rows: of a, which is [rows, k].
        a_by_rows: whether a row of a lies in one piece.
        b: [n, k].
        b_is_k_by_n: b is [k, n], and the product ``a @ b``.
    """
    settled = _settled(rows)
    if settled is not None:
        return settled
    kind, sizes, is_dense = _kind(rows, a_by_rows, b, b_is_k_by_n)
    return _of_kind(kind, sizes, _by_onednn) if is_dense else MKL  # oneDNN would have a copy of what is not


def choose_for_decoded(rows: int, n: int, k: int, b_is_k_by_n: bool = False) -> Verdict:
    """As ``choose``, for a b that is still to be decoded, into memory of ours, by rows of what it is stored as."""
    settled = _settled(rows)
    if settled is not None:
        return settled
    return _of_kind(_kind_of(rows, n, k, True, not b_is_k_by_n, True), (rows, n, k), _by_onednn)


def _settled(rows: int) -> Verdict | None:
    """What is chosen without a measurement."""
    if rows < FROM_ROWS or not _has_both() or not torch._C._get_mkldnn_enabled():
        return MKL
    if _mode != "measure":
        return _ASKED[_mode]
    return _DETERMINISTIC if torch.are_deterministic_algorithms_enabled() else None


def choose_for_few_rows(rows: int, b: Tensor) -> Verdict:
    """The schedule for ``a @ b.T`` with so few rows that reading b, [n, k] by rows, is all: "aten" or "decode"."""
    if _native.cpu is None or _mode == "mkl" or torch.are_deterministic_algorithms_enabled():
        return MKL
    kind, sizes, _ = _kind(rows, True, b, False)
    return _of_kind(kind, sizes, _by_decode)


def _kind(rows: int, a_by_rows: bool, b: Tensor, b_is_k_by_n: bool) -> tuple[Kind, tuple[int, int, int], bool]:
    """Of a product, with its m, n, k, and whether b is dense."""
    (k, n), (along_k, along_n) = b.shape, b.stride()
    if not b_is_k_by_n:
        k, n, along_k, along_n = n, k, along_n, along_k
    by_rows = along_k == 1
    kind = _kind_of(rows, n, k, a_by_rows, by_rows, b.data_ptr() % _CACHE_LINE == 0)
    return kind, (rows, n, k), along_k + along_n == 1 + (k if by_rows else n)


def _kind_of(rows: int, n: int, k: int, a_by_rows: bool, b_by_rows: bool, is_aligned: bool) -> Kind:
    m, n, k = ((side - 1).bit_length() for side in (rows, n, k))
    return Kind(m, n, k, a_by_rows, b_by_rows, is_aligned, torch.get_num_threads())


def _of_kind(kind: Kind, sizes: tuple[int, int, int], other: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    found = _chosen.get(kind)
    if found is None:
        with _lock:
            found = _chosen.get(kind) or _chosen.setdefault(kind, _measured(kind, sizes, other))
    return found


@functools.cache
def _has_both() -> bool:
    return _native.cpu is not None and bool(_native.cpu.onednn) and torch.backends.mkl.is_available()


_ASKED = {"mkl": Verdict("aten", f"{_VARIABLE}=mkl"), "onednn": Verdict("onednn", f"{_VARIABLE}=onednn")}
_DETERMINISTIC = Verdict("aten", "deterministic algorithms are asked for: torch's own product, nothing is measured")


def _measured(kind: Kind, sizes: tuple[int, int, int], other: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """torch's own product, or another if that wins."""
    m, n, k = _stand_in(*sizes)
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        a = _matrix(m, k, kind.a_by_rows, 0)
        b = _matrix(n, k, kind.b_by_rows, 0 if kind.is_aligned else _CACHE_LINE * 5 // 8)
        (own, others), rounds = _fastest(lambda: torch.mm(a, b.t()), lambda: other(a, b))
    schedule, name = _NAMES[other]
    how = (
        f"in {rounds} products of {m}x{k} and {k}x{n} on {kind.threads} thread{'s' * (kind.threads > 1)}, "
        f"{'aligned' if kind.is_aligned else 'not aligned'}"
    )
    if own > _GAIN * others:
        return Verdict(schedule, f"{name}: {own / others:.2f} times as fast as torch's own {how}")
    return Verdict("aten", f"torch's own product: {name} took {others / own:.2f} times as long {how}")


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.lora_kernels_native.frozen_linear.default(a, b, None, "onednn")


def _by_decode(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.lora_kernels_native.frozen_linear.default(a, b, None, "decode")


_NAMES: dict[Callable[[Tensor, Tensor], Tensor], tuple[str, str]] = {
    _by_onednn: ("onednn", "oneDNN's GEMM"),
    _by_decode: ("decode", "the kernel that reads a weight once"),
}


def _stand_in(m: int, n: int, k: int) -> tuple[int, int, int]:
    """A product of the same kind that takes no longer than a few milliseconds."""
    if m >= FROM_ROWS:
        n, k = min(n, _LONGEST), min(k, _LONGEST)
    else:  # the weight must not fit into a cache that it does not fit into
        n = min(n, max(1, (1 << 22) // max(1, k)))
    return min(m, max(FROM_ROWS, _MOST_MULTIPLICATIONS // max(1, n * k))), n, k


def _matrix(rows: int, columns: int, by_rows: bool, offset: int) -> Tensor:
    """Some [rows, columns], stored by rows or by columns, ``offset`` bytes behind a cache line."""
    memory = torch.linspace(-1.0, 1.0, rows * columns + 2 * _CACHE_LINE // 4)  # draws from nobody's generator
    first = (offset - memory.data_ptr()) % _CACHE_LINE // 4
    data = memory[first : first + rows * columns]
    return data.view(rows, columns) if by_rows else data.view(columns, rows).t()


def _fastest(*products: Callable[[], Tensor]) -> tuple[list[float], int]:
    """Seconds of the fastest call of each, in turn, and how often each was called; the first call is not counted."""
    best = [float("inf")] * len(products)
    rounds, begin = 0, time.perf_counter()
    while rounds <= _ROUNDS or (rounds <= _MOST_ROUNDS and time.perf_counter() - begin < _SECONDS):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product()
            if rounds:
                best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best, rounds - 1
