"""What ``lora_linear`` or ``dora_linear`` needs from a PEFT layer besides x."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import formats
from ..formats import QuantizedWeight
from ..frozen_linears import FrozenLinear
from ..plain import PLAIN_TENSORS, is_parametrized, not_plain
from ..reasons import Reason
from .adapters import Branch, active_adapters, branch_operands, stack, why_not_frozen

Operands = tuple[
    "Tensor | QuantizedWeight", Tensor, Tensor, "Tensor | None", "float | Tensor", float, bool, "Tensor | None"
]
"""weight, lora_A, lora_B, bias, scaling, dropout_p, training, DoRA's magnitude or None for plain LoRA."""

_PLAIN_LINEARS = (nn.Linear, FrozenLinear)
_DISPLACED = Reason.DISPLACED


class SideBySide(NamedTuple):
    """Several adapters, each of which drops elements of x for itself."""

    first: Operands
    """With every adapter's bias."""
    others: list[Branch]


def operands(layer: Any) -> Operands | SideBySide | Reason:
    """What ``lora_linear`` or ``dora_linear`` needs from ``layer`` besides x, or why the layer must run its own
    forward now.
    """
    names: Any = active_adapters(layer.__dict__, "lora_A")
    if type(names) is str:
        return adapter_operands(layer, names)
    return names if type(names) is Reason else _several_adapters(layer, names)


def glance(layer: Any) -> Operands | None:
    """What ``operands`` gives for a plain layer with one plain adapter, if it gives anything: whether it does, takes
    several times as long. None for other layers.
    """
    state = layer.__dict__
    children, names = state["_modules"], state["_active_adapter"]
    name = names if type(names) is str else names[0] if len(names) == 1 else None
    base, A = children["base_layer"], children["lora_A"].__dict__["_modules"].get(name)
    if type(A) is not nn.Linear or type(base) not in _PLAIN_LINEARS or name in state["lora_variant"]:
        return None
    B = children["lora_B"].__dict__["_modules"][name]
    dropout = children["lora_dropout"].__dict__["_modules"][name]
    of_base, of_B = base.__dict__["_parameters"], B.__dict__["_parameters"]
    weight, lora_A, lora_B = of_base.get("weight"), A.__dict__["_parameters"].get("weight"), of_B.get("weight")
    if type(weight) not in PLAIN_TENSORS or type(lora_A) not in PLAIN_TENSORS or type(lora_B) not in PLAIN_TENSORS:
        return None
    bias, scaling = of_base.get("bias"), state["scaling"][name]
    p = dropout.p if type(dropout) is nn.Dropout else 0.0
    if (
        of_B.get("bias") is not None
        or type(scaling) is not float
        or (bias is not None and type(bias) not in PLAIN_TENSORS)
    ):
        return None
    return weight, lora_A, lora_B, bias, scaling, p, dropout.training, None


def adapter_operands(layer: Any, name: str) -> Operands | Reason:
    """As ``operands``, for one adapter, whether it is the active one or not."""
    base_layer = layer.__dict__["_modules"]["base_layer"]
    base: Any = base_operands(base_layer)
    if type(base) is not tuple:
        return base
    branch: Any = branch_operands(layer, name, base_layer)
    if type(branch) is not tuple:
        return branch
    weight, bias = base
    lora_A, lora_B, lora_bias, scaling, p, training, magnitude = branch
    if lora_bias is not None:
        bias = _add_lora_bias(bias, lora_bias, scaling, weight)
    return weight, lora_A, lora_B, bias, scaling, p, training, magnitude


def base_operands(base: nn.Module) -> tuple[Tensor | QuantizedWeight, Tensor | None] | Reason:
    """Weight [out_features, in_features] and bias of a base layer, whose hooks are not looked at."""
    plain = type(base) in _PLAIN_LINEARS
    parameters = base.__dict__["_parameters"]
    if plain and type(parameters.get("weight")) not in PLAIN_TENSORS:
        plain = formats.from_module(base) is None  # torchao puts a tensor of its own into a plain layer
    if not plain and not _is_conv1d(base):
        if is_parametrized(base):
            return Reason.PARAMETRIZED
        packed = formats.from_module(base)
        if not isinstance(packed, QuantizedWeight):
            return packed or Reason.BASE_LAYER
        bias: Any = parameters["bias"] if "bias" in parameters else _bias_elsewhere(base)
        if bias is not None and type(bias) not in PLAIN_TENSORS:
            return not_plain(bias)
        if bias is not None and packed.dtype is not None and bias.dtype != packed.dtype:
            bias = bias.to(packed.dtype)  # as bitsandbytes rounds it
        return packed, bias
    weight, bias = parameters.get("weight", _DISPLACED), parameters.get("bias", _DISPLACED)
    reason = why_not_frozen(weight)
    if reason is not None:
        return reason
    if bias is not None and type(bias) not in PLAIN_TENSORS:
        return not_plain(bias)
    return (weight if plain else weight.t()), bias


