"""``lora_embedding``: ``y = weight[ids] + scaling · s Bᵀ`` with ``s = Aᵀ[ids]``, and its gradients.

The embedding of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, as their code has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu
from . import eager
from .eager import EagerFunction, as_rows, not_a_view

_ATEN = Verdict("aten", "rows gathered once, low-rank branch accumulated into them by the vendor GEMM")

# ---------------------------------------------------------------------------------------------------- forward


def _reference(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int
) -> tuple[Tensor, Tensor]:
    s = F.embedding(ids, lora_A.t()).to(weight.dtype)
    y = F.embedding(ids, weight) + (s @ lora_B.to(weight.dtype).t()) * scaling
    return y, s.reshape(-1, lora_A.shape[0])


def _fake(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int
) -> tuple[Tensor, Tensor]:
    return weight.new_empty((*ids.shape, weight.shape[1])), weight.new_empty((ids.numel(), lora_A.shape[0]))


def _supports(*_: Any) -> Verdict:
    return _ATEN


def _run(
    schedule: str, ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int
) -> tuple[Tensor, Tensor]:
    wide = _matmul_dtype(weight)
    flat = ids.reshape(-1)
    y = F.embedding(flat, weight).to(wide)
    s = lora_A.index_select(1, flat).t().to(weight.dtype)
    y.addmm_(s.to(wide), lora_B.to(wide).t(), alpha=scaling)
    return y.to(weight.dtype).view(*ids.shape, weight.shape[1]), s.contiguous()


def _matmul_dtype(t: Tensor) -> torch.dtype:
    """The dtype to multiply in: a CPU without a matmul for t's dtype goes through float32."""
    return torch.float32 if t.device.type == "cpu" and not cpu.has_native_matmul(t.dtype) else t.dtype


def _flops(ids: Tensor, weight: Tensor, lora_A: Tensor, *_: Any) -> int:
    return 2 * ids.numel() * weight.shape[1] * lora_A.shape[0]


def _bytes(ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *_: Any) -> int:
    m, n, r = ids.numel(), weight.shape[1], lora_A.shape[0]
    return m * ids.element_size() + (2 * m * n + m * r) * weight.element_size() + r * (m + n) * lora_A.element_size()


# --------------------------------------------------------------------------------------------------- backward


def _reference_backward(
    grad_y: Tensor, ids: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int,
    need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = _matmul_dtype(grad_y)
    grad = as_rows(grad_y).to(wide)
    grad_A = grad_B = grad_y.new_empty(0)
    if need_A:
        grad_s = (grad @ lora_B.to(wide)).to(torch.promote_types(wide, torch.float32)) * scaling
        grad_A = _sum_rows(grad_s, ids, lora_A.shape[1], padding_idx).t().to(lora_A.dtype).contiguous()
    if need_B:
        grad_B = (grad.t() @ s.to(wide) * scaling).to(lora_B.dtype)
    return grad_A, grad_B


def _sum_rows(rows: Tensor, ids: Tensor, count: int, padding_idx: int) -> Tensor:
    """[count, columns]: sums of the rows that have the same id, in a fixed order, unlike ``index_add_`` on a GPU."""
    return torch.ops.aten.embedding_dense_backward(rows, ids.reshape(-1), count, padding_idx, False)


def _run_backward(schedule: str, *args: Any) -> tuple[Tensor, Tensor]:
    return _reference_backward(*args)


def _fake_backward(
    grad_y: Tensor, ids: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int,
    need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return lora_A.new_empty(lora_A.shape if need_A else 0), lora_B.new_empty(lora_B.shape if need_B else 0)


def _flops_backward(
    grad_y: Tensor, ids: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int,
    need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    return 2 * s.numel() * grad_y.shape[-1] * (need_A + need_B)


def _bytes_backward(
    grad_y: Tensor, ids: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int,
    need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    adapters = lora_B.numel() * (1 + need_B) + lora_A.numel() * need_A
    return (grad_y.numel() + s.numel()) * grad_y.element_size() + adapters * lora_A.element_size()


BACKWARD = dispatch.register(
    OpSpec(
        name="lora_embedding_backward",
        schema=(
            "(Tensor grad_y, Tensor ids, Tensor s, Tensor lora_A, Tensor lora_B, float scaling, int padding_idx, "
            "bool need_A, bool need_B) -> (Tensor, Tensor)"
        ),
        reference=_reference_backward,
        fake=_fake_backward,
        kernels={"cuda": Kernel(_supports, _run_backward), "cpu": Kernel(_supports, _run_backward)},
        flops=_flops_backward,
        bytes=_bytes_backward,
    )
)

# --------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ids, weight, lora_A, lora_B, ctx.scaling, ctx.padding_idx = inputs
    ctx.vocabulary = weight.shape[0]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ids, output[1], lora_A, lora_B)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output)


def _gradients(ctx: Any, grad_y: Tensor | None, backward: Callable[..., Any]) -> tuple:
    """Gradients of (ids, weight, lora_A, lora_B, scaling, padding_idx); ``backward`` calls the op."""
    if grad_y is None:
        return (None,) * 6
    ids, s, lora_A, lora_B = ctx.saved_tensors
    _, need_weight, need_A, need_B, *_ = ctx.needs_input_grad
    grad_weight = grad_A = grad_B = None
    if need_A or need_B:
        grad_A, grad_B = backward(grad_y, ids, s, lora_A, lora_B, ctx.scaling, ctx.padding_idx, need_A, need_B)
    if need_weight:
        grad_weight = _sum_rows(as_rows(grad_y), ids, ctx.vocabulary, ctx.padding_idx)
    return None, grad_weight, grad_A if need_A else None, grad_B if need_B else None, None, None


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_s: None) -> tuple:
    return _gradients(ctx, grad_y, torch.ops.lora_kernels.lora_embedding_backward.default)


SPEC = dispatch.register(
    OpSpec(
        name="lora_embedding",
        schema=(
            "(Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, int padding_idx) "
            "-> (Tensor, Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={"cuda": Kernel(_supports, _run), "cpu": Kernel(_supports, _run)},
        autograd=Autograd(_setup_context, _backward),
        flops=_flops,
        bytes=_bytes,
    )
)


class LoRAEmbeddingFunction(EagerFunction):
    """``lora_embedding`` for eager autograd.

    Saves ids, s [tokens, rank] and the adapters (by reference). Call it through ``lk.lora_embedding``, which checks
    the arguments.
    """

    differentiable = (0, 1, 2, 3)

    @staticmethod
    def results(output: tuple[Tensor, ...]) -> Tensor:
        return output[0]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        return not_a_view(eager.forward(ctx, SPEC, args, _save)[0])

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:  # type: ignore[override]
        return _gradients(ctx, grad_y, lambda *args: dispatch.run(BACKWARD, *args))
