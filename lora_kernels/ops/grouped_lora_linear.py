"""``grouped_lora_linear``: ``lora_linear`` of rows that belong to groups, each with an adapter of its own.

Rows of x [M, K] lie group by group: those of group g end before row ``offsets[g]``. Every group has its ``lora_A``
[rank, K] and ``lora_B`` [N, rank]; the weight is one for all, [N, K], or one each, [G, N, K]: experts of a mixture.
Rows behind the last end belong to nobody: their results are zeros, and they get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _native, dispatch
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu, cpu_groups, cuda, fits, triton
from . import eager, lora_linear
from .eager import EagerFunction, not_a_view
from .lora_linear import dropped

# ---------------------------------------------------------------------------------------------------- forward


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and its rows. Reads ``offsets`` on the host."""
    first = 0
    for group, end in enumerate(offsets.tolist()):
        if end > first:
            yield group, slice(first, end)
        first = max(first, end)


def of_group(t: Any, group: int, shared_dim: int) -> Any:
    """The group's part of a weight or bias (or None), which all groups share if it has ``shared_dim`` dimensions."""
    return t if t is None or t.dim() == shared_dim else t[group]


def _reference(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, bias: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, s = x.new_zeros((len(x), weight.shape[-2])), x.new_zeros((len(x), lora_A.shape[1]))
    kept = dropped(x, seed, dropout_p)
    for g, rows in groups(offsets):
        s[rows] = kept[rows] @ lora_A[g].to(x.dtype).t()
        base = torch.nn.functional.linear(x[rows], of_group(weight, g, 2), of_group(bias, g, 1))
        y[rows] = base + (s[rows] @ lora_B[g].to(x.dtype).t()) * scaling
    return y, s


def _fake(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, bias: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[-2])), x.new_empty((x.shape[0], lora_A.shape[1]))


