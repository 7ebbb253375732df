"""``multi_lora_linear``: one base for all rows of x [..., K], and for each row the adapter of its id, or none.

Adapters lie in pools lora_A [adapters, rank, K] and lora_B [adapters, N, rank], of which ``ranks`` says how much each
uses. The base is one product over all rows, so that a row without an adapter (id -1) has the bits of the base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _native, dispatch
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu, cuda, pools_fit, triton
from . import eager, lora_linear
from .eager import EagerFunction, as_rows, not_a_view
from .lora_linear import dropped

# ---------------------------------------------------------------------------------------------------- forward


def slots(op: str, adapter_ids: Tensor, ranks: Tensor | None, lora_A: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Each adapter that has rows and a rank: its number, its rank, its rows. Reads ids and ranks on the host;
    ``RuntimeError`` of ``op`` where they are out of range.
    """
    adapters, most, _ = lora_A.shape
    each = [most] * adapters if ranks is None else ranks.tolist()
    of_slot: dict[int, list[int]] = {}
    for row, slot in enumerate(adapter_ids.tolist()):
        of_slot.setdefault(slot, []).append(row)
    if any(not -1 <= slot < adapters for slot in of_slot) or any(not 0 <= rank <= most for rank in each):
        raise RuntimeError(f"{op}: adapter_ids must be from -1 to {adapters - 1}, and ranks from 0 to {most}")
    of_slot.pop(-1, None)
    for slot, rows in sorted(of_slot.items()):
        if each[slot] > 0:
            yield slot, each[slot], torch.tensor(rows, device=adapter_ids.device)


def _factor(scaling: float, scalings: Tensor | None, slot: int) -> Any:
    return scaling if scalings is None else scalings[slot] * scaling


