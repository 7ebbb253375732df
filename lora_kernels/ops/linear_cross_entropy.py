"""``linear_cross_entropy``: cross entropy of ``x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ``, never all of whose logits exist.

Gradients of a sum of losses are known as soon as the losses are: forward forms them, some rows at a time, and backward
multiplies them by a number. Forming them in forward is from Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM
Training", 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..plain import sum_dtype
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu, cuda, triton
from . import eager
from .cross_entropy_rows import Loss
from .eager import EagerFunction, as_rows
from .vocabulary_chunks import (
    Head,
    Needs,
    Tools,
    cpu_tools,
    cuda_tools,
    losses_and_gradients,
    plain_tools,
    triton_tools,
)

_CHUNKS = Verdict("chunks", "logits of some rows at a time: the vendor's products, one kernel for loss and gradient")

# --------------------------------------------------------------------------------------- losses and gradients


def _sum(
    tools: Tools, x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
    bias: Tensor | None, scaling: float, ignore_index: int, label_smoothing: float, softcap: float, logit_scale: float,
    *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss = Loss(ignore_index, label_smoothing, softcap, logit_scale)
    head = Head(weight, lora_A, lora_B, bias, scaling)
    wanted = Needs(*needs)
    ones = torch.ones(labels.numel(), dtype=sum_dtype(x.dtype), device=x.device) if any(wanted) else None
    losses, gradients = losses_and_gradients(tools, as_rows(x), labels.reshape(-1), head, loss, wanted, ones)
    return losses.sum(), *_shaped(gradients, x)


def _each(
    tools: Tools, x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
    bias: Tensor | None, scaling: float, *loss: Any,
) -> Tensor:  # fmt: skip
    head = Head(weight, lora_A, lora_B, bias, scaling)
    losses, _ = losses_and_gradients(tools, as_rows(x), labels.reshape(-1), head, Loss(*loss), Needs(), None)
    return losses.view(labels.shape)


def _each_backward(
    tools: Tools, x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
    bias: Tensor | None, grad_losses: Tensor, scaling: float, ignore_index: int, label_smoothing: float, softcap: float,
    logit_scale: float, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss = Loss(ignore_index, label_smoothing, softcap, logit_scale)
    head = Head(weight, lora_A, lora_B, bias, scaling)
    grads = grad_losses.reshape(-1).to(sum_dtype(x.dtype))
    _, gradients = losses_and_gradients(tools, as_rows(x), labels.reshape(-1), head, loss, Needs(*needs), grads)
    operands = x, weight, lora_A, lora_B, bias
    narrow = (grad if t is None else grad.to(t.dtype) for grad, t in zip(_shaped(gradients, x), operands))
    return tuple(narrow)


def _shaped(gradients: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
    grad_x, *others = gradients
    return grad_x.view(x.shape) if grad_x.dim() == 2 else grad_x, *others


# ------------------------------------------------------------------------------------------------ shapes, costs


def _fake_gradients(x: Tensor, others: tuple[Tensor | None, ...], needs: tuple, dtype: torch.dtype | None) -> Any:
    """Of x and ``others``, the latter in ``dtype``; None: in their own, where they are asked for."""
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    return grad_x, *(
        x.new_empty(0, dtype=dtype if t is None else dtype or t.dtype)
        if t is None or not need else t.new_empty(t.shape, dtype=dtype or t.dtype)
        for t, need in zip(others, needs[1:])
    )  # fmt: skip


def _fake(
    x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = sum_dtype(x.dtype)
    return x.new_empty((), dtype=wide), *_fake_gradients(x, (weight, lora_A, lora_B, bias), rest[-5:], wide)


def _fake_each(x: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return x.new_empty(labels.shape, dtype=sum_dtype(x.dtype))


def _fake_each_backward(
    x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_gradients(x, (weight, lora_A, lora_B, bias), rest[-5:], None)


def _flops(x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Any, bias: Any, *rest: Any) -> int:
    m, (n, k) = labels.numel(), weight.shape
    r = 0 if lora_A is None else lora_A.shape[0]
    need_x, need_weight, need_A, need_B, _ = rest[-5:]
    flops = _flops_each(x, weight, labels, lora_A)
    flops += 2 * m * n * r if need_x or need_A else 0
    flops += 2 * m * k * (n + r) if need_x else 0
    flops += 2 * m * n * k if need_weight else 0
    return flops + (2 * m * k * r if need_A else 0) + (2 * m * n * r if need_B else 0)


def _flops_each(x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, *_: Any) -> int:
    m, (n, k) = labels.numel(), weight.shape
    r = 0 if lora_A is None else lora_A.shape[0]
    return 2 * m * k * (n + r) + 2 * m * n * r


def _bytes(x: Tensor, weight: Tensor, labels: Tensor, lora_A: Tensor | None, lora_B: Any, bias: Any, *rest: Any) -> int:
    wide, others = sum_dtype(x.dtype).itemsize, (weight, lora_A, lora_B, bias)
    written = sum(t.numel() * wide for t, need in zip(others, rest[-4:]) if need)
    return _bytes_each(x, weight, labels, *others[1:]) + written + (x.nbytes if rest[-5] else 0)


def _bytes_each(x: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> int:
    read = x, weight, labels, *(t for t in others if isinstance(t, Tensor))
    return sum(t.nbytes for t in read)


# ---------------------------------------------------------------------------------------------------- who serves


def _cpu_supports(x: Tensor, *_: Any) -> Verdict:
    return cpu.REFUSED_DTYPE if x.dtype == torch.float64 else _CHUNKS


def _cuda_supports(x: Tensor, weight: Tensor, *_: Any) -> Verdict:
    return cuda.prompt_refusal(x.device, x.dtype, x.dtype, 0, weight.shape[0]) or _CHUNKS


def _triton_supports(x: Tensor, weight: Tensor, *_: Any) -> Verdict:
    return triton.rows_refusal(x.device, (x.dtype,), 1, 1, weight.shape[0]) or _CHUNKS


def _kernels(function: Callable[..., Any]) -> dict[str, Kernel]:
    return {
        "cuda": Kernel(_cuda_supports, lambda schedule, *args: function(cuda_tools(args[0]), *args)),
        "triton": Kernel(_triton_supports, lambda schedule, *args: function(triton_tools(args[0]), *args)),
        "cpu": Kernel(_cpu_supports, lambda schedule, *args: function(cpu_tools(), *args)),
    }


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(plain_tools(args[0]), *args)


# ------------------------------------------------------------------------------------------------------- the ops

_HEAD = "Tensor x, Tensor weight, Tensor labels, Tensor? lora_A, Tensor? lora_B, Tensor? bias"
_LOSS = "float scaling, int ignore_index, float label_smoothing, float softcap, float logit_scale"
_NEEDS = "bool need_x, bool need_weight, bool need_A, bool need_B, bool need_bias"
_GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor"
_PLACES = (0, 1, 3, 4, 5)
"""Of the operands that may train."""


def _save_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.inputs = inputs[-5:], len(inputs)
    ctx.dtypes = [None if inputs[place] is None else inputs[place].dtype for place in _PLACES]
    ctx.save_for_backward(*output[1:])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save_gradients(ctx, inputs, output)


def _scaled(ctx: Any, grad_loss: Tensor | None) -> tuple:
    """Gradients of the op's arguments: what forward has formed, times that of the sum, and only then rounded."""
    grads: list[Tensor | None] = [None] * ctx.inputs
    if grad_loss is None:
        return tuple(grads)
    for place, need, dtype, grad in zip(_PLACES, ctx.needs, ctx.dtypes, ctx.saved_tensors):
        if ctx.needs_input_grad[place]:
            if not need:
                raise RuntimeError("linear_cross_entropy: forward was not asked for a gradient that backward needs")
            grads[place] = torch.mul(grad, grad_loss, out=grad.new_empty(grad.shape, dtype=dtype))
    return tuple(grads)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple:
    return _scaled(ctx, grad_loss)


