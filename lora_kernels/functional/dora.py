"""DoRA (Liu et al., ICML 2024): a LoRA layer whose rows have the norms that a magnitude says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..formats import QuantizedWeight
from ..ops import lora_linear as _op
from ..ops.eager import as_rows
from .branches import add_rows
from .checks import check_adapter, check_base, check_magnitude, check_probability
from .embedding import lora_embedding
from .lora import arguments as lora_arguments
from .lora import frozen_linear, lora_linear
from .packed import as_layer_gives, of_layer
from .why import explains


def dora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A linear layer under weight-decomposed low-rank adaptation (DoRA, Liu et al., ICML 2024).

    Equivalent to::

        V = weight + scaling * lora_B @ lora_A
        F.linear(x, V * (magnitude / V.norm(dim=1).detach())[:, None], bias)

    without forming V: the low-rank update runs in ``lora_linear``, and the norm is a sum of three terms of which the
    largest temporary is [out_features, rank].

    Under dropout it is, as in PEFT, what only V adds to the frozen layer that sees the dropped x::

        d = F.dropout(x, dropout_p, training)
        F.linear(x, weight, bias) + F.linear(d, V * (magnitude / V.norm(dim=1).detach())[:, None] - weight)

    Two products with the weight are then needed: every column of d's has a factor of its own, and the magnitude's
    gradient is made of them.

    Args:
        x, weight, lora_A, lora_B, bias, scaling: as in ``lora_linear``.
        magnitude: [out_features], floating point.
        dropout_p, training: as in ``lora_linear``, but the mask is ``F.dropout``'s.

    Returns:
        [..., out_features], dtype of x. The norm takes no part in the gradient, as in the paper's section 4.3.
        ``lk.stats()`` and ``lk.why`` count and name the ``lora_linear`` inside; under dropout, ``lk.stats()`` counts
        two ``frozen_linear``.

    Raises:
        TypeError, ValueError: as ``lora_linear``.
    """
    op = "dora_linear"
    check_base(op, x, weight, bias)
    check_magnitude(op, magnitude, weight)
    check_probability(op, "dropout_p", dropout_p)
    factor = magnitude / norm(weight, lora_A, lora_B, scaling)
    # With factor 1 and lora_B 0, as at the start, both forms have the bits of the linear layer.
    if not training or dropout_p == 0.0:
        y = lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling)
        return scale_columns(y, factor, None if bias is None else bias * (1 - factor))
    check_adapter(op, weight, lora_A, lora_B)
    is_packed, bias_trains = isinstance(weight, QuantizedWeight), bias is not None and bias.requires_grad
    linear: Callable[..., Tensor] = frozen_linear
    if not is_packed and (weight.requires_grad or bias_trains):
        linear = F.linear
    dropped = F.dropout(x, dropout_p, True)
    outside = bias if is_packed and bias_trains else None  # a packed product has no gradient of its bias
    base = linear(x, weight, None if outside is not None else bias)
    y = scale_columns(linear(dropped, weight), factor - 1, base if outside is None else base + outside)
    return add_rows(y, F.linear(dropped.to(y.dtype), lora_A.to(y.dtype)), lora_B * factor[:, None], scaling)


def dora_linear_of_layer(
    x: Tensor, weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor,
    bias: Tensor | None, scaling: float | Tensor, dropout_p: float, training: bool,
) -> Tensor:  # fmt: skip
    """``dora_linear`` for a layer that has looked at its operands; ``lora_linear_of_layer`` says what a quantised one
    multiplies in.
    """
    inner = x
    if isinstance(weight, QuantizedWeight):
        inner, bias = of_layer(x, weight, bias)
    y = dora_linear(
        inner, weight, lora_A, lora_B, magnitude, bias, scaling=scaling, dropout_p=dropout_p, training=training
    )
    return as_layer_gives(y, x, weight) if isinstance(weight, QuantizedWeight) else y


@explains(
    "dora_linear",
    _op.SPEC,
    example=lambda zeros: (zeros(512, 576), zeros(1536, 576), zeros(16, 576), zeros(1536, 16), zeros(1536)),
)
def _bind(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None = None,
    bias: Tensor | None = None, *, scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False,
) -> tuple:  # fmt: skip
    """DoRA counts as the ``lora_linear`` inside it."""
    return lora_arguments(x, weight, lora_A, lora_B, scaling=scaling)