def _reference(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None,
    scalings: Tensor | None, bias: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.nn.functional.linear(x, weight, bias)
    kept, y_rows = as_rows(dropped(x, seed, dropout_p)), as_rows(y).clone()
    s = x.new_zeros((len(kept), lora_A.shape[1]))
    for slot, rank, rows in slots("multi_lora_linear", adapter_ids, ranks, lora_A):
        part = kept[rows] @ lora_A[slot, :rank].to(x.dtype).t()
        s[rows, :rank] = part
        update = (part @ lora_B[slot, :, :rank].to(x.dtype).t()) * _factor(scaling, scalings, slot)
        y_rows[rows] += update.to(x.dtype)
    return y_rows.view(y.shape), s.view(*x.shape[:-1], lora_A.shape[1])


def _fake(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None,
    scalings: Tensor | None, bias: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lead = x.shape[:-1]
    return x.new_empty((*lead, weight.shape[0])), x.new_empty((*lead, lora_A.shape[1]))


def _cpu_supports(x: Tensor, weight: Tensor, *_: Any) -> Verdict:
    if x.dtype == torch.float64:
        return cpu.REFUSED_DTYPE  # the branch is computed in fp32
    return cpu.DECODE if cpu.reads_weight_once(x, weight) else cpu.matmul_verdict(x, weight)


def _cuda_supports(x: Tensor, weight: Tensor, lora_A: Tensor, *_: Any) -> Verdict:
    return cuda.multi_verdict(x, weight, lora_A.shape[0], lora_A.shape[1])


def _cuda_explain(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Any, scalings: Any,
    bias: Any, seed: Tensor | None, *_: Any,
) -> Verdict:  # fmt: skip
    schedule: Any = _cuda_supports(x, weight, lora_A).schedule  # it is a yes
    return cuda.planned_pools(_native.cuda.plan_multi_lora_linear, x, weight, lora_A, seed is not None, schedule)


def _triton_supports(x: Tensor, weight: Tensor, lora_A: Tensor, *_: Any) -> Verdict:
    return triton.multi_verdict(x, *weight.shape, *lora_A.shape[:2], backward=False)


def _triton_run(schedule: str, *args: Any) -> tuple[Tensor, Tensor]:
    pools_fit.check_multi_lora_linear(*args[:9])
    from ..triton_kernels import multi_lora_linear

    return multi_lora_linear.forward(schedule, *args)


def _sizes(x: Tensor, weight: Tensor, lora_A: Tensor) -> tuple[int, int, int, int]:
    return x.shape[:-1].numel(), weight.shape[0], weight.shape[1], lora_A.shape[1]


def _flops(x: Tensor, weight: Tensor, lora_A: Tensor, *_: Any) -> int:
    """As if every row had an adapter of the largest rank."""
    m, n, k, r = _sizes(x, weight, lora_A)
    return 2 * m * k * (n + r) + 2 * m * n * r


def _bytes(x: Tensor, weight: Tensor, lora_A: Tensor, *_: Any) -> int:
    """As if every row had an adapter of the largest rank, and of its own where there are enough of them."""
    m, n, k, r = _sizes(x, weight, lora_A)
    return (m * (k + n + r) + n * k) * x.element_size() + min(m, len(lora_A)) * r * (k + n) * lora_A.element_size()


# --------------------------------------------------------------------------------------------------- backward


def _reference_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor,
    ranks: Tensor | None, scalings: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool,
    need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = grad_y @ weight if need_x else x.new_empty(0)
    grad_A = lora_A.new_zeros(lora_A.shape if need_A else 0)
    grad_B = lora_B.new_zeros(lora_B.shape if need_B else 0)
    grad_rows, s_rows = as_rows(grad_y), as_rows(s)
    kept = as_rows(dropped(x, seed, dropout_p)) if need_A else None
    branch = torch.zeros_like(x) if need_x else None
    for slot, rank, rows in slots("multi_lora_linear", adapter_ids, ranks, lora_A):
        grad = grad_rows[rows]
        factor = _factor(scaling, scalings, slot)
        grad_s = (grad @ lora_B[slot, :, :rank].to(x.dtype) * factor).to(x.dtype)
        if branch is not None:
            as_rows(branch)[rows] = grad_s @ lora_A[slot, :rank].to(x.dtype)
        if kept is not None:
            grad_A[slot, :rank] = grad_s.t() @ kept[rows]
        if need_B:
            grad_B[slot, :, :rank] = grad.t() @ s_rows[rows, :rank] * factor
    if branch is not None:
        grad_x = grad_x + dropped(branch, seed, dropout_p)
    return grad_x, grad_A, grad_B


def _fake_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor,
    ranks: Tensor | None, scalings: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool,
    need_A: bool, need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        lora_A.new_empty(lora_A.shape if need_A else 0),
        lora_B.new_empty(lora_B.shape if need_B else 0),
    )


def _cpu_supports_backward(grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, *_: Any) -> Verdict:
    if x.dtype == torch.float64:
        return cpu.REFUSED_DTYPE
    return cpu.matmul_verdict(grad_y, weight, is_k_by_n=True)


def _cuda_supports_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    return cuda.multi_verdict(x, weight, lora_A.shape[0], lora_A.shape[1])


def _triton_supports_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, *_: Any
) -> Verdict:  # fmt: skip
    n, k = weight.shape
    return triton.multi_verdict(x, k, n, *lora_A.shape[:2], backward=True)


