"""``fits.py`` of adapters in pools: what one of them has to be, all are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plain import INDICES
from . import fits


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


def check_multi_lora_shrink(
    x: Tensor, lora_A: Tensor, adapter_ids: Tensor, ranks: Tensor | None, order: Tensor | None, ends: Tensor | None
) -> None:
    """``RuntimeError`` unless the operands of ``multi_lora_shrink`` fit together."""
    _check_half("x", x, "lora_A", lora_A, 2, adapter_ids, ranks, None, order, ends)


def check_multi_lora_expand(
    y: Tensor, s: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None, scalings: Tensor | None,
    scaling: float, order: Tensor | None, ends: Tensor | None,
) -> None:  # fmt: skip
    """``RuntimeError`` unless the operands of ``multi_lora_expand_`` fit together."""
    _check_half("y", y, "lora_B", lora_B, 1, adapter_ids, ranks, scalings, order, ends)
    if s.dim() != y.dim() or s.shape != (*y.shape[:-1], lora_B.shape[2]) or s.dtype != y.dtype or s.device != y.device:
        raise RuntimeError("s must be [..., rank], of y's leading sizes, dtype and device")


def _check_half(
    name: str, t: Tensor, pool_name: str, pool: Tensor, wide: int, adapter_ids: Tensor, ranks: Tensor | None,
    scalings: Tensor | None, order: Tensor | None, ends: Tensor | None,
) -> None:  # fmt: skip
    """t [..., size] and the pool of which dimension ``wide`` has that size."""
    if t.dim() == 0 or pool.dim() != 3 or len(pool) == 0 or pool.shape[wide] != t.shape[-1] or pool.shape[3 - wide] < 1:
        raise RuntimeError(f"{name} must be [..., size] and {pool_name} a pool of that size, with adapters and ranks")
    _check_integers_of(t, name, len(pool), adapter_ids, ranks, scalings)
    if pool.device != t.device:
        raise RuntimeError(f"{pool_name} must be on {name}'s device")
    for part, given, size in (("order", order, t.shape[:-1].numel()), ("ends", ends, len(pool))):
        if given is not None and (given.shape != (size,) or given.dtype != torch.int32 or given.device != t.device):
            raise RuntimeError(f"{part} must be int32 [{size}], on {name}'s device")


def _check_pools(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None, scalings: Tensor | None
) -> None:
    adapters = lora_A.shape[0] if lora_A.dim() == 3 else 0
    problems = {
        "x must be [..., k]": x.dim() == 0,
        "lora_A must be [adapters, rank, k], with at least one adapter": adapters == 0,
        "lora_B must be [adapters, n, rank]": lora_B.dim() != 3 or lora_B.shape[0] != adapters,
    }
    _raise_first(problems)
    _check_integers_of(x, "x", adapters, adapter_ids, ranks, scalings)


def _check_integers_of(
    x: Tensor, name: str, adapters: int, adapter_ids: Tensor, ranks: Tensor | None, scalings: Tensor | None
) -> None:
    problems = {
        f"adapter_ids must be one integer for each row of {name}": (
            adapter_ids.shape != (x.shape[:-1].numel(),) or adapter_ids.dtype not in INDICES
        ),
        "ranks must be one integer for each adapter": (
            ranks is not None and (ranks.shape != (adapters,) or ranks.dtype not in INDICES)
        ),
        "scalings must be one number for each adapter": scalings is not None and scalings.shape != (adapters,),
    }
    named = {"adapter_ids": adapter_ids, "ranks": ranks, "scalings": scalings}
    problems |= {
        f"{key} must be on {name}'s device": t is not None and t.device != x.device for key, t in named.items()
    }
    _raise_first(problems)


def _raise_first(problems: dict[str, bool]) -> None:
    for message, is_one in problems.items():
        if is_one:
            raise RuntimeError(message)
