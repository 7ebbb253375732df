"""``dropout_mask``: the keep mask that the kernels regenerate in registers, as a tensor, for tests and debugging."""

from __future__ import annotations

import torch

from .. import dispatch, philox
from ..spec import Kernel, OpSpec, Verdict

_PHILOX = Verdict("philox", "one Philox call per 8 elements")


def _reference(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    return philox.keep_mask(seed, rows, columns, p)


def _fake(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    return seed.new_empty((rows, columns), dtype=torch.bool)


SPEC = dispatch.register(
    OpSpec(
        name="dropout_mask",
        schema="(Tensor seed, SymInt rows, SymInt columns, float p) -> Tensor",
        reference=_reference,
        fake=_fake,
        kernels={"cpu": Kernel(lambda *_: _PHILOX), "cuda": Kernel(lambda *_: _PHILOX)},
        flops=lambda seed, rows, columns, p: 0,
        bytes=lambda seed, rows, columns, p: rows * columns,
    )
)
