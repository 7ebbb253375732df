"""CUDA or Triton: where both have a kernel for a call, the choice between them."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..reasons import Reason
from ..spec import Verdict
from ..triton_kernels import configs
from . import cuda, triton, winners

MIN_TILES_PER_SM = 3
MAX_RANK = 128
"""Where Triton's kernel was faster on an H200, see ``is_faster_in_triton``."""

_PREFERS_TRITON = Verdict(None, Reason.PREFERS_TRITON)
_MEASURED_TRITON = Verdict(None, Reason.MEASURED_TRITON)
_MEASURED = {f"cuda, {schedule}": Verdict(schedule, "measured to be fastest") for schedule in ("one launch", "cublas")}


def cuda_or_triton(
    x: torch.Tensor, columns: int, depth: int, rank: int, has_dropout: bool, *, backward: bool
) -> Verdict:  # fmt: skip
    """The CUDA kernels' verdict on a LoRA linear: no, too, where Triton serves the call and is expected to be faster.

    What was measured (``winners.py``) decides where somebody wants it to, unless a schedule or CUDA was asked for.

    Args:
        x: an activation of M rows.
        columns, depth: N and K in the forward, K and N in the backward.
    """
    verdict = cuda.tensor_core_verdict(x, columns, depth, rank)
    if verdict is not cuda.TENSOR_CORES or dispatch.forced_backend() == "cuda":
        return verdict
    winner = winners.winner(x, columns, depth, rank, dropout=has_dropout, backward=backward)
    if winner in _MEASURED:
        return _MEASURED[winner]
    if winner == "triton":
        return verdict if triton.lora_verdict(x, columns, depth, rank).schedule is None else _MEASURED_TRITON
    if not is_faster_in_triton(x, columns, depth, rank, has_dropout):
        return verdict
    return verdict if triton.lora_verdict(x, columns, depth, rank).schedule is None else _PREFERS_TRITON


def is_faster_in_triton(x: torch.Tensor, columns: int, depth: int, rank: int, has_dropout: bool) -> bool:
    """Whether one launch of Triton's wgmma takes less time than three of the schedule "cublas": in a CUDA graph.

    Outside of one Triton's launcher holds the host for a third of a millisecond, as long as such a kernel runs.
    On an H200, in units of the frozen product, at 4096 to 16384 rows and widths of 2048 to 14336, without dropout:
    forward 1.05 to 1.26, "cublas" 1.10 to 1.44, stock PEFT 1.14 to 1.77; backward 1.10 to 1.49, 1.21 to 1.64, 1.26 to
    1.98. Under dropout, or with fewer tiles per SM, "cublas" is the faster of the two.
    """
    if cuda.capability(x.device)[0] != 9 or has_dropout or rank > MAX_RANK or x.dtype == torch.float32:
        return False
    if columns % 16 != 0 or depth % 16 != 0:
        return False
    gpu: Any = triton.device_of(x.device)
    tile = configs.TARGETS[gpu.target].large
    tiles = configs.blocks(x.numel() // x.shape[-1], tile.rows) * configs.blocks(columns, tile.columns)
    return tiles >= MIN_TILES_PER_SM * gpu.sms and torch.cuda.is_current_stream_capturing()