def _cpu_supports(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    return cpu_groups.verdict(x.shape[0], x.dtype, weight, lora_A.shape[0], x.stride()[1] == 1, False)


def _cuda_supports(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    return cuda.grouped_verdict(x, weight, lora_A.shape[0], lora_A.shape[1])


def _cuda_explain(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    schedule: Any = _cuda_supports(x, weight, lora_A, lora_B, offsets).schedule  # it is a yes
    return cuda.planned_groups(_native.cuda.plan_grouped_lora_linear, x, weight, lora_A, schedule)


def _triton_supports(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    n, k = weight.shape[-2:]
    return triton.grouped_verdict(x, n, k, lora_A.shape[0], lora_A.shape[1])


def _triton_run(schedule: str, *args: Any) -> tuple[Tensor, Tensor]:
    fits.check_grouped_lora_linear(*args[:7])
    from ..triton_kernels import grouped_lora_linear

    return grouped_lora_linear.forward(schedule, *args)


def _sizes(x: Tensor, weight: Tensor, lora_A: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], weight.shape[-2], weight.shape[-1], lora_A.shape[1]


def _flops(x: Tensor, weight: Tensor, lora_A: Tensor, *_: Any) -> int:
    m, n, k, r = _sizes(x, weight, lora_A)
    return 2 * m * k * (n + r) + 2 * m * n * r


def _bytes(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *_: Any) -> int:
    m, n, k, r = _sizes(x, weight, lora_A)
    adapters = lora_A.numel() + lora_B.numel()
    return (m * (k + n + r) + weight.numel()) * x.element_size() + adapters * lora_A.element_size()


# --------------------------------------------------------------------------------------------------- backward


def _reference_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = x.new_zeros(x.shape if need_x else 0)
    grad_A = lora_A.new_zeros(lora_A.shape if need_A else 0)
    grad_B = lora_B.new_zeros(lora_B.shape if need_B else 0)
    branch = x.new_zeros(x.shape if need_x else 0)
    kept = dropped(x, seed, dropout_p) if need_A else x
    for g, rows in groups(offsets):
        grad_s = grad_y[rows] @ lora_B[g].to(x.dtype) * scaling
        if need_x:
            grad_x[rows] = grad_y[rows] @ of_group(weight, g, 2)
            branch[rows] = grad_s @ lora_A[g].to(x.dtype)
        if need_A:
            grad_A[g] = grad_s.t() @ kept[rows]
        if need_B:
            grad_B[g] = grad_y[rows].t() @ s[rows] * scaling
    if need_x:
        grad_x += dropped(branch, seed, dropout_p)
    return grad_x, grad_A, grad_B


def _fake_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        lora_A.new_empty(lora_A.shape if need_A else 0),
        lora_B.new_empty(lora_B.shape if need_B else 0),
    )


def _cpu_supports_backward(grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, *_: Any) -> Verdict:
    verdict = cpu_groups.verdict(x.shape[0], x.dtype, weight, lora_A.shape[0], grad_y.stride()[1] == 1, True)
    # What lora_linear multiplies in 16 bits; a few rows are "aten", too, where the CPU has no instructions for them.
    is_native = verdict.schedule == "aten" and weight.dim() == 3 and cpu.is_native_16bit(x.dtype)
    return cpu.NATIVE if is_native else verdict


def _cuda_supports_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    return cuda.grouped_verdict(x, weight, lora_A.shape[0], lora_A.shape[1])


def _triton_supports_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    n, k = weight.shape[-2:]
    return triton.grouped_verdict(x, k, n, lora_A.shape[0], lora_A.shape[1])


def _triton_run_backward(schedule: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    fits.check_grouped_lora_linear_backward(*args[:8])
    from ..triton_kernels import grouped_lora_linear

    return grouped_lora_linear.backward(schedule, *args)


def _flops_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float, *needs: bool,
) -> int:  # fmt: skip
    one = weight if weight.dim() == 2 else weight[0]
    plain = x, s, one, lora_A[0], lora_B[0], seed, scaling, dropout_p
    flops: Any = lora_linear.BACKWARD.flops
    return flops(grad_y, *plain, *needs)


def _bytes_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    m, n, k, r = _sizes(x, weight, lora_A)
    elements = m * n + m * r + (weight.numel() + m * k if need_x else 0) + (m * k if need_A else 0)
    adapters = lora_A.numel() * (1 + need_A) + lora_B.numel() * (1 + need_B)
    return elements * x.element_size() + adapters * lora_A.element_size()


BACKWARD = dispatch.register(
    OpSpec(
        name="grouped_lora_linear_backward",
        schema=(
            "(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor offsets, "
            "Tensor? seed, float scaling, float dropout_p, bool need_x, bool need_A, bool need_B) "
            "-> (Tensor, Tensor, Tensor)"
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


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, offsets, bias, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.bias_dim = 0 if bias is None else bias.dim()
    ctx.save_for_backward(x, output[1], weight, lora_A, lora_B, offsets, seed)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output)


def _gradients(ctx: Any, grad_y: Tensor | None, backward: Callable[..., Any]) -> tuple:
    """Gradients of (x, weight, lora_A, lora_B, offsets, bias, seed, scaling, dropout_p)."""
    x, s, weight, lora_A, lora_B, offsets, seed = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, _, need_bias, *_ = ctx.needs_input_grad
    if grad_y is None:
        return (None,) * 9
    grad_x = grad_weight = grad_A = grad_B = grad_bias = None
    if need_x or need_A or need_B:
        grad_x, grad_A, grad_B = backward(
            grad_y, x, s, weight, lora_A, lora_B, offsets, seed, ctx.scaling, ctx.dropout_p, need_x, need_A, need_B
        )
    if need_weight:
        grad_weight = torch.zeros_like(weight)
        for g, rows in groups(offsets):
            of_group(grad_weight, g, 2).add_(grad_y[rows].t() @ x[rows])
    if need_bias:
        lead = () if ctx.bias_dim == 1 else (len(offsets),)
        grad_bias = grad_y.new_zeros((*lead, grad_y.shape[1]))
        for g, rows in groups(offsets):
            of_group(grad_bias, g, 1).add_(grad_y[rows].sum(0))
    return (
        grad_x if need_x else None, grad_weight, grad_A if need_A else None, grad_B if need_B else None, None,
        grad_bias, None, None, None,
    )  # fmt: skip


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_s: None) -> tuple:
    return _gradients(ctx, grad_y, torch.ops.lora_kernels.grouped_lora_linear_backward.default)


SPEC = dispatch.register(
    OpSpec(
        name="grouped_lora_linear",
        schema=(
            "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor offsets, Tensor? bias, Tensor? seed, "
            "float scaling, float dropout_p) -> (Tensor, Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports, explain=_cuda_explain),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports),
        },
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1, 5),
        flops=_flops,
        bytes=_bytes,
    )
)


class GroupedLoRALinearFunction(EagerFunction):
    """``grouped_lora_linear`` for eager autograd: one dispatch forward, one backward.

    Saves x, s [M, rank], the weights and offsets (by reference) and the 8-byte seed. A weight or bias that trains gets
    its gradient from plain torch code, which reads the offsets on the host. Call it through ``lk.grouped_lora_linear``.
    """

    differentiable = (0, 1, 2, 3, 5)

    @staticmethod
    def results(output: tuple[Tensor, ...]) -> Tensor:
        return output[0]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        return not_a_view(eager.forward(ctx, SPEC, args, _save)[0])

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:  # type: ignore[override]
        return _gradients(ctx, grad_y, _run_backward)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    return dispatch.run(BACKWARD, *args)
