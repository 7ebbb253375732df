"""``lora_linear``: ``y = x Wᵀ + bias + scaling · s Bᵀ`` with ``s = dropout(x) Aᵀ``, and its gradients.

LoRA is from Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _native, dispatch, philox
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu, cuda, cuda_or_triton, fits, triton
from . import eager
from .eager import EagerFunction, as_rows, not_a_view

# ---------------------------------------------------------------------------------------------------- forward


def dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(x) with the mask of ``seed``; x is taken as [rows, features]."""
    if seed is None:
        return x
    keep = philox.keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], p).view(x.shape)
    return torch.where(keep, x * philox.keep_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))


def _reference(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None,
    scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    s = dropped(x, seed, dropout_p) @ lora_A.to(x.dtype).t()
    y = torch.nn.functional.linear(x, weight, bias) + (s @ lora_B.to(x.dtype).t()) * scaling
    return y, s


def _fake(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lead = x.shape[:-1]
    return x.new_empty((*lead, weight.shape[0])), x.new_empty((*lead, lora_A.shape[0]))


def _cpu_supports(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> Verdict:  # fmt: skip
    if seed is not None:
        return cpu.REFUSED_DTYPE if x.dtype == torch.float64 else cpu.matmul_verdict(x, weight)
    return cpu.DECODE if cpu.reads_weight_once(x, weight) else cpu.matmul_verdict(x, weight)


def _triton_supports(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> Verdict:  # fmt: skip
    n, k = weight.shape
    return triton.lora_verdict(x, n, k, lora_A.shape[0])


def _triton_run(schedule: str, *args: Any) -> tuple[Tensor, Tensor]:
    fits.check_lora_linear(*args[:6])
    from ..triton_kernels import lora_linear

    return lora_linear.forward(schedule, *args)


def _cuda_supports(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> Verdict:  # fmt: skip
    n, k = weight.shape
    return cuda_or_triton.cuda_or_triton(x, n, k, lora_A, seed is not None, backward=False)


def _cuda_explain(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> Verdict:  # fmt: skip
    schedule: Any = _cuda_supports(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p).schedule  # it is a yes
    return cuda.planned(_native.cuda.plan_lora_linear, x, weight, (lora_A, lora_B), seed is not None, schedule)


def _sizes(x: Tensor, weight: Tensor, lora_A: Tensor) -> tuple[int, int, int, int]:
    n, k = weight.shape
    return x.shape[:-1].numel(), n, k, lora_A.shape[0]


def _flops(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> int:  # fmt: skip
    m, n, k, r = _sizes(x, weight, lora_A)
    return 2 * m * k * (n + r) + 2 * m * n * r


def _bytes(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float,
) -> int:  # fmt: skip
    m, n, k, r = _sizes(x, weight, lora_A)
    return (m * k + n * k + m * n + m * r) * x.element_size() + r * (k + n) * lora_A.element_size()


# --------------------------------------------------------------------------------------------------- backward


def _reference_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_s = grad_y @ lora_B.to(x.dtype) * scaling
    grad_x = grad_A = grad_B = x.new_empty(0)
    if need_x:
        branch = grad_s @ lora_A.to(x.dtype)
        grad_x = grad_y @ weight + dropped(branch, seed, dropout_p)
    if need_A:
        kept = dropped(x, seed, dropout_p)
        grad_A = (as_rows(grad_s).t() @ as_rows(kept)).to(lora_A.dtype)
    if need_B:
        grad_B = (as_rows(grad_y).t() @ as_rows(s) * scaling).to(lora_B.dtype)
    return grad_x, grad_A, grad_B


def _fake_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        lora_A.new_empty(lora_A.shape if need_A else 0),
        lora_B.new_empty(lora_B.shape if need_B else 0),
    )


def _cpu_supports_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, *needs: Any,
) -> Verdict:  # fmt: skip
    if seed is not None and x.dtype == torch.float64:
        return cpu.REFUSED_DTYPE
    verdict = cpu.matmul_verdict(grad_y, weight, is_k_by_n=True)
    # A few 16-bit rows are "aten", too, where the CPU has no instructions for them.
    return cpu.NATIVE if verdict is cpu.ATEN and cpu.is_native_16bit(x.dtype) else verdict


def _triton_supports_backward(grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, *_: Any) -> Verdict:
    n, k = weight.shape
    return triton.lora_verdict(x, k, n, s.shape[-1])


def _triton_run_backward(schedule: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    fits.check_lora_linear_backward(*args[:7])
    from ..triton_kernels import lora_linear

    return lora_linear.backward(schedule, *args)


def _cuda_supports_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    *rest: Any,
) -> Verdict:  # fmt: skip
    n, k = weight.shape
    return cuda_or_triton.cuda_or_triton(x, k, n, lora_A, seed is not None, backward=True)


def _flops_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    m, n, k, r = _sizes(x, weight, lora_A)
    flops = 2 * m * n * r if need_x or need_A else 0
    flops += 2 * m * k * (n + r) if need_x else 0
    return flops + (2 * m * k * r if need_A else 0) + (2 * m * n * r if need_B else 0)


def _bytes_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    m, n, k, r = _sizes(x, weight, lora_A)
    elements = m * n + m * r + (n * k + m * k if need_x else 0) + (m * k if need_A else 0)
    adapter = r * (k + n) + (r * k if need_A else 0) + (r * n if need_B else 0)
    return elements * x.element_size() + adapter * lora_A.element_size()


BACKWARD = dispatch.register(
    OpSpec(
        name="lora_linear_backward",
        schema=(
            "(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? seed, "
            "float scaling, float dropout_p, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)"
        ),
        reference=_reference_backward,
        fake=_fake_backward,
        kernels={
            "cuda": Kernel(_cuda_supports_backward),
            "triton": Kernel(_triton_supports_backward, _triton_run_backward),
            "cpu": Kernel(_cpu_supports_backward),
        },
        flops=_flops_backward,
        bytes=_bytes_backward,
    )
)

# --------------------------------------------------------------------------------------------------- autograd


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """What ``gradients`` needs."""
    x, weight, lora_A, lora_B, _, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, lora_A, lora_B, seed)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    save(ctx, inputs, output)


def gradients(ctx: Any, grad_y: Tensor | None, backward: Callable[..., Any]) -> tuple:
    """Gradients of (x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p); ``backward`` calls the op."""
    x, s, weight, lora_A, lora_B, seed = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    grad_x = grad_weight = grad_A = grad_B = grad_bias = None
    if grad_y is None:
        return (None,) * 8
    if need_x or need_A or need_B:
        grad_x, grad_A, grad_B = backward(
            grad_y, x, s, weight, lora_A, lora_B, seed, ctx.scaling, ctx.dropout_p, need_x, need_A, need_B
        )
    if need_weight:
        grad_weight = as_rows(grad_y).t() @ as_rows(x)
    if need_bias:
        grad_bias = as_rows(grad_y).sum(0)
    return (
        grad_x if need_x else None, grad_weight, grad_A if need_A else None, grad_B if need_B else None, grad_bias,
        None, None, None,
    )  # fmt: skip


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_s: None) -> tuple:
    return gradients(ctx, grad_y, torch.ops.lora_kernels.lora_linear_backward.default)


SPEC = dispatch.register(
    OpSpec(
        name="lora_linear",
        schema=(
            "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scaling, "
            "float dropout_p) -> (Tensor, Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports, explain=_cuda_explain),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports),
        },
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1, 4),
        flops=_flops,
        bytes=_bytes,
    )
)

_decode = dispatch.define_native(
    "lora_decode",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling) -> Tensor",
    lambda x, weight, lora_A, lora_B, bias, scaling: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


def _cpu_inference(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None, scaling: float,
    dropout_p: float, schedule: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    if schedule == "decode":
        return (_decode(x, weight, lora_A, lora_B, bias, scaling),)
    return dispatch.native(SPEC)(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, schedule)


INFERENCE = replace(SPEC, kernels={**SPEC.kernels, "cpu": Kernel(_cpu_supports, native=_cpu_inference)})
"""``lora_linear`` where only y, the first result, is asked for: a kernel may leave s out."""


class LoRALinearFunction(EagerFunction):
    """``lora_linear`` for eager autograd: one dispatch forward, one backward.

    Saves x, s [..., r], the weights (by reference) and the 8-byte seed; never the mask or dropout(x).
    Call it through ``lk.lora_linear``, which checks the arguments.
    """

    differentiable = (0, 1, 2, 3, 4)

    @staticmethod
    def results(output: tuple[Tensor, ...]) -> Tensor:
        return output[0]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        return not_a_view(eager.forward(ctx, SPEC, args, save)[0])

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:  # type: ignore[override]
        return gradients(ctx, grad_y, run_backward)


def run_backward(*args: Any) -> tuple[Tensor, ...]:
    """The op of the gradients, outside of torch's dispatcher."""
    return dispatch.run(BACKWARD, *args)
