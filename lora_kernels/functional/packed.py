"""``lora_linear`` and ``frozen_linear`` over a quantised weight: arguments are checked here, then dispatched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..formats import QuantizedWeight
from ..ops import eager
from ..ops import linear_packed as _linear_op
from ..ops import lora_linear_packed as _op
from ..ops.lora_linear_packed import PackedLoRALinearFunction
from .checks import (
    check_adapter,
    check_adapter_dtype,
    check_base,
    check_branch,
    sizes_fit,
)
from .why import explains


def lora_linear(
    x: Tensor, weight: QuantizedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Tensor,
    dropout_p: float, training: bool, seed: int | Tensor | None,
) -> Tensor:  # fmt: skip
    """What ``functional.lora.lora_linear`` does with a quantised weight."""
    args = arguments(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, seed)
    return eager.call(_op.SPEC, PackedLoRALinearFunction, args)


def arguments(
    x: Tensor, weight: QuantizedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Tensor,
    dropout_p: float, training: bool, seed: int | Tensor | None,
) -> tuple:  # fmt: skip
    """The op's positional arguments, checked; draws the seed where dropout is active."""
    op = "lora_linear"
    check_base(op, x, weight, bias)
    check_adapter(op, weight, lora_A, lora_B)
    if lora_A.dtype != x.dtype and not dispatch.autocast_enabled(x.device.type):
        check_adapter_dtype(op, "x", x.dtype, lora_A)
    return x, *weight.args, lora_A, *check_branch(op, x, lora_B, bias, scaling, dropout_p, training, seed)


@explains("lora_linear", _op.SPEC, is_packed=True)
def _bind(
    x: Tensor, weight: QuantizedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None, *,
    scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> tuple:  # fmt: skip
    """As ``arguments``; no seed is drawn."""
    return arguments(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, 0 if seed is None else seed)


def lora_linear_of_layer(
    x: Tensor, weight: QuantizedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Tensor,
    dropout_p: float, training: bool,
) -> Tensor:  # fmt: skip
    """``lora_linear`` for a layer that has looked at its operands, and that multiplies in ``weight.dtype``."""
    inner, bias = of_layer(x, weight, bias)
    if (
        type(scaling) is float and (dropout_p == 0.0 or not training)
        and not torch.compiler.is_compiling() and not dispatch.any_autocast()
        and sizes_fit(inner, weight, lora_A, lora_B, bias)
    ):  # fmt: skip
        args = (inner, *weight.args, lora_A, lora_B, bias, None, scaling, 0.0)
        y = eager.run(PackedLoRALinearFunction, args, _op.SPEC)
    else:
        y = lora_linear(inner, weight, lora_A, lora_B, bias, scaling, dropout_p, training, None)
    return as_layer_gives(y, x, weight)


def linear_of_layer(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``frozen_linear`` as ``lora_linear_of_layer``."""
    inner, bias = of_layer(x, weight, bias)
    return as_layer_gives(frozen_linear(inner, weight, bias), x, weight)


def as_layer_gives(y: Tensor, x: Tensor, weight: QuantizedWeight) -> Tensor:
    """A layer with a compute dtype answers in x's dtype, under autocast, too; others in what they multiply in."""
    return y if y.dtype == x.dtype or weight.dtype is None else y.to(x.dtype)


def of_layer(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias as the op takes them, for a layer that multiplies in ``weight.dtype``.

    bitsandbytes rounds an x of another dtype to that one, and the product to x's dtype. Here, the product is formed in
    float32 then, of x as it is and a weight that is rounded as theirs.
    """
    if dispatch.any_autocast() and dispatch.autocast_enabled(x.device.type):
        return x, bias
    inner = x if weight.dtype in (x.dtype, None) or x.dtype == torch.float32 else x.float()
    if bias is not None and bias.dtype != inner.dtype:
        bias = bias.to(inner.dtype)
    return inner, bias


def frozen_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """What ``functional.lora.frozen_linear`` does with a quantised weight."""
    return torch.ops.lora_kernels.linear_packed.default(*frozen_arguments(x, weight, bias))


@explains("frozen_linear", _linear_op.SPEC, is_packed=True)
def frozen_arguments(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> tuple[Any, ...]:
    """The op's positional arguments, checked."""
    check_base("frozen_linear", x, weight, bias)
    return x, *weight.args, bias
