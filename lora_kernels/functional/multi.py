"""``multi_lora_linear``: arguments are checked here, then dispatched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..ops import eager
from ..ops import multi_lora_linear as _op
from ..ops.multi_lora_linear import MultiLoRALinearFunction
from ..plain import INDICES
from .checks import check_adapter_dtype, check_base, check_branch, check_dense, check_range, types_fit
from .why import Zeros, explains

_NAME = "multi_lora_linear"


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``lora_linear`` with many adapters over one base: each row, or each sample, has its own, or none (as in Punica,
    Chen et al., MLSys 2024).

    Equivalent to, for each row m with i = adapter_ids[m] and r = ranks[i]::

        y[m] = lora_linear(x[m], weight, lora_A[i, :r], lora_B[i, :, :r], bias, scaling=scaling[i], ...)

    and the frozen layer alone where i is -1, with one dropout mask over all of x. The base is one product over all
    rows; nothing is formed per adapter that it does not use, and kernels on a GPU look up ids and ranks without the
    host. By every kernel, a row's result is the same bits whichever adapters other rows have, on a CPU those of
    ``frozen_linear`` where it has none; everywhere an adapter that holds NaN spoils its own rows alone. An adapter
    without rows gets a gradient of zeros. For backward x, s = dropout(x) Aᵀ [rows, rank] and the seed are saved.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64. Any strides.
        weight: [out_features, in_features], dtype of x.
        lora_A: [adapters, rank, in_features], dtype of x, or float32 over a bfloat16/float16 x.
        lora_B: [adapters, out_features, rank], dtype of lora_A.
        adapter_ids: int32 or int64, on x's device: one for each row, of x's leading sizes, or one for each sample, as
            many as x's first size. -1 is the base alone. On a GPU nobody looks whether an id is in range: one that is
            not must not be given.
        bias: [out_features], dtype of x.
        scaling: factor of the updates: a number, or a floating-point tensor [adapters] on x's device.
        ranks: int32 or int64 [adapters] on x's device, how many ranks of the pools each adapter uses; None: all.
        dropout_p, training, seed: as ``lora_linear``; the mask is the one of ``dropout_mask(rows, in_features)``.

    Returns:
        [..., out_features], dtype of x.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has a dtype that does not fit.
        ValueError: shapes, devices, ids, ranks or numbers do not fit. The message names the argument.
    """
    try:
        args = _arguments(x, weight, lora_A, lora_B, adapter_ids, bias, scaling, ranks, dropout_p, training, seed)
        return eager.call(_op.SPEC, MultiLoRALinearFunction, args)
    except RuntimeError:  # asking every call for its layouts and numbers is felt in a small layer
        for name, t in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
            check_dense(_NAME, name, t)
        check_range(_NAME, "adapter_ids", adapter_ids, -1, lora_A.shape[0] - 1)
        check_range(_NAME, "ranks", ranks, 0, lora_A.shape[1])
        raise


def multi_lora_linear_apart(
    x: Tensor, weight: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], scalings: list[float | Tensor],
    adapter_ids: Tensor, bias: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """``multi_lora_linear`` of adapters of any ranks that lie each by itself, without gradients, on a CPU; for a layer
    that has looked at types, dtypes and sizes. None where pools have to be made.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *lora_A, *lora_B)):
        return None
    if (
        not x.is_cpu
        or is_compiling()
        or dispatch.any_autocast()
        or not all(type(scaling) is float for scaling in scalings)
    ):
        return None
    return dispatch.run(_op.APART, x, weight, lora_A, lora_B, _ids_of_rows(x, adapter_ids), bias, scalings)


def _example(zeros: Zeros) -> tuple:
    return zeros(512, 576), zeros(1536, 576), zeros(8, 16, 576), zeros(8, 1536, 16), zeros(512, dtype=torch.int64)


@explains(_NAME, _op.SPEC, example=_example)
def arguments(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, bias: Tensor | None = None, *,
    scaling: float | Tensor = 1.0, ranks: Tensor | None = None, dropout_p: float = 0.0, training: bool = False,
    seed: int | Tensor | None = None,
) -> tuple:  # fmt: skip
    """The op's positional arguments from those of ``multi_lora_linear``, checked; no seed is drawn."""
    seed = 0 if seed is None else seed
    return _arguments(x, weight, lora_A, lora_B, adapter_ids, bias, scaling, ranks, dropout_p, training, seed)


