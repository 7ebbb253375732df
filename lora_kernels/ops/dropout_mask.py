"""``dropout_mask``: the keep mask that the kernels regenerate in registers, as a tensor, for tests and debugging."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch, philox
from ..spec import Kernel, OpSpec, Verdict
from ..support import cuda, fits, triton

_PHILOX = Verdict("philox", "one Philox call per 8 elements")


def _reference(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    return philox.keep_mask(seed, rows, columns, p)


def _cuda_supports(seed: torch.Tensor, rows: int, columns: int, p: float) -> Verdict:
    return cuda.refusal(seed.device) or _PHILOX


def _triton_supports(seed: torch.Tensor, rows: int, columns: int, p: float) -> Verdict:
    return triton.refusal(seed.device) or _PHILOX


def _triton_run(schedule: str, *args: Any) -> torch.Tensor:
    fits.check_seed(args[0])
    from ..triton_kernels import dropout_mask

    return dropout_mask.dropout_mask(*args)


def _fake(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    return seed.new_empty((rows, columns), dtype=torch.bool)


SPEC = dispatch.register(
    OpSpec(
        name="dropout_mask",
        schema="(Tensor seed, SymInt rows, SymInt columns, float p) -> Tensor",
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(lambda *_: _PHILOX),
        },
        flops=lambda seed, rows, columns, p: 0,
        bytes=lambda seed, rows, columns, p: rows * columns,
    )
)
