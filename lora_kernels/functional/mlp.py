"""``lora_mlp``: arguments are checked here, then dispatched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..ops import eager
from ..ops import lora_mlp as _op
from ..ops.lora_mlp import LoRAMLPFunction
from .checks import check_adapter, check_adapter_dtype, check_base, check_branch, sizes_fit
from .gated import check_activation
from .why import Zeros, explains

_NAME = "lora_mlp"


class Projection(NamedTuple):
    """A LoRA layer of a block, as ``lora_linear`` takes it.

    Attributes:
        weight: [out_features, in_features], frozen.
        lora_A: [rank, in_features].
        lora_B: [out_features, rank].
        bias: [out_features], frozen.
        scaling: factor of the update: a number, or a tensor of one element.

    Dtypes and errors are those of ``lora_linear``; nothing is checked before the call that takes the layer.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A gated MLP (Shazeer, "GLU Variants Improve Transformer", 2020) of three LoRA layers in one op.

    Equivalent to::

        h = act(lora_linear(x, *gate)) * lora_linear(x, *up)
        lora_linear(h, *down)

    where gate and up are a ``lora_pack``. For backward x and the results of gate and up are saved, [..., intermediate]
    each, and s of the three, [..., rank]; not act(gate(x)), and not h, which backward forms again. Their memory takes
    their own gradients, unless the graph is retained. The masks are those of the seeds of members 0, 1 and 2
    (``lora_pack``): gate, up, down.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64. Any strides.
        gate, up: (weight, lora_A, lora_B, bias, scaling) of layers from in_features to intermediate; of ``lora_linear``
            each. The weights and biases are frozen.
        down: the same of the layer from intermediate back to out_features.
        activation: "silu", "gelu", "gelu_tanh" (gelu by the approximation with tanh) or "relu".
        dropout_p: probability of zeroing an element of each layer's input on its LoRA branch. Active when ``training``.
        training: whether dropout is applied.
        seed: the 64-bit key of the masks, as in ``lora_linear``.

    Returns:
        [..., out_features], dtype of x.

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype that does not fit.
        ValueError: shapes, devices or numbers do not fit, a weight or bias requires grad, or there is no such
            activation. The message names the argument. Backward cannot be differentiated again (``RuntimeError``).
    """
    args = _arguments(x, gate, up, down, activation, dropout_p, training, seed)
    return eager.call(_op.SPEC, LoRAMLPFunction, args, inference=_op.INFERENCE)


def lora_mlp_of_layers(x: Tensor, layers: list[Projection], activation: str, dropout_p: float) -> Tensor:
    """``lora_mlp`` for layers that have been looked at, as in ``lora_linear_of_layer``: types, dtypes, transforms, and
    that weights and biases are frozen.
    """
    gate, up, down = layers
    if (
        dropout_p == 0.0 and not is_compiling() and not dispatch.any_autocast()
        and all(type(given.scaling) is float for given in layers)
        and all(given.bias is None or given.bias.dtype == x.dtype for given in layers)
        and sizes_fit(x, *gate[:4]) and sizes_fit(x, *up[:4]) and _follows(gate, up, down)
    ):  # fmt: skip
        args = (
            x, *gate[:3], *up[:3], *down[:3], gate.bias, up.bias, down.bias, None, gate.scaling, up.scaling,
            down.scaling, 0.0, activation,
        )  # fmt: skip
        return eager.run(LoRAMLPFunction, args, _op.INFERENCE)
    return lora_mlp(x, gate, up, down, activation, dropout_p=dropout_p, training=True)


def _follows(gate: Projection, up: Projection, down: Projection) -> bool:
    """Whether down takes what gate and up give."""
    rank, intermediate = down.lora_A.shape
    n, k = down.weight.shape
    return (
        len(gate.weight) == len(up.weight) == intermediate == k
        and down.lora_B.shape == (n, rank)
        and (down.bias is None or down.bias.shape == (n,))
        and down.weight.device == gate.weight.device == down.lora_A.device == down.lora_B.device
    )


def _example(zeros: Zeros) -> tuple:
    gate = Projection(zeros(1536, 576), zeros(16, 576), zeros(1536, 16))
    return zeros(512, 576), gate, gate, Projection(zeros(576, 1536), zeros(16, 1536), zeros(576, 16))


@explains(_NAME, _op.SPEC, example=_example)
def arguments(
    x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str = "silu", *,
    dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> tuple:  # fmt: skip
    """The op's positional arguments, checked; no seed is drawn."""
    return _arguments(x, gate, up, down, activation, dropout_p, training, 0 if seed is None else seed)


def _arguments(
    x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str, dropout_p: float, training: bool,
    seed: int | Tensor | None,
) -> tuple:  # fmt: skip
    check_activation(_NAME, activation)
    layers = [Projection(*given) for given in (gate, up, down)]
    for name, layer in zip(("gate", "up"), layers):
        _check(f"{_NAME}: {name}", x, layer)
    intermediate = layers[0].weight.shape[0]
    if layers[1].weight.shape[0] != intermediate:
        raise ValueError(
            f"{_NAME}: up must have {intermediate} out_features like gate, got weight {tuple(layers[1].weight.shape)}"
        )
    _check(f"{_NAME}: down", x.new_empty((0, intermediate)), layers[2])
    branches = [
        check_branch(_NAME, x, layer.lora_B, layer.bias, layer.scaling, dropout_p, training, 0 if i else seed)
        for i, layer in enumerate(layers)
    ]
    factors = [(layer.weight, layer.lora_A, branch[0]) for layer, branch in zip(layers, branches)]
    biases, scalings = (branch[1] for branch in branches), (branch[3] for branch in branches)
    _, _, seed_tensor, _, p = branches[0]
    return x, *(t for of_layer in factors for t in of_layer), *biases, seed_tensor, *scalings, p, activation


def _check(op: str, x: Tensor, layer: Projection) -> None:
    weight, bias = layer.weight, layer.bias
    check_base(op, x, weight, bias)
    check_adapter(op, weight, layer.lora_A, layer.lora_B)
    if layer.lora_A.dtype != weight.dtype and not dispatch.autocast_enabled(x.device.type):
        check_adapter_dtype(op, "weight", weight.dtype, layer.lora_A)
    if torch.is_grad_enabled():
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.requires_grad:
                raise ValueError(f"{op}: {name} must be frozen (requires_grad=False)")
