"""What adapters add to a base product that somebody else has made: ``multi_lora_shrink``, ``multi_lora_expand_`` and
both of them, ``multi_lora_branch_``. Arguments are checked here, then dispatched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..ops import multi_lora_branch as _op
from ..plain import FLOATS, INDICES, LOW_PRECISION, refuse_transforms
from ..spec import OpSpec
from .checks import check_adapter_dtype, check_dense, check_range, check_scaling
from .why import explains

_SHRINK, _EXPAND = _op.SHRINK.name, _op.EXPAND.name


class RowOrder(NamedTuple):
    """The rows of each adapter, known once for all layers of a step: ``row_order``."""

    rows: Tensor
    """int32 [rows]: those of the first adapter, then those of the next; what stands behind the last end is not read."""
    ends: Tensor
    """int32 [adapters]: where the rows of each adapter end in ``rows``."""


def row_order(adapter_ids: Tensor, adapters: int) -> RowOrder:
    """Which rows each adapter has.

    Args:
        adapter_ids: int32 or int64 [rows]; numbers that are not from 0 to ``adapters - 1`` are of no adapter.
        adapters: how many there are.

    Returns:
        On the device of ``adapter_ids``, which the host does not look at.
    """
    _check_integers("row_order", "adapter_ids", adapter_ids, adapter_ids.device, adapter_ids.shape[:1])
    return RowOrder(*_op.order_of(adapter_ids, adapters))


def multi_lora_shrink(
    x: Tensor, lora_A: Tensor, adapter_ids: Tensor, *, ranks: Tensor | None = None, order: RowOrder | None = None
) -> Tensor:
    """s = x Aᵀ, each row with the adapter of its id: the first half of a LoRA branch, without a gradient.

    Equivalent to, for each row m with i = adapter_ids[m] and r = ranks[i]::

        s[m, :r] = x[m] @ lora_A[i, :r].T

    and zeros elsewhere. What a pool holds beyond an adapter's rank is not read.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64.
        lora_A: [adapters, rank, in_features], any strides; dtype of x, or float32 over a 16-bit x.
        adapter_ids: int32 or int64, one for each row of x, [rows]; -1 is none. On a GPU nobody looks at the range.
        ranks: int32 or int64 [adapters], how many ranks of the pool each adapter uses; None: all.
        order: of the same ids, from ``row_order``; None: kernels look for the rows where they need them.

    Returns:
        [..., rank], dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit, or asks for a gradient. The message names it.
    """
    return _run(_op.SHRINK, _shrink_arguments(x, lora_A, adapter_ids, ranks=ranks, order=order))


def multi_lora_expand_(
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    order: RowOrder | None = None,
) -> Tensor:
    """y += scaling * s Bᵀ in place, each row with the adapter of its id: the second half, without a gradient.

    Equivalent to, for each row m with i = adapter_ids[m] and r = ranks[i]::

        y[m] += scaling[i] * (s[m, :r] @ lora_B[i, :, :r].T)

    Rows of no adapter keep their bits.

    Args:
        y: [..., out_features]; may be some columns of a wider result, but its rows must lie as a matrix's do.
        s: [..., rank], dtype of y.
        lora_B: [adapters, out_features, rank], any strides; dtype of y, or float32 over a 16-bit y.
        scaling: a number, or a floating-point tensor [adapters] on y's device.
        adapter_ids, ranks, order: as ``multi_lora_shrink``.

    Returns:
        y.

    Raises:
        TypeError, ValueError: an argument does not fit, or asks for a gradient. The message names it.
    """
    _run(_op.EXPAND, _expand_arguments(y, s, lora_B, adapter_ids, scaling=scaling, ranks=ranks, order=order))
    if not is_compiling():
        torch.autograd.graph.increment_version(y)  # autograd, which may have saved y, sees no kernel write
    return y


def multi_lora_branch_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    order: RowOrder | None = None,
) -> Tensor:
    """``multi_lora_shrink``, then ``multi_lora_expand_``: y += scaling * (x Aᵀ) Bᵀ, row by row. Returns y."""
    s = multi_lora_shrink(x, lora_A, adapter_ids, ranks=ranks, order=order)
    return multi_lora_expand_(y, s, lora_B, adapter_ids, scaling=scaling, ranks=ranks, order=order)


@explains(
    _SHRINK, _op.SHRINK, example=lambda zeros: (zeros(512, 576), zeros(8, 16, 576), zeros(512, dtype=torch.int64))
)
def _shrink_arguments(
    x: Tensor, lora_A: Tensor, adapter_ids: Tensor, *, ranks: Tensor | None = None, order: RowOrder | None = None
) -> tuple:
    _check_floats(_SHRINK, x=x, lora_A=lora_A)
    if x.dim() < 1 or lora_A.dim() != 3 or lora_A.shape[2] != x.shape[-1] or min(lora_A.shape[:2]) < 1:
        raise ValueError(
            f"{_SHRINK}: lora_A must be [adapters, rank, in_features] to fit x {tuple(x.shape)}, got shape "
            f"{tuple(lora_A.shape)}"
        )
    check_adapter_dtype(_SHRINK, "x", x.dtype, lora_A)
    _check_who(_SHRINK, x, len(lora_A), lora_A.shape[1], adapter_ids, ranks, order)
    return x, lora_A, adapter_ids, ranks, *(order or (None, None))


@explains(
    _EXPAND,
    _op.EXPAND,
    example=lambda zeros: (zeros(512, 1536), zeros(512, 16), zeros(8, 1536, 16), zeros(512, dtype=torch.int64)),
)
def _expand_arguments(
    y: Tensor, s: Tensor, lora_B: Tensor, adapter_ids: Tensor, *, scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None, order: RowOrder | None = None,
) -> tuple:  # fmt: skip
    _check_floats(_EXPAND, y=y, s=s, lora_B=lora_B)
    if y.dim() < 1 or s.dim() != y.dim() or s.shape[:-1] != y.shape[:-1] or s.dtype != y.dtype:
        raise ValueError(
            f"{_EXPAND}: s must be [..., rank] of y's leading sizes and dtype, {tuple(y.shape[:-1])} and {y.dtype}, "
            f"got {tuple(s.shape)} and {s.dtype}"
        )
    if lora_B.dim() != 3 or lora_B.shape[1:] != (y.shape[-1], s.shape[-1]) or min(len(lora_B), s.shape[-1]) < 1:
        raise ValueError(
            f"{_EXPAND}: lora_B must be [adapters, {y.shape[-1]}, {s.shape[-1]}] to fit y and s, got shape "
            f"{tuple(lora_B.shape)}"
        )
    if lora_B.dtype != y.dtype and not (lora_B.dtype == torch.float32 and y.dtype in LOW_PRECISION):
        raise TypeError(f"{_EXPAND}: lora_B must be {y.dtype} like y (or float32 over a 16-bit y), got {lora_B.dtype}")
    _check_rows_lie_apart(y)
    _check_who(_EXPAND, y, len(lora_B), lora_B.shape[2], adapter_ids, ranks, order)
    scalings = None
    if isinstance(scaling, Tensor):
        if scaling.shape != lora_B.shape[:1] or not scaling.is_floating_point() or scaling.device != y.device:
            raise ValueError(
                f"{_EXPAND}: scaling must be a number, or a floating-point tensor [{len(lora_B)}] on {y.device}, got "
                f"{scaling.dtype} {tuple(scaling.shape)} on {scaling.device}"
            )
        scalings, scaling = scaling, 1.0
    else:
        check_scaling(_EXPAND, scaling)
    return y, s, lora_B, adapter_ids, ranks, scalings, float(scaling), *(order or (None, None))


def _run(spec: OpSpec, args: tuple) -> Any:
    if torch.is_grad_enabled():
        for t in args:
            if isinstance(t, Tensor) and t.requires_grad:
                raise ValueError(
                    f"{spec.name}: has no gradient, and an argument requires grad; call it under torch.no_grad(), or "
                    "multi_lora_linear"
                )
    if is_compiling():
        return getattr(torch.ops.lora_kernels, spec.name).default(*args)
    refuse_transforms(spec.name, args)
    return dispatch.run(spec, *args)


def _check_floats(op: str, **named: Any) -> None:
    """Each is a dense floating-point tensor on the first one's device."""
    device = None
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
        check_dense(op, name, t)
        device = t.device if device is None else device
        if t.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like {next(iter(named))}, got {t.device}")