def dora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding under DoRA: every feature of ``lora_embedding``'s table has the norm that ``magnitude`` says.

    Equivalent to::

        V = weight + scaling * (lora_B @ lora_A).T
        F.embedding(ids, V * magnitude / V.norm(dim=0).detach(), padding_idx)

    Args:
        ids, weight, lora_A, lora_B, scaling, padding_idx: as in ``lora_embedding``.
        magnitude: [features], floating point.

    Returns:
        [*ids.shape, features], dtype of weight. ``lk.stats()`` counts the ``lora_embedding`` inside.

    Raises:
        TypeError, ValueError, IndexError: as ``lora_embedding``.
    """
    z = lora_embedding(ids, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)
    check_magnitude("dora_embedding", magnitude, weight.t())
    return scale_columns(z, magnitude / norm(weight.t(), lora_A, lora_B, scaling), None)


@torch.no_grad()
def norm(weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``(weight + scaling * lora_B @ lora_A).norm(dim=1)``, without that matrix.

    Row by row the root of ``||W||^2 + 2 s (W A^T, B) + s^2 (B A A^T, B)``, formed in float32 at least. Where W and its
    update nearly cancel, so do the terms, and the result has fewer digits than W. Where the update is zero, as at the
    start, the result has the bits of ``weight.norm(dim=1)``, from which PEFT's magnitude is initialised: their quotient
    is exactly 1.

    Args:
        weight: [out_features, in_features]. lora_A: [rank, in_features]. lora_B: [out_features, rank].

    Returns:
        [out_features], in the wider of the dtypes of weight and lora_B, as PEFT has it.
    """
    if dispatch.autocast_enabled(weight.device.type):  # the norm is float32 under autocast, too
        with torch.autocast(weight.device.type, enabled=False):
            return _norm(weight, lora_A, lora_B, scaling)
    return _norm(weight, lora_A, lora_B, scaling)


def _norm(weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    dtype = weight.decoded_dtype if isinstance(weight, QuantizedWeight) else weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide) * scaling
    # Taken anew in each call: a write through weight.data, which merging and many loaders make, leaves no trace.
    of_weight, WA = _norms_and_products(weight, A.t(), wide)
    update = ((2 * WA + B @ (A @ A.t())) * B).sum(1)
    # The root of a square is not always the number itself.
    total = torch.where(update == 0, of_weight, (of_weight.square() + update).clamp_min_(0).sqrt_())
    return total.to(torch.promote_types(dtype, lora_B.dtype))


def _norms_and_products(weight: Tensor | QuantizedWeight, At: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """``weight.norm(dim=1)`` [N] and ``weight @ At`` [N, rank]."""
    if isinstance(weight, QuantizedWeight):
        norms, products = [], []
        for block in weight.split(max(1, _BLOCK // max(1, weight.shape[1]))):
            rows = block.dequantize()
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=wide))
            products.append(rows.to(wide) @ At)
        return torch.cat(norms), torch.cat(products)
    product = torch.cat([rows.to(wide) @ At for rows in _blocks(weight, wide)])
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide), product


_BLOCK = 1 << 20
"""Elements of a 16-bit matrix that are held in float32 at a time."""


def _blocks(matrix: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of a matrix: all, or as many as may be copied to a wider dtype at a time."""
    return (matrix,) if matrix.dtype == wide else matrix.split(max(1, _BLOCK // max(1, matrix.shape[1])))


def scale_columns(z: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
    """``z * factor + addend`` in z's dtype, rounded once. Differentiable in all three.

    Args:
        z: [..., N]. factor: [N], z's dtype or a wider one. addend: a bias [N], something of z's shape, or None.
    """
    if torch.compiler.is_compiling():  # the compiler fuses these, and needs no help to keep only z
        y = z * factor
        return (y if addend is None else y + addend).to(z.dtype)
    return _ScaleColumns.apply(z, factor, addend)


class _ScaleColumns(torch.autograd.Function):
    """One pass and no temporary, where ``z * factor + addend`` over a 16-bit z makes two in float32. Saves z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z, factor)
        if addend is not None:
            ctx.addend_dtype, ctx.is_bias = addend.dtype, addend.shape != z.shape
        y = torch.empty_like(z)
        return torch.mul(z, factor, out=y) if addend is None else torch.addcmul(addend, z, factor, out=y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        z, factor = ctx.saved_tensors
        grad_z = grad_factor = grad_addend = None
        if ctx.needs_input_grad[0]:
            grad_z = torch.mul(grad, factor, out=torch.empty_like(grad))
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(factor.dtype, torch.float32)
            grad_factor = torch.zeros(grad.shape[-1], dtype=wide, device=z.device)
            rows = zip(_blocks(as_rows(grad), wide), _blocks(as_rows(z), wide))
            for grad_rows, z_rows in rows:
                grad_factor += (grad_rows.to(wide) * z_rows).sum(0)
            grad_factor = grad_factor.to(factor.dtype)
        if ctx.needs_input_grad[2]:
            grad_addend = as_rows(grad).sum(0, dtype=ctx.addend_dtype) if ctx.is_bias else grad.to(ctx.addend_dtype)
        return grad_z, grad_factor, grad_addend
