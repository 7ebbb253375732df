"""``gated_activation``: arguments are checked here, then dispatched."""

from __future__ import annotations

from torch import Tensor

from ..ops import eager
from ..ops import gated_activation as _op
from ..ops.gated_activation import ACTIVATIONS, GatedActivationFunction
from ..plain import FLOATS
from .checks import check_dense
from .why import explains


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """What stands between the layers of a gated MLP (Shazeer, "GLU Variants Improve Transformer", 2020), in one pass.

    Equivalent to ``F.silu(gate) * up``, but rounded once. For backward gate and up are saved, by reference.

    Args:
        gate, up: of one shape; float32, bfloat16, float16 or float64.
        activation: "silu", "gelu", "gelu_tanh" (gelu by the approximation with tanh) or "relu".

    Returns:
        As large as gate, of its dtype.

    Raises:
        TypeError: gate or up is not a dense floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, or there is no such activation.
    """
    return eager.call(_op.SPEC, GatedActivationFunction, arguments(gate, up, activation))


@explains("gated_activation", _op.SPEC, example=lambda zeros: (zeros(512, 1536), zeros(512, 1536)))
def arguments(gate: Tensor, up: Tensor, activation: str = "silu") -> tuple:
    """The op's positional arguments, checked."""
    op = "gated_activation"
    check_activation(op, activation)
    for name, t in (("gate", gate), ("up", up)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        check_dense(op, name, t)
    if gate.dtype not in FLOATS:
        raise TypeError(f"{op}: gate must be float32, bfloat16, float16 or float64, got {gate.dtype}")
    if up.dtype != gate.dtype:
        raise TypeError(f"{op}: up must be {gate.dtype} like gate, got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up must be {tuple(gate.shape)} like gate, got shape {tuple(up.shape)}")
    if up.device != gate.device:
        raise ValueError(f"{op}: up must be on {gate.device} like gate, got {up.device}")
    return gate, up, activation


def check_activation(op: str, activation: str) -> None:
    """``ValueError`` unless there is this activation."""
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation must be one of {known}, got {activation!r}")
