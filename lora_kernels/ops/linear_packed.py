"""``linear_packed``: ``F.linear`` with a quantised weight, which does not train; the base product of
``lora_linear_packed`` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu_packed, gpu_packed
from ..support.gpu_packed import COMPOSED, SLABS
from ..support.packed import TORCH_DECODED
from . import eager
from .dequantize import PARTS, WEIGHT, WEIGHT_ARGS, decoded_for_product, for_product, nbytes


def _reference(x: Tensor, *rest: Any) -> Tensor:
    *weight, bias = rest
    return F.linear(x, for_product(tuple(weight), x), bias)


def _cpu_supports(x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *_: Any) -> Verdict:
    return cpu_packed.product_verdict(x, layout, n, k)


def _cpu_supports_backward(grad_y: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *_: Any) -> Verdict:
    return cpu_packed.product_verdict(grad_y, layout, n, k, is_gradient=True)


def _cuda_supports(x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *_: Any) -> Verdict:
    verdict = gpu_packed.composed_verdict("cuda", x.device, layout)
    return SLABS if verdict is COMPOSED and gpu_packed.has_slabs(x, n, k, layout) else verdict


def _cuda_supports_backward(grad_y: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *_: Any) -> Verdict:
    verdict = gpu_packed.composed_verdict("cuda", grad_y.device, layout)
    return SLABS if verdict is COMPOSED and gpu_packed.has_slabs(grad_y, k, n, layout) else verdict


def _triton_supports(x: Tensor, weight: list[Tensor], layout: str, *_: Any) -> Verdict:
    return gpu_packed.composed_verdict("triton", x.device, layout)


_slabs = dispatch.define_native(
    "linear_slabs",
    f"(Tensor x, {PARTS}, Tensor? bias, int rows) -> Tensor",
    lambda x, weight, layout, n, *_: x.new_empty((*x.shape[:-1], n)),
)
_slabs_backward = dispatch.define_native(
    "linear_slabs_backward",
    f"(Tensor grad_y, {PARTS}, int columns) -> Tensor",
    lambda grad_y, weight, layout, n, k, *_: grad_y.new_empty((*grad_y.shape[:-1], k)),
)


def _cuda_run(schedule: str, x: Tensor, *rest: Any) -> Tensor:
    if schedule != SLABS.schedule:
        return _run(schedule, x, *rest)
    *described, _, bias = rest
    return _slabs(x, *described, bias, gpu_packed.slab(x.shape[:-1].numel(), described[2]))


def _cuda_run_backward(schedule: str, grad_y: Tensor, *weight: Any) -> Tensor:
    if schedule != SLABS.schedule:
        return _run_backward(schedule, grad_y, *weight)
    *described, _ = weight
    return _slabs_backward(grad_y, *described, gpu_packed.slab(grad_y.shape[:-1].numel(), described[3]))


def _run(schedule: str, x: Tensor, *rest: Any) -> Tensor:
    *weight, bias = rest
    return F.linear(x, decoded_for_product(tuple(weight), x), bias)


def _run_backward(schedule: str, grad_y: Tensor, *weight: Any) -> Tensor:
    return grad_y @ decoded_for_product(weight, grad_y)


def _flops(x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *_: Any) -> int:
    return 2 * x.shape[:-1].numel() * n * k


def _bytes(x: Tensor, weight: list[Tensor], layout: str, n: int, k: int, *_: Any) -> int:
    return nbytes(weight) + x.shape[:-1].numel() * (n + k) * x.element_size()


BACKWARD = dispatch.register(
    OpSpec(
        name="linear_packed_backward",
        schema=f"(Tensor grad_y, {WEIGHT}) -> Tensor",
        reference=lambda grad_y, *weight: grad_y @ for_product(weight, grad_y),
        fake=lambda grad_y, weight, layout, n, k, block, dtype: grad_y.new_empty((*grad_y.shape[:-1], k)),
        kernels={
            "cuda": Kernel(_cuda_supports_backward, _cuda_run_backward),
            "triton": Kernel(_triton_supports, _run_backward),
            "cpu": Kernel(_cpu_supports_backward, _run_backward, run_schedules=(TORCH_DECODED.schedule,)),
        },
        flops=_flops,
        bytes=_bytes,
    )
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, parts, *ctx.weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*parts)
    eager.keep_what_was_asked(ctx)


@eager.backward
def _backward(ctx: Any, grad_y: Tensor | None) -> tuple:
    need_x, *_, need_bias = ctx.needs_input_grad
    if need_bias:
        raise RuntimeError("linear_packed: bias must not require grad")
    grad_x, parts = None, list(ctx.saved_tensors)
    if grad_y is not None and need_x:
        grad_x = torch.ops.lora_kernels.linear_packed_backward.default(grad_y, parts, *ctx.weight)
    return grad_x, [None] * len(parts), *[None] * WEIGHT_ARGS


SPEC = dispatch.register(
    OpSpec(
        name="linear_packed",
        schema=f"(Tensor x, {WEIGHT}, Tensor? bias) -> Tensor",
        reference=_reference,
        fake=lambda x, weight, layout, n, *_: x.new_empty((*x.shape[:-1], n)),
        kernels={
            "cuda": Kernel(_cuda_supports, _cuda_run),
            "triton": Kernel(_triton_supports, _run),
            "cpu": Kernel(_cpu_supports, _run, run_schedules=(TORCH_DECODED.schedule,)),
        },
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1 + WEIGHT_ARGS),
        flops=_flops,
        bytes=_bytes,
    )
)
