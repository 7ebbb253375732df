"""CUDA or Triton: where both have a kernel for a call, the choice between them."""

from __future__ import annotations

import torch

from .. import dispatch
from ..reasons import Reason
from ..spec import Verdict
from . import cuda, triton, winners

_MEASURED_TRITON = Verdict(None, Reason.MEASURED_TRITON)
_MEASURED = {
    f"cuda, {schedule}": Verdict(schedule, "measured to be fastest")
    for schedule in ("one launch", "cublas", cuda.WGMMA, cuda.CLUSTERS)
}


def cuda_or_triton(
    x: torch.Tensor, columns: int, depth: int, lora_A: torch.Tensor, has_dropout: bool, *, backward: bool
) -> Verdict:  # fmt: skip
    """The CUDA kernels' verdict on a LoRA linear: no, too, where Triton serves the call and was measured to be faster.

    What was measured (``winners.py``) decides where somebody wants it to, unless a schedule or CUDA was asked for. By
    default CUDA serves: Triton's launcher holds the host for longer than all launches of CUDA do, and a kernel that is
    first launched inside a graph's capture would be compiled there.

    Args:
        x: an activation of M rows.
        columns, depth: N and K in the forward, K and N in the backward.
    """
    rank = lora_A.shape[0]
    verdict = cuda.tensor_core_verdict(x, columns, depth, rank)
    if verdict is not cuda.TENSOR_CORES or dispatch.forced_backend() == "cuda":
        return verdict
    winner = winners.winner(x, columns, depth, lora_A, dropout=has_dropout, backward=backward)
    if winner in _MEASURED:
        return _MEASURED[winner]
    if winner == "triton":
        return verdict if triton.lora_verdict(x, columns, depth, rank).schedule is None else _MEASURED_TRITON
    return verdict