def _triton_run_backward(schedule: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    pools_fit.check_multi_lora_linear_backward(*args[:10])
    from ..triton_kernels import multi_lora_linear

    return multi_lora_linear.backward(*args)


def _plain(x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple:
    """The tensors of a ``lora_linear`` whose backward costs as much."""
    return x, s, weight, lora_A[0], lora_B[0]


def _flops_backward(grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
                    adapter_ids: Tensor, ranks: Any, scalings: Any, *rest: Any) -> int:  # fmt: skip
    flops: Any = lora_linear.BACKWARD.flops
    return flops(grad_y, *_plain(x, s, weight, lora_A, lora_B), *rest)


def _bytes_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor,
    ranks: Any, scalings: Any, seed: Any, scaling: float, dropout_p: float, need_x: bool, need_A: bool, need_B: bool,
) -> int:  # fmt: skip
    m, n, k, r = _sizes(x, weight, lora_A)
    elements = m * n + m * r + (n * k + m * k if need_x else 0) + (m * k if need_A else 0)
    adapters = min(m, len(lora_A)) * r * (k + n) + need_A * lora_A.numel() + need_B * lora_B.numel()
    return elements * x.element_size() + adapters * lora_A.element_size()


BACKWARD = dispatch.register(
    OpSpec(
        name="multi_lora_linear_backward",
        schema=(
            "(Tensor grad_y, Tensor x, Tensor s, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor adapter_ids, "
            "Tensor? ranks, Tensor? scalings, Tensor? seed, float scaling, float dropout_p, bool need_x, bool need_A, "
            "bool need_B) -> (Tensor, Tensor, Tensor)"
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
    x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, _, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, lora_A, lora_B, adapter_ids, ranks, scalings, seed)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output)


def _gradients(ctx: Any, grad_y: Tensor | None, backward: Callable[..., Any]) -> tuple:
    """Gradients of (x, weight, lora_A, lora_B, adapter_ids, ranks, scalings, bias, seed, scaling, dropout_p)."""
    x, s, weight, *others = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, _, _, _, need_bias, *_ = ctx.needs_input_grad
    if grad_y is None:
        return (None,) * 11
    grad_x = grad_weight = grad_A = grad_B = grad_bias = None
    if need_x or need_A or need_B:
        grad_x, grad_A, grad_B = backward(
            grad_y, x, s, weight, *others, ctx.scaling, ctx.dropout_p, need_x, need_A, need_B
        )
    if need_weight:
        grad_weight = as_rows(grad_y).t() @ as_rows(x)
    if need_bias:
        grad_bias = as_rows(grad_y).sum(0)
    return (
        grad_x if need_x else None, grad_weight, grad_A if need_A else None, grad_B if need_B else None, None, None,
        None, grad_bias, None, None, None,
    )  # fmt: skip


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_s: None) -> tuple:
    return _gradients(ctx, grad_y, torch.ops.lora_kernels.multi_lora_linear_backward.default)


SPEC = dispatch.register(
    OpSpec(
        name="multi_lora_linear",
        schema=(
            "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor adapter_ids, Tensor? ranks, "
            "Tensor? scalings, Tensor? bias, Tensor? seed, float scaling, float dropout_p) -> (Tensor, Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports, explain=_cuda_explain),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports),
        },
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1, 7),
        flops=_flops,
        bytes=_bytes,
    )
)


def _fake_apart(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_apart = dispatch.define_native(
    "multi_lora_apart",
    "(Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor adapter_ids, Tensor? bias, float[] scalings, "
    "str schedule) -> Tensor",
    _fake_apart,
)


def _reference_apart(
    x: Tensor, weight: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], adapter_ids: Tensor, bias: Tensor | None,
    scalings: list[float],
) -> Tensor:  # fmt: skip
    y = torch.nn.functional.linear(x, weight, bias)
    x_rows, y_rows, ids = as_rows(x), as_rows(y), adapter_ids.tolist()
    for slot, (A, B, scaling) in enumerate(zip(lora_A, lora_B, scalings)):
        rows = torch.tensor([row for row, i in enumerate(ids) if i == slot], device=x.device, dtype=torch.int64)
        y_rows[rows] += (x_rows[rows] @ A.to(x.dtype).t()) @ B.to(x.dtype).t() * scaling
    return y


APART = OpSpec(
    name=SPEC.name,
    schema="",
    reference=_reference_apart,
    fake=_fake_apart,
    kernels={"cpu": Kernel(_cpu_supports, native=_apart)},
)
"""``multi_lora_linear`` without gradients and dropout, of adapters that lie each by itself, as PEFT has them: stacking
them into pools would take as long as a few rows do. Arguments as ``_reference_apart``'s; the result is y.
"""


class MultiLoRALinearFunction(EagerFunction):
    """``multi_lora_linear`` for eager autograd: one dispatch forward, one backward.

    Saves x, s [..., rank], the weight, the pools and ids (by reference) and the 8-byte seed. Call it through
    ``lk.multi_lora_linear``, which checks the arguments.
    """

    differentiable = (0, 1, 2, 3, 7)

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