def _bias_elsewhere(base: nn.Module) -> Tensor | Reason | None:
    """The bias of a layer with packed weights that has no parameter of this name: a buffer, or None on the instance."""
    buffers = base.__dict__["_buffers"]
    return buffers["bias"] if "bias" in buffers else None if base.__dict__.get("bias", base) is None else _DISPLACED


def _several_adapters(layer: Any, names: list[str]) -> Operands | SideBySide | Reason:
    """Adapters side by side are one adapter of the summed rank, as long as they see the same x.

    Under dropout they do not: each of them draws a mask.
    """
    base_layer = layer.__dict__["_modules"]["base_layer"]
    base: Any = base_operands(base_layer)
    if type(base) is not tuple:
        return base
    weight, bias = base
    branches: list[Branch] = []
    drops = False
    for name in names:
        branch: Any = branch_operands(layer, name, base_layer)
        if type(branch) is not tuple:
            return branch
        lora_A, lora_B, lora_bias, scaling, p, training, magnitude = branch
        if magnitude is not None:
            return Reason.DORA
        drops = drops or (p > 0.0 and training)
        if lora_bias is not None:
            bias = _add_lora_bias(bias, lora_bias, scaling, weight)
        branches.append(branch)
    if drops:
        (lora_A, lora_B, _, scaling, p, training, _), *others = branches
        return SideBySide((weight, lora_A, lora_B, bias, scaling, p, training, None), others)
    stacked: Any = stack([(lora_A, lora_B, scaling) for lora_A, lora_B, _, scaling, *_ in branches])
    if type(stacked) is Reason:
        return stacked
    lora_A, lora_B, scaling = stacked
    return weight, lora_A, lora_B, bias, scaling, 0.0, False, None


def _add_lora_bias(
    bias: Tensor | None, lora_bias: Tensor, scaling: float | Tensor, weight: Tensor | QuantizedWeight
) -> Tensor:
    scaled = lora_bias * scaling
    total = scaled if bias is None else bias + scaled
    return total if isinstance(weight, QuantizedWeight) else total.to(weight.dtype)


def _is_conv1d(base: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is [in_features, out_features]."""
    return type(base).__name__ == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils"


# ---------------------------------------------------------------------------------------------------- one adapter


def plain_adapter(layer: Any, adapter: str | None) -> tuple[Any, ...]:
    """What ``LoRALinear.from_peft`` needs: weight, bias, lora_A, lora_B, alpha, scaling, dropout, use_rslora."""
    base = getattr(layer, "base_layer", None)
    packed = None if base is None else formats.from_module(base)
    if packed is not None:
        what = packed.format if isinstance(packed, QuantizedWeight) else packed
        raise ValueError(f"from_peft: the weight under this adapter is packed ({what}); lk.patch serves it as it is")
    linear = getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)
    if linear is None or not isinstance(layer, linear):
        kind = type(layer)
        raise TypeError(f"from_peft: expected a PEFT lora.Linear, got {kind.__module__}.{kind.__qualname__}")
    if adapter is None:
        if len(layer.active_adapters) != 1:
            raise ValueError(f"from_peft: name one of the active adapters {layer.active_adapters}")
        adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A:
        known = ", ".join(layer.lora_A) or "none"
        raise ValueError(f"from_peft: no adapter {adapter!r} on this layer, it has {known}")
    found: Any = Reason.MERGED if layer.merged else adapter_operands(layer, adapter)
    if not isinstance(found, Reason):
        weight, lora_A, lora_B, bias, scaling, dropout, _, magnitude = found
        found = _beyond_plain_lora(layer, adapter, weight, scaling, magnitude)
    if found is not None:
        raise ValueError(f"from_peft: adapter {adapter!r} is not plain LoRA on a plain nn.Linear: {found}")
    return weight, bias, lora_A, lora_B, layer.lora_alpha[adapter], scaling, dropout, layer.use_rslora[adapter]


def _beyond_plain_lora(layer: Any, adapter: str, weight: Tensor, scaling: Any, magnitude: Any) -> Reason | None:
    """What ``lora_linear`` serves and ``LoRALinear`` does not hold."""
    if magnitude is not None:
        return Reason.DORA
    if layer.lora_B[adapter].bias is not None:
        return Reason.LORA_BIAS
    if isinstance(scaling, Tensor):
        return Reason.TENSOR_SCALING
    return None if weight is layer.base_layer.weight else Reason.FAN_IN_FAN_OUT
