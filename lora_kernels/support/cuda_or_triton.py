"""CUDA or Triton: where both have a kernel for a call, the choice between them."""

from __future__ import annotations

import torch

from ..reasons import Reason
from ..spec import Verdict
from . import cuda, triton

FASTER_IN_TRITON = (9, 10)
"""Major compute capabilities on which ``tl.dot`` becomes wgmma or tcgen05, faster than the CUDA kernels' mma.sync."""

COLUMN_MAJOR = Verdict(None, Reason.LAYOUT)
"""Verdict of the CUDA kernels on a weight of transformers' Conv1D, which they would copy on every call."""
_PREFERS_TRITON = Verdict(None, Reason.PREFERS_TRITON)


def cuda_or_triton(x: torch.Tensor, columns: int, depth: int, rank: int) -> Verdict:
    """The CUDA kernels' verdict on a LoRA linear: no, too, where Triton serves the call and is expected to be faster.

    Args:
        x: an activation of M rows.
        columns, depth: N and K in the forward, K and N in the backward.
    """
    verdict = cuda.tensor_core_verdict(x, columns, depth, rank)
    if verdict.schedule is None or cuda.capability(x.device)[0] not in FASTER_IN_TRITON:
        return verdict
    by_triton = triton.lora_verdict(x, columns, depth, rank)
    if triton.is_preferred(by_triton, x.device, x.numel() // x.shape[-1], columns):
        return _PREFERS_TRITON
    return verdict