SPEC = dispatch.register(
    OpSpec(
        name="linear_cross_entropy",
        schema=f"({_HEAD}, {_LOSS}, {_NEEDS}) -> (Tensor, {_GRADIENTS})",
        reference=_plain(_sum),
        fake=_fake,
        kernels=_kernels(_sum),
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1, 5),
        flops=_flops,
        bytes=_bytes,
    )
)
"""The sum of the losses, and those of its gradients that are asked for; the others are empty. Those of all but x are
wide: sums over rows may not fit into float16 until backward has multiplied them by 1 / rows.
"""

EACH_BACKWARD = dispatch.register(
    OpSpec(
        name="linear_cross_entropy_each_backward",
        schema=f"({_HEAD}, Tensor grad_losses, {_LOSS}, {_NEEDS}) -> ({_GRADIENTS})",
        reference=_plain(_each_backward),
        fake=_fake_each_backward,
        kernels=_kernels(_each_backward),
        flops=_flops,
        bytes=_bytes,
    )
)


def _save_operands(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = inputs[6:]
    ctx.save_for_backward(*inputs[:6])


def _recomputed(ctx: Any, grad_losses: Tensor | None, backward: Callable[..., tuple[Tensor, ...]]) -> tuple:
    grads: list[Tensor | None] = [None] * (6 + len(ctx.numbers))
    needs = [ctx.needs_input_grad[place] for place in _PLACES]
    if grad_losses is not None:
        found = backward(*ctx.saved_tensors, grad_losses, *ctx.numbers, *needs)
        for place, need, grad in zip(_PLACES, needs, found):
            grads[place] = grad if need else None
    return tuple(grads)


@torch.autograd.function.once_differentiable
def _each_gradients(ctx: Any, grad_losses: Tensor | None) -> tuple:
    return _recomputed(ctx, grad_losses, torch.ops.lora_kernels.linear_cross_entropy_each_backward.default)


EACH = dispatch.register(
    OpSpec(
        name="linear_cross_entropy_each",
        schema=f"({_HEAD}, {_LOSS}) -> Tensor",
        reference=_plain(_each),
        fake=_fake_each,
        kernels=_kernels(_each),
        autograd=Autograd(_save_operands, _each_gradients),
        autocast=(0, 1, 5),
        flops=_flops_each,
        bytes=_bytes_each,
    )
)
"""The loss of every row; backward computes the logits anew."""


class LinearCrossEntropyFunction(EagerFunction):
    """The sum of ``linear_cross_entropy`` for eager autograd.

    Saves the gradients that forward has formed: dX [..., K] in x's dtype, dA, dB, and those of a weight and a bias that
    train, in fp32 (fp64); neither x nor logits. Call it through ``lk.linear_cross_entropy``, which checks the
    arguments.
    """

    differentiable = _PLACES

    @staticmethod
    def results(output: tuple[Tensor, ...]) -> Tensor:
        return output[0]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        return eager.forward(ctx, SPEC, args, _save_gradients)[0]

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple:  # type: ignore[override]
        return _scaled(ctx, grad_loss)


class LinearCrossEntropyEachFunction(EagerFunction):
    """The loss of every row for eager autograd. Saves the operands, by reference; backward computes the logits anew."""

    differentiable = _PLACES

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        return eager.forward(ctx, EACH, args, _save_operands)

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_losses: Tensor | None) -> tuple:  # type: ignore[override]
        return _recomputed(ctx, grad_losses, lambda *args: dispatch.run(EACH_BACKWARD, *args))
