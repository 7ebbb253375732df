"""``frozen_linear``: ``F.linear`` with a weight that does not train.

It is the base product of ``lora_linear`` alone. On a CPU without native bf16/fp16 matmul it goes through fp32 in
blocks, which is many times faster than torch's portable loop; a few fp32 rows are the decode kernel's, and many go to
oneDNN where that is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu
from . import eager


def _flops(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return 2 * x.numel() * weight.shape[0]


def _bytes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    rows = x.shape[:-1].numel()
    return (x.numel() + weight.numel() + rows * weight.shape[0]) * x.element_size()


def _cpu_supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Verdict:
    return cpu.DECODE if cpu.reads_weight_once(x, weight) else cpu.matmul_verdict(x, weight)


def _cpu_supports_backward(grad_y: Tensor, weight: Tensor) -> Verdict:
    return cpu.matmul_verdict(grad_y, weight, is_k_by_n=True)


BACKWARD = dispatch.register(
    OpSpec(
        name="frozen_linear_backward",
        schema="(Tensor grad_y, Tensor weight) -> Tensor",
        reference=torch.matmul,
        fake=lambda grad_y, weight: grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])),
        kernels={"cpu": Kernel(_cpu_supports_backward)},
        flops=lambda grad_y, weight: 2 * grad_y.numel() * weight.shape[1],
        bytes=lambda grad_y, weight: _bytes(grad_y, weight.t()),
    )
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1])
    eager.keep_what_was_asked(ctx)


@eager.backward
def _backward(ctx: Any, grad_y: Tensor | None) -> tuple:
    (weight,) = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    if need_weight or need_bias:
        raise RuntimeError("frozen_linear: weight and bias must not require grad; use torch.nn.functional.linear")
    if grad_y is None or not need_x:
        return None, None, None
    return torch.ops.lora_kernels.frozen_linear_backward.default(grad_y, weight), None, None


SPEC = dispatch.register(
    OpSpec(
        name="frozen_linear",
        schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        reference=torch.nn.functional.linear,
        fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
        kernels={"cpu": Kernel(_cpu_supports)},
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1, 2),
        flops=_flops,
        bytes=_bytes,
    )
)
