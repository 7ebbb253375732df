"""The branch of ``multi_lora_linear`` in its two halves: ``multi_lora_shrink`` and, in place, ``multi_lora_expand_``.

A serving engine has made the base product by itself (quantised, or a shard of it) and asks for what adapters add to it:
s = x Aᵀ [rows, rank], and y += scaling * s Bᵀ, each row with the adapter of its id, or none. Some reduce s over devices
in between. Nothing here has a gradient.

Rows may be given in order of their adapters, as a step of an engine knows it once for all layers: ``order`` holds the
rows of each adapter, one adapter behind the other, and ``ends`` where those of each end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..spec import Kernel, OpSpec, Verdict
from ..support import cpu, cuda, pools_fit, triton
from .eager import as_rows
from .multi_lora_linear import slots

_PANELS = Verdict("panels", "rows that share an adapter, a thread for each panel of them")


def _cpu_supports(t: Tensor, *_: Any) -> Verdict:
    return cpu.REFUSED_DTYPE if t.dtype == torch.float64 else _PANELS  # the branch is computed in fp32


# ----------------------------------------------------------------------------------------------------- shrink


def _reference_shrink(
    x: Tensor, lora_A: Tensor, adapter_ids: Tensor, ranks: Tensor | None, order: Tensor | None, ends: Tensor | None
) -> Tensor:
    rows_of_x = as_rows(x)
    s = x.new_zeros((len(rows_of_x), lora_A.shape[1]))
    for slot, rank, rows in slots("multi_lora_shrink", adapter_ids, ranks, lora_A):
        s[rows, :rank] = rows_of_x[rows] @ lora_A[slot, :rank].to(x.dtype).t()
    return s.view(*x.shape[:-1], lora_A.shape[1])


def _fake_shrink(x: Tensor, lora_A: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], lora_A.shape[1]))


def _cuda_supports_shrink(x: Tensor, lora_A: Tensor, *_: Any) -> Verdict:
    return cuda.branch_verdict(x, lora_A.shape[0], lora_A.shape[1], in_place=False)


def _triton_supports_shrink(x: Tensor, lora_A: Tensor, *_: Any) -> Verdict:
    adapters, rank, k = lora_A.shape
    return triton.branch_verdict(x, rank, k, adapters, 1)


def _triton_run_shrink(schedule: str, *args: Any) -> Tensor:
    pools_fit.check_multi_lora_shrink(*args)
    from ..triton_kernels import multi_lora_branch

    return multi_lora_branch.shrink(schedule, *args)


def _flops_shrink(x: Tensor, lora_A: Tensor, *_: Any) -> int:
    """As if every row had an adapter of the largest rank."""
    return 2 * x.numel() * lora_A.shape[1]


def _bytes_shrink(x: Tensor, lora_A: Tensor, *_: Any) -> int:
    """As if every row had an adapter of the largest rank, and of its own where there are enough of them."""
    rows, (adapters, rank, k) = x.shape[:-1].numel(), lora_A.shape
    return (x.numel() + rows * rank) * x.element_size() + min(rows, adapters) * rank * k * lora_A.element_size()


SHRINK = dispatch.register(
    OpSpec(
        name="multi_lora_shrink",
        schema=("(Tensor x, Tensor lora_A, Tensor adapter_ids, Tensor? ranks, Tensor? order, Tensor? ends) -> Tensor"),
        reference=_reference_shrink,
        fake=_fake_shrink,
        kernels={
            "cuda": Kernel(_cuda_supports_shrink),
            "triton": Kernel(_triton_supports_shrink, _triton_run_shrink),
            "cpu": Kernel(_cpu_supports),
        },
        flops=_flops_shrink,
        bytes=_bytes_shrink,
    )
)

# ----------------------------------------------------------------------------------------------------- expand


def _reference_expand(
    y: Tensor, s: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None, scalings: Tensor | None,
    scaling: float, order: Tensor | None, ends: Tensor | None,
) -> None:  # fmt: skip
    rows_of_y, rows_of_s = y.view(-1, y.shape[-1]), as_rows(s)
    for slot, rank, rows in slots("multi_lora_expand_", adapter_ids, ranks, lora_B.mT):
        update = rows_of_s[rows, :rank] @ lora_B[slot, :, :rank].to(s.dtype).t()
        factor = scaling if scalings is None else scalings[slot] * scaling
        rows_of_y.index_add_(0, rows, (update * factor).to(y.dtype))


def _fake_expand(*_: Any) -> None:
    return None


def _cuda_supports_expand(y: Tensor, s: Tensor, lora_B: Tensor, *_: Any) -> Verdict:
    return cuda.branch_verdict(y, lora_B.shape[0], lora_B.shape[2], in_place=True)


def _triton_supports_expand(y: Tensor, s: Tensor, lora_B: Tensor, *_: Any) -> Verdict:
    adapters, n, rank = lora_B.shape
    return triton.branch_verdict(y, n, rank, adapters, rank)


def _triton_run_expand(schedule: str, *args: Any) -> None:
    pools_fit.check_multi_lora_expand(*args)
    from ..triton_kernels import multi_lora_branch

    multi_lora_branch.expand(schedule, *args)


def _flops_expand(y: Tensor, s: Tensor, *_: Any) -> int:
    """As if every row had an adapter of the largest rank."""
    return 2 * y.numel() * s.shape[-1]


def _bytes_expand(y: Tensor, s: Tensor, lora_B: Tensor, *_: Any) -> int:
    """y is read and written; otherwise as ``multi_lora_shrink``."""
    rows, (adapters, n, rank) = y.shape[:-1].numel(), lora_B.shape
    return (2 * y.numel() + s.numel()) * y.element_size() + min(rows, adapters) * n * rank * lora_B.element_size()


EXPAND = dispatch.register(
    OpSpec(
        name="multi_lora_expand_",
        schema=(
            "(Tensor(a!) y, Tensor s, Tensor lora_B, Tensor adapter_ids, Tensor? ranks, Tensor? scalings, "
            "float scaling, Tensor? order, Tensor? ends) -> ()"
        ),
        reference=_reference_expand,
        fake=_fake_expand,
        kernels={
            "cuda": Kernel(_cuda_supports_expand),
            "triton": Kernel(_triton_supports_expand, _triton_run_expand),
            "cpu": Kernel(_cpu_supports),
        },
        flops=_flops_expand,
        bytes=_bytes_expand,
    )
)


def order_of(adapter_ids: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """``order`` int32 [rows] and ``ends`` int32 [adapters] of ``adapter_ids`` [rows], on their device.

    Rows of one adapter keep their order. Those of none come last, behind the last end. No number is read on the host.
    """
    keys = torch.where((adapter_ids < 0) | (adapter_ids >= adapters), adapters, adapter_ids)
    sorted_keys, order = torch.sort(keys, stable=True)
    each = torch.arange(adapters, device=keys.device, dtype=keys.dtype)
    return order.to(torch.int32), torch.searchsorted(sorted_keys, each, right=True, out_int32=True)
