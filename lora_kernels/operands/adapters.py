"""What an adapter of a PEFT layer adds, whatever the layer is: its tensors, scaling and dropout."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..plain import PLAIN_TENSORS, is_parametrized, not_plain
from ..reasons import Reason
from .zero3 import is_whole_for_reader

Branch = tuple[Tensor, Tensor, "Tensor | None", "float | Tensor", float, bool, "Tensor | None"]
"""lora_A, lora_B, bias of lora_B, scaling, dropout_p, training, magnitude."""

_GLOBAL_HOOKS = (
    _module._global_forward_hooks, _module._global_forward_pre_hooks,
    _module._global_backward_hooks, _module._global_backward_pre_hooks,
)  # fmt: skip
_INF = math.inf
_DISPLACED = Reason.DISPLACED  # the way through the enum would be felt in a small layer


def active_adapters(state: dict[str, Any], container: str) -> str | list[str] | Reason:
    """The adapter of this layer that is active, or, if several are, all of them."""
    if state["_disable_adapters"]:
        return Reason.DISABLED
    if state["merged_adapters"]:
        return Reason.MERGED
    names = state["_active_adapter"]
    if type(names) is str:
        return names
    if len(names) != 1:
        known = state["_modules"][container]
        names = [name for name in names if name in known]
        if not names:
            return Reason.NO_ACTIVE_ADAPTER
    return names[0] if len(names) == 1 else names


def branch_operands(layer: Any, name: str, *also_skipped: nn.Module, some_tokens: bool = False) -> Branch | Reason:
    """What the adapter ``name`` adds to the base layer.

    Args:
        also_skipped: modules besides the adapter's that will not be called either, so that their hooks matter.
        some_tokens: whether it may be an aLoRA, which adds it to some tokens only.
    """
    state = layer.__dict__
    children = state["_modules"]
    A = children["lora_A"].__dict__["_modules"].get(name)
    if A is None:
        return Reason.NO_ACTIVE_ADAPTER
    B = children["lora_B"].__dict__["_modules"][name]
    dropout = children["lora_dropout"].__dict__["_modules"][name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return Reason.PARAMETRIZED if is_parametrized(A) or is_parametrized(B) else _variant_or_modules(layer, name)
    p: Any = dropout_probability(dropout)
    if type(p) is Reason:
        return p
    reason = why_not_called_as_is(A, B, dropout, *also_skipped)
    if reason is not None:
        return reason

    own_A, own_B = A.__dict__["_parameters"], B.__dict__["_parameters"]
    # What a wrapper has moved out of _parameters is found there no more, and never taken for absent.
    lora_A, lora_B = own_A.get("weight", _DISPLACED), own_B.get("weight", _DISPLACED)
    if type(lora_A) not in PLAIN_TENSORS or type(lora_B) not in PLAIN_TENSORS:
        return not_plain(lora_B if type(lora_A) in PLAIN_TENSORS else lora_A)
    if own_A.get("bias", _DISPLACED) is not None:
        return Reason.ADAPTER_MODULES
    lora_bias = own_B.get("bias", _DISPLACED)
    if lora_bias is not None and type(lora_bias) not in PLAIN_TENSORS:
        return not_plain(lora_bias)
    scaling = state["scaling"][name]
    if type(scaling) is not float or not -_INF < scaling < _INF:
        scaling = usual_scaling(scaling)
        if type(scaling) is Reason:
            return scaling
    magnitude: Any = None
    if name in state["lora_variant"] and not (some_tokens and is_alora(layer, name)):
        magnitude = magnitude_of(layer, name, lora_bias)
        if type(magnitude) is Reason:
            return magnitude
        if not state["training"]:  # asked of the layer, too, by PEFT's DoRA
            p = 0.0
    return lora_A, lora_B, lora_bias, scaling, p, dropout.training, magnitude


def dropout_probability(dropout: nn.Module) -> float | Reason:
    """How likely an adapter's module for it drops an element in training."""
    if type(dropout) is nn.Dropout and not dropout.inplace:
        return dropout.p if type(dropout.p) is float else float(dropout.p)
    return 0.0 if type(dropout) is nn.Identity else Reason.ADAPTER_MODULES


def _variant_or_modules(layer: nn.Module, name: str) -> Reason:
    """Some variants bring their own lora_A and lora_B."""
    return Reason.VARIANT if name in layer.__dict__["lora_variant"] else Reason.ADAPTER_MODULES