def _arguments(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, bias: Tensor | None,
    scaling: float | Tensor, ranks: Tensor | None, dropout_p: float, training: bool, seed: int | Tensor | None,
) -> tuple:  # fmt: skip
    if not (types_fit(x, weight, lora_A, lora_B, bias) and _sizes_fit(x, weight, lora_A, lora_B, bias)):
        check_base(_NAME, x, weight, bias)
        _check_pools(x, weight, lora_A, lora_B)
    adapters = lora_A.shape[0]
    ids = _ids_of_rows(x, adapter_ids)
    if ranks is not None:
        _check_integers("ranks", ranks, x.device)
        if ranks.shape != (adapters,):
            raise ValueError(f"{_NAME}: ranks must be [{adapters}] to fit lora_A, got shape {tuple(ranks.shape)}")
    scalings = None
    if isinstance(scaling, Tensor):
        lora_B, scalings = _scalings(scaling, lora_B)
        scaling = 1.0
    if type(scaling) is float and -math.inf < scaling < math.inf and type(dropout_p) is float and dropout_p == 0.0:
        return x, weight, lora_A, lora_B, ids, ranks, scalings, bias, None, scaling, 0.0
    lora_B, bias, seed, scaling, dropout_p = check_branch(_NAME, x, lora_B, bias, scaling, dropout_p, training, seed)
    return x, weight, lora_A, lora_B, ids, ranks, scalings, bias, seed, scaling, dropout_p


def _sizes_fit(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> bool:
    """Whether a glance shows that the sizes and devices pass the checks below."""
    if x.dim() < 1 or weight.dim() != 2 or lora_A.dim() != 3 or lora_B.dim() != 3:
        return False
    (n, k), (adapters, rank, _) = weight.shape, lora_A.shape
    if lora_A.shape != (adapters, rank, k) or lora_B.shape != (adapters, n, rank) or min(adapters, rank) < 1:
        return False
    if x.shape[-1] != k or (bias is not None and bias.shape != (n,)):
        return False
    return all(t is None or t.is_cpu for t in (x, weight, lora_A, lora_B, bias))


def _check_pools(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{_NAME}: {name} must be floating point, got {t.dtype}")
        check_dense(_NAME, name, t)
        if t.device != x.device:
            raise ValueError(f"{_NAME}: {name} must be on {x.device} like x, got {t.device}")
    n, k = weight.shape
    if lora_A.dim() != 3 or lora_A.shape[2] != k or min(lora_A.shape[:2]) < 1:
        raise ValueError(
            f"{_NAME}: lora_A must be [adapters, rank, {k}] with at least one adapter and rank >= 1, got shape "
            f"{tuple(lora_A.shape)}"
        )
    adapters, rank, _ = lora_A.shape
    if lora_B.shape != (adapters, n, rank):
        raise ValueError(
            f"{_NAME}: lora_B must be [{adapters}, {n}, {rank}] to fit weight and lora_A, got shape "
            f"{tuple(lora_B.shape)}"
        )
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{_NAME}: lora_B must be {lora_A.dtype} like lora_A, got {lora_B.dtype}")
    if not dispatch.autocast_enabled(x.device.type):
        check_adapter_dtype(_NAME, "x", x.dtype, lora_A)


def _check_integers(name: str, t: Any, device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in INDICES:
        raise TypeError(f"{_NAME}: {name} must be int32 or int64, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{_NAME}: {name} must be on {device} like x, got {t.device}")


def _ids_of_rows(x: Tensor, adapter_ids: Tensor) -> Tensor:
    """One id for each row of x."""
    _check_integers("adapter_ids", adapter_ids, x.device)
    lead, given = x.shape[:-1], adapter_ids.shape
    if len(lead) == 2 and lead[1] == 1 and given == lead[:1]:
        return adapter_ids
    if given == lead:
        return adapter_ids.reshape(lead.numel()) if len(lead) != 1 else adapter_ids
    if len(lead) > 1 and given == lead[:1]:
        return adapter_ids.unsqueeze(1).expand(lead[0], lead[1:].numel()).reshape(lead.numel())
    raise ValueError(
        f"{_NAME}: adapter_ids must be one for each row, {tuple(lead)}, or for each sample, {tuple(lead[:1])}, got "
        f"shape {tuple(given)}"
    )


def _scalings(scaling: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor | None]:
    """lora_B and a factor per adapter; one that trains is multiplied into lora_B instead."""
    adapters = len(lora_B)
    if scaling.shape not in ((), (1,), (adapters,)) or not scaling.is_floating_point():
        raise ValueError(
            f"{_NAME}: scaling must be a number, or a floating-point tensor of one element or [{adapters}], got "
            f"{scaling.dtype} {tuple(scaling.shape)}"
        )
    if scaling.device != lora_B.device:
        raise ValueError(f"{_NAME}: scaling must be on {lora_B.device} like x, got {scaling.device}")
    if scaling.requires_grad and torch.is_grad_enabled():
        return lora_B * scaling.to(lora_B.dtype).reshape(-1, 1, 1), None
    return lora_B, scaling.expand(adapters)
