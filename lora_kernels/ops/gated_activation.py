"""``gated_activation``: ``h = activation(gate) * up``, as a gated MLP has it between its layers, and its gradients.

Of Shazeer, "GLU Variants Improve Transformer", 2020. Nothing is saved but gate and up, and their own memory can take
the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..plain import FLOATS
from ..reasons import Reason
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu, cuda, fits, triton
from . import eager
from .eager import EagerFunction

_PASS = Verdict("elementwise", "one pass, in fp32 inside")
_DTYPE = Verdict(None, Reason.DTYPE)
_SIZE = Verdict(None, Reason.SIZE)

# ------------------------------------------------------------------------------------------------- definition


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}
"""What ``activation`` may be."""

_aten = torch.ops.aten
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda grad, x: _aten.silu_backward.default(grad, x),
    "gelu": lambda grad, x: _aten.gelu_backward.default(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward.default(grad, x, approximate="tanh"),
    "relu": lambda grad, x: _aten.threshold_backward.default(grad, x, 0),
}
"""grad times the slope of the activation at x."""


def _reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


def _reference_backward(grad_h: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _SLOPES[activation](grad_h * up, gate), grad_h * ACTIVATIONS[activation](gate)


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(grad_h: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


# --------------------------------------------------------------------------------------------------- backends


def _cpu_supports(t: Tensor, *_: Any) -> Verdict:
    return _PASS if t.dtype in FLOATS and t.dtype != torch.float64 else cpu.REFUSED_DTYPE


def _cuda_supports(t: Tensor, *_: Any) -> Verdict:
    if t.dtype not in cuda.PROMPT_DTYPES:
        return _DTYPE
    return cuda.refusal(t.device) or (_SIZE if t.numel() > cuda.MAX_SIZE * 256 else _PASS)


def _triton_supports(t: Tensor, *_: Any) -> Verdict:
    return triton.elementwise_refusal(t) or _PASS


_native_out = dispatch.define_native(
    "gated_activation_out",
    "(Tensor gate, Tensor up, str activation, Tensor(a!) h) -> ()",
    lambda *_: None,
)
_native_backward_out = dispatch.define_native(
    "gated_activation_backward_out",
    "(Tensor grad_h, Tensor gate, Tensor up, str activation, Tensor(a!) grad_gate, Tensor(b!) grad_up) -> ()",
    lambda *_: None,
)


def _triton_out(gate: Tensor, up: Tensor, activation: str, h: Tensor) -> None:
    from ..triton_kernels import gated_activation

    gated_activation.forward(gate, up, activation, h)


def _triton_backward_out(
    grad_h: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor
) -> None:
    from ..triton_kernels import gated_activation

    gated_activation.backward(grad_h, gate, up, activation, grad_gate, grad_up)


def _new(forward: Callable[..., None]) -> Callable[..., Tensor]:
    """A kernel's forward into a tensor of its own."""

    def run(schedule: str, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        fits.check_alike(gate, up)
        h = torch.empty_like(gate)
        forward(gate, up, activation, h)
        return h

    return run


def _new_backward(backward: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A kernel's backward into tensors of their own."""

    def run(schedule: str, grad_h: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        grad_h, gate, up = grad_h.contiguous(), gate.contiguous(), up.contiguous()
        fits.check_alike(gate, up, grad_h)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        backward(grad_h, gate, up, activation, grad_gate, grad_up)
        return grad_gate, grad_up

    return run


BACKWARD = dispatch.register(
    OpSpec(
        name="gated_activation_backward",
        schema="(Tensor grad_h, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
        reference=_reference_backward,
        fake=_fake_backward,
        kernels={
            "cuda": Kernel(_cuda_supports, _new_backward(_native_backward_out)),
            "triton": Kernel(_triton_supports, _new_backward(_triton_backward_out)),
            "cpu": Kernel(_cpu_supports, _new_backward(_native_backward_out)),
        },
        flops=lambda grad_h, *_: 10 * grad_h.numel(),
        bytes=lambda grad_h, *_: 5 * grad_h.numel() * grad_h.element_size(),
    )
)

# ---------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, up)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_h: Tensor | None) -> tuple:
    if grad_h is None:
        return None, None, None
    gate, up = ctx.saved_tensors
    return *torch.ops.lora_kernels.gated_activation_backward.default(grad_h, gate, up, ctx.activation), None


SPEC = dispatch.register(
    OpSpec(
        name="gated_activation",
        schema="(Tensor gate, Tensor up, str activation) -> Tensor",
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports, _new(_native_out)),
            "triton": Kernel(_triton_supports, _new(_triton_out)),
            "cpu": Kernel(_cpu_supports, _new(_native_out)),
        },
        autograd=Autograd(_setup_context, _backward),
        flops=lambda gate, *_: 6 * gate.numel(),
        bytes=lambda gate, *_: 3 * gate.numel() * gate.element_size(),
    )
)

# ---------------------------------------------------------------------------------------- results in given memory


def _into(kernel: Callable[..., None]) -> Callable[..., None]:
    return lambda schedule, *args: kernel(*args)


def _reference_out(gate: Tensor, up: Tensor, activation: str, h: Tensor) -> None:
    h.copy_(_reference(gate, up, activation))


def _reference_backward_out(
    grad_h: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor
) -> None:
    of_gate, of_up = _reference_backward(grad_h, gate, up, activation)
    grad_gate.copy_(of_gate)
    grad_up.copy_(of_up)


OUT = OpSpec(
    name=SPEC.name,
    schema="",
    reference=_reference_out,
    fake=lambda *_: None,
    kernels={
        "cuda": Kernel(_cuda_supports, _into(_native_out)),
        "triton": Kernel(_triton_supports, _into(_triton_out)),
        "cpu": Kernel(_cpu_supports, _into(_native_out)),
    },
)
"""``gated_activation`` into a last argument h, which may be gate or up. All are contiguous."""

BACKWARD_OUT = OpSpec(
    name=BACKWARD.name,
    schema="",
    reference=_reference_backward_out,
    fake=lambda *_: None,
    kernels={
        "cuda": Kernel(_cuda_supports, _into(_native_backward_out)),
        "triton": Kernel(_triton_supports, _into(_triton_backward_out)),
        "cpu": Kernel(_cpu_supports, _into(_native_backward_out)),
    },
)
"""Its gradients into two last arguments, which may be gate and up. All are contiguous."""


class GatedActivationFunction(EagerFunction):
    """``gated_activation`` for eager autograd. Saves gate and up, by reference."""

    differentiable = (0, 1)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        return eager.forward(ctx, SPEC, args, _setup_context)

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_h: Tensor | None) -> tuple:  # type: ignore[override]
        if grad_h is None:
            return None, None, None
        gate, up = ctx.saved_tensors
        return *dispatch.run(BACKWARD, grad_h, gate, up, ctx.activation), None