def is_alora(layer: Any, name: str) -> bool:
    """Whether an adapter acts from its invocation tokens on (PEFT's ``alora_invocation_tokens``)."""
    variants = layer.__dict__["lora_variant"]
    return name in variants and is_peft(variants[name], "variants", "ALoraLinearVariant")


def magnitude_of(layer: Any, name: str, lora_bias: Tensor | None, kind: str = "Linear") -> Tensor | Reason:
    """DoRA's magnitude vector, or why this LoRA variant of a ``kind`` of layer is not the DoRA that we compute."""
    if not is_peft(layer.lora_variant[name], "variants", f"Dora{kind}Variant"):
        return Reason.VARIANT
    module = layer.lora_magnitude_vector[name]
    if not is_peft(module, "dora", f"Dora{kind}Layer") or lora_bias is not None:
        return Reason.DORA
    reason = why_not_called_as_is(module)
    if reason is not None:
        return reason
    caches = getattr(sys.modules.get("peft.tuners.lora.dora"), "ENABLE_DORA_CACHING", False) and not layer.training
    if caches or module.__dict__.get("_dora_cache"):  # the first call without caching empties it
        return Reason.DORA_CACHING
    magnitude = module._parameters.get("weight", _DISPLACED)
    if type(magnitude) not in PLAIN_TENSORS:
        return not_plain(magnitude)
    adapter = layer.lora_embedding_A[name] if kind == "Embedding" else layer.lora_A[name].weight
    if magnitude.device != adapter.device:
        return Reason.DORA  # "ephemeral_gpu_offload" keeps it elsewhere
    return magnitude


def why_not_called_as_is(*modules: nn.Module) -> Reason | None:
    """Why calling one of these modules is more than its class's forward; None if it is not."""
    for module in modules:
        state = module.__dict__
        if "forward" in state:
            return Reason.INSTANCE_FORWARD
        if state["_backward_hooks"] or state["_backward_pre_hooks"]:
            return Reason.ADAPTER_HOOKS
        if (state["_forward_hooks"] or state["_forward_pre_hooks"]) and not is_whole_for_reader(module):
            return Reason.ADAPTER_HOOKS
    if _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1] or _GLOBAL_HOOKS[2] or _GLOBAL_HOOKS[3]:
        return Reason.ADAPTER_HOOKS
    return None


def usual_scaling(scaling: Any) -> float | Tensor | Reason:
    """An adapter's factor, whatever kind of number it came as (numpy's, say), as the ops take it.

    A tensor without dimensions takes no part in type promotion; one with dimensions may.
    """
    if isinstance(scaling, Tensor):
        if type(scaling) not in PLAIN_TENSORS or scaling.dim() > 0 or scaling.is_complex():
            return Reason.TENSOR_SCALING
        return scaling if scaling.is_floating_point() else scaling.float()
    if isinstance(scaling, numbers.Real):
        scaling = float(scaling)
    return scaling if -_INF < scaling < _INF else Reason.SCALING


def stack(adapters: list[tuple[Tensor, Tensor, float | Tensor]]) -> tuple[Tensor, Tensor, float | Tensor] | Reason:
    """One (lora_A [..., rank, K], lora_B [..., N, rank], scaling) that updates as much as all of these together."""
    dtype = adapters[0][0].dtype
    if any(t.dtype != dtype for lora_A, lora_B, _ in adapters for t in (lora_A, lora_B)):
        return Reason.MIXED_DTYPES
    scaling = adapters[0][2]
    if not all(type(s) is float and s == scaling for _, _, s in adapters):
        adapters = [(lora_A, lora_B * s, s) for lora_A, lora_B, s in adapters]
        scaling = 1.0
    return torch.cat([a for a, _, _ in adapters], dim=-2), torch.cat([b for _, b, _ in adapters], dim=-1), scaling


def why_not_frozen(weight: Any) -> Reason | None:
    """Why a base weight is not a plain frozen matrix; None if it is."""
    if type(weight) not in PLAIN_TENSORS:
        return not_plain(weight)
    if weight.layout != torch.strided:
        return Reason.LAYOUT
    if weight.is_meta:
        return Reason.META
    return Reason.BASE_REQUIRES_GRAD if weight.requires_grad else None


def is_peft(value: Any, module: str, name: str) -> bool:
    """Whether value's type is exactly PEFT's; compared by name, so that nothing is imported here."""
    return type(value).__name__ == name and type(value).__module__ == f"peft.tuners.lora.{module}"
