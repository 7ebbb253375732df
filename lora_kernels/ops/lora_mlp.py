"""``lora_mlp``: a gated MLP of three LoRA layers, ``down(activation(gate(x)) * up(x))``, and its gradients.

Between forward and backward x, gate(x) and up(x) are kept, and what is as narrow as the ranks: not the activation, and
not the input of ``down``, which backward forms again. In backward the memory of gate(x) and up(x) takes their
gradients, where nobody asks for the graph twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, philox
from ..spec import Autograd, Kernel, OpSpec, Verdict
from . import eager, gated_activation, lora_linear, lora_pack, pack_members
from .eager import EagerFunction, not_a_view
from .gated_activation import ACTIVATIONS

_COMPOSED = Verdict("composed", "gate and up as a pack, one elementwise pass, down: each as its own op is served")


class Layers(NamedTuple):
    """The tensors of the three layers as the op takes them, in its order."""

    gate_weight: Tensor
    gate_A: Tensor
    gate_B: Tensor
    up_weight: Tensor
    up_A: Tensor
    up_B: Tensor
    down_weight: Tensor
    down_A: Tensor
    down_B: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def pack(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights, lora_A and lora_B of gate and up."""
        return [self.gate_weight, self.up_weight], [self.gate_A, self.up_A], [self.gate_B, self.up_B]

    @property
    def down(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, lora_A and lora_B of down."""
        return self.down_weight, self.down_A, self.down_B


_TENSORS = 1 + len(Layers._fields)
_ARGUMENTS = _TENSORS + 6
_SCHEMA = (
    "(Tensor x, Tensor gate_weight, Tensor gate_A, Tensor gate_B, Tensor up_weight, Tensor up_A, Tensor up_B, "
    "Tensor down_weight, Tensor down_A, Tensor down_B, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "Tensor? seed, float gate_scaling, float up_scaling, float down_scaling, float dropout_p, str activation)"
)


def seed_of_down(seed: Tensor | None) -> Tensor | None:
    """Gate and up have the masks of the first two members of a pack, down that of a third."""
    return None if seed is None else philox.member_seed(seed, 2)


# ---------------------------------------------------------------------------------------------------- forward


class _Call(NamedTuple):
    """The op's arguments behind x."""

    layers: Layers
    seed: Tensor | None
    scalings: tuple[float, float, float]
    dropout_p: float
    activation: str


def _call(args: tuple) -> _Call:
    *tensors, seed, gate, up, down, dropout_p, activation = args
    return _Call(Layers(*tensors), seed, (gate, up, down), dropout_p, activation)


def _reference(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _call(args)
    w, p = call.layers, call.dropout_p
    (gate, up), s = lora_pack.SPEC.reference(x, *w.pack, _biases(w), call.seed, list(call.scalings[:2]), [p, p])
    h = ACTIVATIONS[call.activation](gate) * up
    down_seed = seed_of_down(call.seed)
    y, s_down = lora_linear.SPEC.reference(h, *w.down, w.down_bias, down_seed, call.scalings[2], p)
    return y, gate, up, s, s_down


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    w, lead = _call(args).layers, x.shape[:-1]
    y, gate, up, s_down = (
        x.new_empty((*lead, factor.shape[0])) for factor in (w.down_weight, w.gate_weight, w.up_weight, w.down_A)
    )
    return y, gate, up, pack_members.empty_s(x, [w.gate_A, w.up_A]), s_down


def _biases(w: Layers) -> list[Tensor]:
    """As ``lora_pack`` takes them: none, or an empty one for whom has none."""
    if w.gate_bias is None and w.up_bias is None:
        return []
    return [w.gate_weight.new_empty(0) if bias is None else bias for bias in (w.gate_bias, w.up_bias)]


def _gate_and_up(spec: OpSpec, x: Tensor, call: _Call) -> Any:
    p = call.dropout_p
    return dispatch.run(spec, x, *call.layers.pack, _biases(call.layers), call.seed, list(call.scalings[:2]), [p, p])


def _run(schedule: str, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _call(args)
    (gate, up), s = _gate_and_up(lora_pack.SPEC, x, call)
    h = dispatch.run(gated_activation.SPEC, gate, up, call.activation)
    y, s_down = _run_down(lora_linear.SPEC, h, call)
    return y, gate, up, s, s_down


def _run_inference(schedule: str, x: Tensor, *args: Any) -> tuple[Tensor]:
    """Nothing is kept: the input of down lies where gate(x) was."""
    call = _call(args)
    gate, up = _gate_and_up(lora_pack.INFERENCE, x, call)[0]
    dispatch.run(gated_activation.OUT, gate, up, call.activation, gate)
    return (_run_down(lora_linear.INFERENCE, gate, call)[0],)


def _run_down(spec: OpSpec, h: Tensor, call: _Call) -> Any:
    w = call.layers
    return dispatch.run(spec, h, *w.down, w.down_bias, seed_of_down(call.seed), call.scalings[2], call.dropout_p)


def _supports(*_: Any) -> Verdict:
    return _COMPOSED


def _flops(x: Tensor, *args: Any) -> int:
    w, m = _call(args).layers, x.shape[:-1].numel()
    return sum(2 * m * t.numel() for t in w[:9])


def _bytes(x: Tensor, *args: Any) -> int:
    w, m = _call(args).layers, x.shape[:-1].numel()
    activations = x.numel() + m * (2 * len(w.gate_weight) + len(w.down_weight))
    return (activations + sum(t.numel() for t in w[:9])) * x.element_size()


# --------------------------------------------------------------------------------------------------- backward


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    return _backward_by(lambda spec, *of_part: spec.reference(*of_part), False, *args)


def _run_backward(schedule: str, *args: Any) -> tuple[Tensor, ...]:
    return _backward_by(dispatch.run, False, *args)


def _run_backward_in_place(schedule: str, *args: Any) -> tuple[Tensor, ...]:
    return _backward_by(dispatch.run, True, *args)


def _backward_by(
    run: Callable[..., Any], in_place: bool, grad_y: Tensor, x: Tensor, gate: Tensor, up: Tensor, s: Tensor,
    s_down: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x and of the six factors. ``run(spec, *args)`` computes an op.

    ``in_place``: gate and up may be written to.
    """
    *args, needs = rest
    call = _call((*args[:9], None, None, None, *args[9:]))
    w, p = call.layers, call.dropout_p
    need_x, gate_A, gate_B, up_A, up_B, down_A, down_B = needs
    need_pack = need_x or gate_A or gate_B or up_A or up_B
    h = run(gated_activation.SPEC, gate, up, call.activation)
    grad_h, grad_down_A, grad_down_B = run(
        lora_linear.BACKWARD, grad_y, h, s_down, *w.down, seed_of_down(call.seed), call.scalings[2], p, need_pack,
        down_A, down_B,
    )  # fmt: skip
    if not need_pack:
        nothing = x.new_empty(0)
        return nothing, nothing, nothing, nothing, nothing, grad_down_A, grad_down_B
    del h
    if in_place:
        grad_gate, grad_up = gate, up
        run(gated_activation.BACKWARD_OUT, grad_h, gate, up, call.activation, grad_gate, grad_up)
    else:
        grad_gate, grad_up = run(gated_activation.BACKWARD, grad_h, gate, up, call.activation)
    del grad_h
    grad_x, grad_As, grad_Bs = run(
        lora_pack.BACKWARD, [grad_gate, grad_up], x, s, *w.pack, call.seed, list(call.scalings[:2]), [p, p], need_x,
        [gate_A, up_A], [gate_B, up_B],
    )  # fmt: skip
    return grad_x, grad_As[0], grad_Bs[0], grad_As[1], grad_Bs[1], grad_down_A, grad_down_B


def _fake_backward(
    grad_y: Tensor, x: Tensor, gate: Tensor, up: Tensor, s: Tensor, s_down: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *args, needs = rest
    wanted = (x, args[1], args[2], args[4], args[5], args[7], args[8])
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(wanted, needs, strict=True))


def _flops_backward(grad_y: Tensor, x: Tensor, gate: Tensor, up: Tensor, s: Tensor, s_down: Tensor, *rest: Any) -> int:
    *args, needs = rest
    m, factors = x.shape[:-1].numel(), (1, 2, 4, 5, 7, 8)
    flops = sum(2 * m * args[i].numel() for i in (0, 3, 6) if needs[0] or i == 6)
    return flops + sum(2 * m * args[i].numel() * (1 + need) for i, need in zip(factors, needs[1:]))


def _bytes_backward(grad_y: Tensor, x: Tensor, gate: Tensor, up: Tensor, s: Tensor, s_down: Tensor, *rest: Any) -> int:
    *args, needs = rest
    elements = grad_y.numel() + (1 + needs[0]) * x.numel() + gate.numel() + up.numel()
    return (elements + sum(t.numel() for t in args[:9])) * x.element_size()


BACKWARD = dispatch.register(
    OpSpec(
        name="lora_mlp_backward",
        schema=(
            "(Tensor grad_y, Tensor x, Tensor gate, Tensor up, Tensor s, Tensor s_down, Tensor gate_weight, "
            "Tensor gate_A, Tensor gate_B, Tensor up_weight, Tensor up_A, Tensor up_B, Tensor down_weight, "
            "Tensor down_A, Tensor down_B, Tensor? seed, float gate_scaling, float up_scaling, float down_scaling, "
            "float dropout_p, str activation, bool[] needs) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
        reference=_reference_backward,
        fake=_fake_backward,
        kernels={name: Kernel(_supports, _run_backward) for name in ("cuda", "triton", "cpu")},
        flops=_flops_backward,
        bytes=_bytes_backward,
    )
)

LAST_BACKWARD = replace(
    BACKWARD, kernels={name: Kernel(_supports, _run_backward_in_place) for name in BACKWARD.kernels}
)
"""``lora_mlp_backward`` that may write to gate and up."""

# --------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, *tensors = inputs[: _TENSORS + 1]
    ctx.numbers = inputs[_TENSORS + 1 :]
    weights, seed = tensors[:9], tensors[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], *weights, seed)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _gradients(ctx: Any, grad_y: Tensor | None, backward: Callable[..., Any]) -> tuple:
    """Gradients of the op's arguments; ``backward`` calls the op."""
    none: list[Tensor | None] = [None] * _ARGUMENTS
    places = (0, 2, 3, 5, 6, 8, 9)  # of x and of the factors
    needs = [ctx.needs_input_grad[i] for i in places]
    if grad_y is None or not any(needs):
        return tuple(none)
    found = backward(grad_y, *ctx.saved_tensors, *ctx.numbers, needs)
    for i, need, gradient in zip(places, needs, found, strict=True):
        none[i] = gradient if need else None
    return tuple(none)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple:
    return _gradients(ctx, grad_y, torch.ops.lora_kernels.lora_mlp_backward.default)


SPEC = dispatch.register(
    OpSpec(
        name="lora_mlp",
        schema=f"{_SCHEMA} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        kernels={name: Kernel(_supports, _run) for name in ("cuda", "triton", "cpu")},
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1, 4, 7, 10, 11, 12),
        flops=_flops,
        bytes=_bytes,
    )
)

INFERENCE = replace(SPEC, kernels={name: Kernel(_supports, _run_inference) for name in SPEC.kernels})
"""``lora_mlp`` where only y, the first result, is asked for."""


class LoRAMLPFunction(EagerFunction):
    """``lora_mlp`` for eager autograd.

    Saves x, gate(x), up(x), s of the three layers [..., rank], the weights (by reference) and the 8-byte seed. Call it
    through ``lk.lora_mlp``, which checks the arguments.
    """

    differentiable = (0, 2, 3, 5, 6, 8, 9)

    @staticmethod
    def results(output: tuple[Tensor, ...]) -> Tensor:
        return output[0]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        y, *kept = eager.forward(ctx, SPEC, args, _save)
        ctx.addresses = None if _are_hooked() else [t.data_ptr() for t in kept[:2]]
        return not_a_view(y)

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple:  # type: ignore[override]
        run = _run_any_backward
        if ctx.addresses is not None and _is_last_backward():
            _, gate, up, *_ = ctx.saved_tensors
            if [gate.data_ptr(), up.data_ptr()] == ctx.addresses:
                run = _run_last_backward
        return _gradients(ctx, grad_y, run)


def _run_any_backward(*args: Any) -> tuple[Tensor, ...]:
    return dispatch.run(BACKWARD, *args)


def _run_last_backward(*args: Any) -> tuple[Tensor, ...]:
    return dispatch.run(LAST_BACKWARD, *args)


def _are_hooked() -> bool:
    """Whether hooks get what is saved, and may keep it (``torch.autograd.graph.saved_tensors_hooks``)."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(False) is not None


def _is_last_backward() -> bool:
    """Whether autograd frees what was saved as it goes (no ``retain_graph``)."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()