def _check_rows_lie_apart(y: Tensor) -> None:
    """``ValueError`` unless y, which is written to, is a matrix in memory, and no two of its elements are one."""
    try:
        rows = y.view(-1, y.shape[-1]) if y.numel() else None
    except RuntimeError:
        raise ValueError(f"{_EXPAND}: y's rows must lie as those of a matrix do, got strides {y.stride()}") from None
    if rows is not None and ((len(rows) > 1 and rows.stride(0) < rows.shape[1]) or rows.stride(1) != 1):
        raise ValueError(f"{_EXPAND}: y's rows must be adjacent elements and lie apart, got strides {y.stride()}")


def _check_who(
    op: str, t: Tensor, adapters: int, most: int, adapter_ids: Tensor, ranks: Tensor | None, order: RowOrder | None
) -> None:
    """What says who the rows of t belong to, in pools of ranks up to ``most``."""
    rows = t.shape[:-1].numel()
    _check_integers(op, "adapter_ids", adapter_ids, t.device, (rows,))
    check_range(op, "adapter_ids", adapter_ids, -1, adapters - 1)
    if ranks is not None:
        _check_integers(op, "ranks", ranks, t.device, (adapters,))
        check_range(op, "ranks", ranks, 0, most)
    if order is not None:
        for name, part, size in (("order.rows", order.rows, rows), ("order.ends", order.ends, adapters)):
            _check_integers(op, name, part, t.device, (size,), (torch.int32,))


def _check_integers(
    op: str, name: str, t: Any, device: torch.device, shape: tuple[int, ...], dtypes: tuple = INDICES
) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"{op}: {name} must be {names}, got {t.dtype}")
    if t.shape != shape or t.device != device:
        raise ValueError(f"{op}: {name} must be {list(shape)} on {device}, got {tuple(t.shape)} on {t.device}")
