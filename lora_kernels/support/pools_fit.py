"""``fits.py`` of adapters in pools: what one of them has to be, all are."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fits

_INTEGERS = (torch.int32, torch.int64)


def check_multi_lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None,
    scalings: Tensor | None, bias: Tensor | None, seed: Tensor | None,
) -> None:  # fmt: skip
    """``RuntimeError`` unless the operands of ``multi_lora_linear`` fit together."""
    _check_pools(x, lora_A, lora_B, adapter_ids, ranks, scalings)
    fits.check_lora_linear(x, weight, lora_A[0], lora_B[0], bias, seed)


def check_multi_lora_linear_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor,
    ranks: Tensor | None, scalings: Tensor | None, seed: Tensor | None,
) -> None:  # fmt: skip
    """``RuntimeError`` unless the operands of ``multi_lora_linear_backward`` fit together."""
    _check_pools(x, lora_A, lora_B, adapter_ids, ranks, scalings)
    fits.check_lora_linear_backward(grad_y, x, s, weight, lora_A[0], lora_B[0], seed)


def _check_pools(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None, scalings: Tensor | None
) -> None:
    adapters = lora_A.shape[0] if lora_A.dim() == 3 else 0
    problems = {
        "x must be [..., k]": x.dim() == 0,
        "lora_A must be [adapters, rank, k], with at least one adapter": adapters == 0,
        "lora_B must be [adapters, n, rank]": lora_B.dim() != 3 or lora_B.shape[0] != adapters,
        "adapter_ids must be one integer for each row of x": (
            adapter_ids.shape != (x.shape[:-1].numel(),) or adapter_ids.dtype not in _INTEGERS
        ),
        "ranks must be one integer for each adapter": (
            ranks is not None and (ranks.shape != (adapters,) or ranks.dtype not in _INTEGERS)
        ),
        "scalings must be one number for each adapter": scalings is not None and scalings.shape != (adapters,),
    }
    named = {"adapter_ids": adapter_ids, "ranks": ranks, "scalings": scalings}
    problems |= {f"{name} must be on x's device": t is not None and t.device != x.device for name, t in named.items()}
    for message, is_one in problems.items():
        if is_one:
            raise RuntimeError(message)
