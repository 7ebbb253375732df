"""``prefix_kv``: trainable rows as the keys and values that every layer attends to, and its gradient.

Prefix tuning is from Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..plain import FLOATS, sum_dtype
from ..reasons import Reason
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cuda, fits, triton
from . import eager
from .eager import EagerFunction

_TRANSPOSE = Verdict("transpose", "heads written in one pass")
_SUM = Verdict("row_sum", "a sum over the batch, in its order")
_REFUSED_DTYPE = Verdict(None, Reason.DTYPE)

# ---------------------------------------------------------------------------------------------------- forward


def _reference(prefix: Tensor, layers: int, heads: int, batch: int, copies: bool, dtype: torch.dtype) -> Tensor:
    tokens, width = prefix.shape
    rows = prefix.view(tokens, layers, 2, heads, width // (2 * layers * heads))
    kv = rows.permute(1, 2, 3, 0, 4).unsqueeze(2)
    if copies:
        kv = kv.expand(-1, -1, batch, -1, -1, -1)
    # An op returns no view of its input.
    written = kv.to(dtype, memory_format=torch.contiguous_format, copy=True)
    return written.expand(-1, -1, batch, -1, -1, -1)


def _fake(prefix: Tensor, layers: int, heads: int, batch: int, copies: bool, dtype: torch.dtype) -> Tensor:
    tokens, width = prefix.shape
    written = prefix.new_empty(
        (layers, 2, batch if copies else 1, heads, tokens, width // (2 * layers * heads)), dtype=dtype
    )
    return written.expand(-1, -1, batch, -1, -1, -1)


def _cpu_supports(prefix: Tensor, layers: int, heads: int, batch: int, copies: bool, dtype: torch.dtype) -> Verdict:
    return _TRANSPOSE if prefix.dtype in FLOATS and dtype in FLOATS else _REFUSED_DTYPE


def _cuda_supports(prefix: Tensor, layers: int, heads: int, batch: int, copies: bool, dtype: torch.dtype) -> Verdict:
    tokens, width = prefix.shape
    rows = tokens * (batch if copies else 1) * 2 * layers * heads
    return cuda.prompt_refusal(prefix.device, dtype, prefix.dtype, rows, width) or _TRANSPOSE


def _triton_supports(prefix: Tensor, layers: int, heads: int, batch: int, copies: bool, dtype: torch.dtype) -> Verdict:
    tokens, width = prefix.shape
    return triton.rows_refusal(prefix.device, (prefix.dtype, dtype), 1, tokens, width) or _TRANSPOSE


def _triton_run(schedule: str, *args: Any) -> Tensor:
    fits.check_prefix_kv(*args[:4])
    from ..triton_kernels import prefix_kv

    return prefix_kv.forward(*args)


def _bytes(prefix: Tensor, layers: int, heads: int, batch: int, copies: bool, dtype: torch.dtype) -> int:
    return prefix.numel() * (prefix.element_size() + (batch if copies else 1) * dtype.itemsize)


# --------------------------------------------------------------------------------------------------- backward


def _reference_backward(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    _, heads, tokens, head_dim = grads[0].shape
    wide = sum_dtype(grads[0].dtype, dtype)
    total = torch.stack([grad.sum(0, dtype=wide) for grad in grads])
    return total.permute(2, 0, 1, 3).reshape(tokens, len(grads) * heads * head_dim).to(dtype)


def _fake_backward(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    _, heads, tokens, head_dim = grads[0].shape
    return grads[0].new_empty((tokens, len(grads) * heads * head_dim), dtype=dtype)


def _cpu_supports_backward(grads: list[Tensor], dtype: torch.dtype) -> Verdict:
    return _SUM if grads[0].dtype in FLOATS and dtype in FLOATS else _REFUSED_DTYPE


def _cuda_supports_backward(grads: list[Tensor], dtype: torch.dtype) -> Verdict:
    batch, heads, tokens, head_dim = grads[0].shape
    rows, columns = batch * heads * tokens, len(grads) * heads * head_dim
    return cuda.prompt_refusal(grads[0].device, grads[0].dtype, dtype, rows, columns) or _SUM


def _triton_supports_backward(grads: list[Tensor], dtype: torch.dtype) -> Verdict:
    _, heads, tokens, head_dim = grads[0].shape
    columns = len(grads) * heads * head_dim
    return triton.rows_refusal(grads[0].device, (grads[0].dtype, dtype), 1, tokens, columns) or _SUM


def _triton_run_backward(schedule: str, *args: Any) -> Tensor:
    fits.check_prefix_kv_backward(args[0])
    from ..triton_kernels import prefix_kv

    return prefix_kv.backward(*args)


def _flops_backward(grads: list[Tensor], dtype: torch.dtype) -> int:
    return sum(grad.numel() for grad in grads)


def _bytes_backward(grads: list[Tensor], dtype: torch.dtype) -> int:
    batch = max(grads[0].shape[0], 1)
    elements = sum(grad.numel() for grad in grads)
    return elements * grads[0].element_size() + elements // batch * dtype.itemsize


BACKWARD = dispatch.register(
    OpSpec(
        name="prefix_kv_backward",
        schema="(Tensor[] grads, ScalarType dtype) -> Tensor",
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

_INPUTS = 6


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * _INPUTS
    grads = list(grad.flatten(0, 1).unbind(0))
    return torch.ops.lora_kernels.prefix_kv_backward.default(grads, ctx.dtype), *(None,) * (_INPUTS - 1)


SPEC = dispatch.register(
    OpSpec(
        name="prefix_kv",
        schema="(Tensor prefix, SymInt layers, SymInt heads, SymInt batch, bool copies, ScalarType dtype) -> Tensor",
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports),
        },
        autograd=Autograd(_setup_context, _backward),
        flops=lambda *_: 0,
        bytes=_bytes,
    )
)


class PrefixKVFunction(EagerFunction):
    """``prefix_kv`` for eager autograd, one output for the keys and one for the values of each layer.

    Nothing is saved. Their gradients are summed where they are: no tensor of all of them is made. Call it through
    ``lk.prefix_kv``, which checks the arguments.
    """

    differentiable = (0,)

    @staticmethod
    def results(output: Tensor) -> tuple[Tensor, ...]:
        return parts(output)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        output = eager.forward(ctx, SPEC, args, _setup_context)
        ctx.part = output[0, 0].shape, output.dtype, output.device
        return parts(output)

    @staticmethod
    @eager.backward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # type: ignore[override]
        if all(grad is None for grad in grads):
            return (None,) * _INPUTS
        if any(grad is None for grad in grads):  # of layers that nobody attended to
            shape, dtype, device = ctx.part
            zero = torch.zeros(shape[-1], dtype=dtype, device=device).expand(shape)
            grads = tuple(zero if grad is None else grad for grad in grads)
        return dispatch.run(BACKWARD, list(grads), ctx.dtype), *(None,) * (_INPUTS - 1)


def parts(kv: Tensor) -> tuple[Tensor, ...]:
    """[layers, 2, ...] as keys and values in turn, layer by layer: views."""
    return kv.flatten(0, 1).unbind(0)
