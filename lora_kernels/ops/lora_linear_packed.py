"""``lora_linear`` over a quantised weight: forward and gradients from the packed bytes.

Its meaning is ``lora_linear``'s with ``dequantize(weight)``, which is never kept: forward and backward decode what they
need, and saved for backward are the packed parts, by reference. QLoRA is from Dettmers et al., NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu_packed, gpu_packed
from ..support.gpu_packed import COMPOSED, FEW_ROWS, SLABS
from ..support.packed import TORCH_DECODED
from . import eager, lora_linear
from .dequantize import PARTS, WEIGHT, WEIGHT_ARGS, decoded_for_product, for_product, nbytes
from .eager import EagerFunction, as_rows, not_a_view

# ---------------------------------------------------------------------------------------------------- forward


def _reference(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return lora_linear.SPEC.reference(x, for_product(rest[:WEIGHT_ARGS], x), *rest[WEIGHT_ARGS:])


def _fake(
    x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype, lora_A: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lead = x.shape[:-1]
    return x.new_empty((*lead, n)), x.new_empty((*lead, lora_A.shape[0]))


def _cpu_supports(x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *rest: Any) -> Verdict:
    seed = rest[5]
    verdict = cpu_packed.product_verdict(x, layout, n, k)
    few = verdict is cpu_packed.DECODE or verdict is cpu_packed.ROWS
    return cpu_packed.panels_verdict(x, n, k) if few and seed is not None else verdict


def _plain(args: tuple, first: int) -> tuple:
    """The arguments of the op of a plain weight, for questions about a call: the weight, at ``first``, is no memory."""
    n, k = args[first + 2 : first + 4]
    weight = torch.empty((n, k), dtype=args[0].dtype, device="meta")
    return *args[:first], weight, *args[first + WEIGHT_ARGS :]


def _composed(backend: str, spec: OpSpec, args: tuple, first: int) -> Verdict:
    """A backend that decodes the weight, which is at ``first``, serves a call; whoever multiplies, as ``spec`` does.
    Where it was asked for, it must do both.
    """
    verdict = gpu_packed.composed_verdict(backend, args[0].device, args[first + 1])
    if verdict.schedule is not None and dispatch.forced_backend() == backend:
        product = spec.kernels[backend].supports(*_plain(args, first))
        return product if product.schedule is None else verdict
    return verdict


def _cuda_supports(*args: Any) -> Verdict:
    x, parts, layout, n, k, block, _, lora_A, _, _, seed, *_ = args
    has_dropout = seed is not None
    if gpu_packed.is_few_rows(x, parts[0], layout, block, lora_A.shape[0], has_dropout):
        return gpu_packed.refusal("cuda", x.device) or FEW_ROWS
    if gpu_packed.is_slabs(x, n, k, layout, lora_A, has_dropout, backward=False):
        return SLABS
    return _composed("cuda", lora_linear.SPEC, args, 1)


_IN_PYTHON = COMPOSED.schedule, SLABS.schedule
_slabs = dispatch.define_native(
    "lora_linear_slabs",
    f"(Tensor x, {PARTS}, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scaling, float dropout_p, "
    "int rows) -> (Tensor, Tensor)",
    lambda *args: _fake(*args[:6], args[0].dtype, *args[6:]),
)


def _cuda_run(schedule: str, *args: Any) -> tuple[Tensor, Tensor]:
    if schedule != SLABS.schedule:
        return _run_composed(schedule, *args)
    x, _, _, n, *_ = args
    return _slabs(*args[:WEIGHT_ARGS], *args[1 + WEIGHT_ARGS :], gpu_packed.slab(x.shape[:-1].numel(), n))


def _cuda_explain(*args: Any) -> Verdict:
    verdict = _cuda_supports(*args)
    return _explain(*args) if verdict.schedule == COMPOSED.schedule else verdict


def _triton_supports(*args: Any) -> Verdict:
    return _composed("triton", lora_linear.SPEC, args, 1)


def _run_composed(schedule: str, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight = decoded_for_product(rest[:WEIGHT_ARGS], x)
    return dispatch.run(lora_linear.SPEC, x, weight, *rest[WEIGHT_ARGS:])


def _explain(*args: Any) -> Verdict:
    product = dispatch.explain(lora_linear.SPEC, _plain(args, 1))
    return Verdict(f"dequantize + {product.schedule}", product.reason)


def _flops(
    x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype, lora_A: Tensor,
    *_: Any,
) -> int:  # fmt: skip
    m, r = x.shape[:-1].numel(), lora_A.shape[0]
    return 2 * m * k * (n + r) + 2 * m * n * r


def _bytes(
    x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype, lora_A: Tensor,
    *_: Any,
) -> int:  # fmt: skip
    m, r = x.shape[:-1].numel(), lora_A.shape[0]
    return nbytes(weight) + (m * k + m * n + m * r) * x.element_size() + r * (k + n) * lora_A.element_size()


# --------------------------------------------------------------------------------------------------- backward


def _reference_backward(grad_y: Tensor, x: Tensor, s: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return lora_linear.BACKWARD.reference(grad_y, x, s, for_product(rest[:WEIGHT_ARGS], x), *rest[WEIGHT_ARGS:])


def _fake_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: list[Tensor], layout: str, n: int, k: int, block: int,
    dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None, scaling: float, dropout_p: float,
    need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        lora_A.new_empty(lora_A.shape if need_A else 0),
        lora_B.new_empty(lora_B.shape if need_B else 0),
    )


def _cpu_supports_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *_: Any
) -> Verdict:
    return cpu_packed.product_verdict(grad_y, layout, n, k, is_gradient=True)


def _cuda_supports_backward(*args: Any) -> Verdict:
    grad_y, _, _, _, layout, n, k, _, _, lora_A, _, seed, _, _, need_x, *_ = args
    if need_x and gpu_packed.is_slabs(grad_y, k, n, layout, lora_A, seed is not None, backward=True):
        return SLABS
    return _composed("cuda", lora_linear.BACKWARD, args, 3)


_slabs_backward = dispatch.define_native(
    "lora_linear_slabs_backward",
    f"(Tensor grad_y, Tensor x, Tensor s, {PARTS}, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, "
    "float dropout_p, bool need_x, bool need_A, bool need_B, int columns) -> (Tensor, Tensor, Tensor)",
    lambda *args: _fake_backward(*(*args[:8], args[0].dtype, *args[8:-1])),
)


def _cuda_run_backward(schedule: str, *args: Any) -> tuple[Tensor, ...]:
    if schedule != SLABS.schedule:
        return _run_composed_backward(schedule, *args)
    grad_y, k = args[0], args[6]
    before, after = args[: 2 + WEIGHT_ARGS], args[3 + WEIGHT_ARGS :]
    return _slabs_backward(*before, *after, gpu_packed.slab(grad_y.shape[:-1].numel(), k))


def _triton_supports_backward(*args: Any) -> Verdict:
    return _composed("triton", lora_linear.BACKWARD, args, 3)


def _run_composed_backward(schedule: str, grad_y: Tensor, x: Tensor, s: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    packed, others = rest[:WEIGHT_ARGS], rest[WEIGHT_ARGS:]
    need_x = others[-3]
    # The adapter's gradients do not read the weight: it is memory that nobody writes.
    weight = decoded_for_product(packed, x) if need_x else x.new_empty(packed[2:4])
    return dispatch.run(lora_linear.BACKWARD, grad_y, x, s, weight, *others)


def _flops_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: list[Tensor], layout: str, n: int, k: int, block: int,
    dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None, scaling: float, dropout_p: float,
    need_x: bool, need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    m, r = x.shape[:-1].numel(), lora_A.shape[0]
    flops = 2 * m * n * r if need_x or need_A else 0
    flops += 2 * m * k * (n + r) if need_x else 0
    return flops + (2 * m * k * r if need_A else 0) + (2 * m * n * r if need_B else 0)


def _bytes_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: list[Tensor], layout: str, n: int, k: int, block: int,
    dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None, scaling: float, dropout_p: float,
    need_x: bool, need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    m, r = x.shape[:-1].numel(), lora_A.shape[0]
    elements = m * n + m * r + (m * k if need_x else 0) + (m * k if need_A else 0)
    adapter = r * (k + n) + (r * k if need_A else 0) + (r * n if need_B else 0)
    return elements * x.element_size() + adapter * lora_A.element_size() + (nbytes(weight) if need_x else 0)


BACKWARD = dispatch.register(
    OpSpec(
        name="lora_linear_packed_backward",
        schema=(
            f"(Tensor grad_y, Tensor x, Tensor s, {WEIGHT}, Tensor lora_A, Tensor lora_B, Tensor? seed, "
            "float scaling, float dropout_p, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)"
        ),
        reference=_reference_backward,
        fake=_fake_backward,
        kernels={
            "cuda": Kernel(_cuda_supports_backward, _cuda_run_backward),
            "triton": Kernel(_triton_supports_backward, _run_composed_backward),
            "cpu": Kernel(_cpu_supports_backward, _run_composed_backward, run_schedules=(TORCH_DECODED.schedule,)),
        },
        flops=_flops_backward,
        bytes=_bytes_backward,
    )
)

# --------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, parts, *ctx.weight, lora_A, lora_B, _, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], lora_A, lora_B, seed, *parts)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output)


def _gradients(ctx: Any, grad_y: Tensor | None, backward: Callable[..., Any]) -> tuple:
    """Gradients of (x, lora_A, lora_B, bias), and the parts; ``backward`` calls the op."""
    x, s, lora_A, lora_B, seed, *parts = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_x, (need_A, need_B, need_bias) = needs[0], needs[1 + WEIGHT_ARGS : 4 + WEIGHT_ARGS]
    grad_x = grad_A = grad_B = grad_bias = None
    if grad_y is not None and (need_x or need_A or need_B):
        grad_x, grad_A, grad_B = backward(
            grad_y, x, s, parts, *ctx.weight, lora_A, lora_B, seed, ctx.scaling, ctx.dropout_p, need_x, need_A, need_B
        )
    if grad_y is not None and need_bias:
        grad_bias = as_rows(grad_y).sum(0)
    return grad_x if need_x else None, grad_A if need_A else None, grad_B if need_B else None, grad_bias, parts


def _of_arguments(grads: tuple, of_parts: Any) -> tuple:
    """One per argument of the op, None for those that have none."""
    grad_x, grad_A, grad_B, grad_bias, _ = grads
    return grad_x, of_parts, *[None] * (WEIGHT_ARGS - 1), grad_A, grad_B, grad_bias, None, None, None


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_s: None) -> tuple:
    grads = _gradients(ctx, grad_y, torch.ops.lora_kernels.lora_linear_packed_backward.default)
    return _of_arguments(grads, [None] * len(grads[-1]))  # a registered op's list has a list of gradients


SPEC = dispatch.register(
    OpSpec(
        name="lora_linear_packed",
        schema=(
            f"(Tensor x, {WEIGHT}, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scaling, "
            "float dropout_p) -> (Tensor, Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports, _cuda_run, run_schedules=_IN_PYTHON, explain=_cuda_explain),
            "triton": Kernel(_triton_supports, _run_composed, explain=_explain),
            "cpu": Kernel(_cpu_supports, _run_composed, run_schedules=(TORCH_DECODED.schedule,)),
        },
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 3 + WEIGHT_ARGS),
        flops=_flops,
        bytes=_bytes,
    )
)


class PackedLoRALinearFunction(EagerFunction):
    """``lora_linear_packed`` for eager autograd.

    Saves x, s [..., r], the adapter and the packed parts (by reference) and the 8-byte seed; never a decoded weight.
    Call it through ``lk.lora_linear``, which checks the arguments.
    """

    differentiable = (0, 1 + WEIGHT_ARGS, 2 + WEIGHT_ARGS, 3 + WEIGHT_ARGS)

    @staticmethod
    def results(output: tuple[Tensor, ...]) -> Tensor:
        return output[0]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        return not_a_view(eager.forward(ctx, SPEC, args, _save)[0])

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:  # type: ignore[override]
        return _of_arguments(_gradients(ctx, grad_y, _run_backward), None)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    return dispatch.run(BACKWARD, *args)
