"""CUDA or Triton: where both have a kernel for a call, the choice between them."""

from __future__ import annotations

import torch

from .. import dispatch
from ..reasons import Reason
from ..spec import Verdict
from . import cuda, triton, winners

FASTER_IN_TRITON = (9, 10)
"""Major compute capabilities on which ``tl.dot`` becomes wgmma or tcgen05, faster than the CUDA kernels' mma.sync."""

COLUMN_MAJOR = Verdict(None, Reason.LAYOUT)
"""Verdict of the CUDA kernels on a weight of transformers' Conv1D, which they would copy on every call."""
_PREFERS_TRITON = Verdict(None, Reason.PREFERS_TRITON)
_MEASURED_TRITON = Verdict(None, Reason.MEASURED_TRITON)
_MEASURED = {f"cuda, {schedule}": Verdict(schedule, "measured to be fastest") for schedule in ("one launch", "cublas")}


def cuda_or_triton(x: torch.Tensor, columns: int, depth: int, rank: int, *, backward: bool) -> Verdict:
    """The CUDA kernels' verdict on a LoRA linear: no, too, where Triton serves the call and is expected to be faster.

    What was measured (``winners.py``) decides where somebody wants it to, unless a schedule was asked for.

    Args:
        x: an activation of M rows.
        columns, depth: N and K in the forward, K and N in the backward.
    """
    verdict = cuda.tensor_core_verdict(x, columns, depth, rank)
    if verdict is cuda.TENSOR_CORES and dispatch.forced_backend() is None:
        winner = winners.winner(x, columns, depth, rank, backward=backward)
        if winner == "triton" and triton.lora_verdict(x, columns, depth, rank).schedule is not None:
            return _MEASURED_TRITON
        if winner in _MEASURED:
            return _MEASURED[winner]
    if verdict.schedule is None or cuda.capability(x.device)[0] not in FASTER_IN_TRITON:
        return verdict
    by_triton = triton.lora_verdict(x, columns, depth, rank)
    if triton.is_preferred(by_triton, x.device, x.numel() // x.shape[-1], columns):
        return _PREFERS_TRITON
    return verdict
