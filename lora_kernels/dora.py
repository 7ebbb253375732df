"""DoRA (Liu et al., ICML 2024) on top of a LoRA linear: the norm of the adapted weight and the scale it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .ops._autograd import as_rows

_BLOCK = 1 << 20
"""Elements of a 16-bit matrix that are held in float32 at a time."""


@torch.no_grad()
def norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
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


def _norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide) * scaling
    WA = torch.cat([rows.to(wide) @ A.t() for rows in _blocks(weight, wide)])
    # Taken anew in each call: a write through weight.data, which merging and many loaders make, leaves no trace.
    of_weight = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    update = ((2 * WA + B @ (A @ A.t())) * B).sum(1)
    # The root of a square is not always the number itself.
    total = torch.where(update == 0, of_weight, (of_weight.square() + update).clamp_min_(0).sqrt_())
    return total.to(torch.promote_types(weight.dtype, lora_B.dtype))


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
