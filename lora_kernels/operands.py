"""What PEFT's layers hold, read without importing PEFT, and which of their calls are exactly one op.

Which calls of PEFT's ``lora.Linear`` and ``lora.Embedding`` are exactly one op, and the reason where one is not.

Asked on every call, because everything here can change between two calls: adapters are switched, hooks come and go,
a model is sharded or offloaded. So the checks are plain dictionary reads, which torch.compile turns into guards.
``__dict__``, ``_modules`` and ``_parameters`` are read directly: ``nn.Module.__getattr__`` costs ten times as much.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as _module

from .frozen_linears import FrozenLinear
from .plain import FLOATS, INDICES, LOW_PRECISION, PLAIN_TENSORS, inside_transform, is_parametrized, not_plain
from .reasons import Reason

Operands = tuple[Tensor, Tensor, Tensor, "Tensor | None", "float | Tensor", float, bool, "Tensor | None"]
"""weight, lora_A, lora_B, bias, scaling, dropout_p, training, DoRA's magnitude or None for plain LoRA."""
Branch = tuple[Tensor, Tensor, "Tensor | None", "float | Tensor", float, bool, "Tensor | None"]
"""lora_A, lora_B, bias of lora_B, scaling, dropout_p, training, magnitude."""


class SideBySide(NamedTuple):
    """Several adapters, each of which drops elements of x for itself."""

    first: Operands
    """With every adapter's bias."""
    others: list[Branch]


EmbeddingOperands = tuple[Tensor, Tensor, Tensor, "float | Tensor", "int | None", "Tensor | None"]
"""weight, lora_A, lora_B, scaling, padding_idx, DoRA's magnitude or None."""

_PLAIN_LINEARS = (nn.Linear, FrozenLinear)
_GLOBAL_HOOKS = (
    _module._global_forward_hooks, _module._global_forward_pre_hooks,
    _module._global_backward_hooks, _module._global_backward_pre_hooks,
)  # fmt: skip
_INF = math.inf
_DISPLACED = Reason.DISPLACED  # the way through the enum would be felt in a small layer
_any_autocast = torch._C._is_any_autocast_enabled  # several times cheaper than asking for one device


# ------------------------------------------------------------------------------------------------------ linear


def operands(layer: Any) -> Operands | SideBySide | Reason:
    """What ``lora_linear`` or ``dora_linear`` needs from ``layer`` besides x, or why the layer must run its own
    forward now.
    """
    names: Any = active_adapters(layer.__dict__, "lora_A")
    if type(names) is str:
        return adapter_operands(layer, names)
    return names if type(names) is Reason else _several_adapters(layer, names)


def adapter_operands(layer: Any, name: str) -> Operands | Reason:
    """As ``operands``, for one adapter, whether it is the active one or not."""
    base_layer = layer.__dict__["_modules"]["base_layer"]
    base: Any = _base_operands(base_layer)
    if type(base) is not tuple:
        return base
    branch: Any = branch_operands(layer, name, base_layer)
    if type(branch) is not tuple:
        return branch
    weight, bias = base
    lora_A, lora_B, lora_bias, scaling, p, training, magnitude = branch
    if lora_bias is not None:
        bias = _add_lora_bias(bias, lora_bias, scaling, weight.dtype)
    return weight, lora_A, lora_B, bias, scaling, p, training, magnitude


def branch_operands(layer: Any, name: str, *also_skipped: nn.Module) -> Branch | Reason:
    """What the adapter ``name`` adds to the base layer.

    ``also_skipped`` are modules besides the adapter's that will not be called either, so that their hooks matter.
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
    p = 0.0
    if type(dropout) is nn.Dropout and not dropout.inplace:
        p = dropout.p if type(dropout.p) is float else float(dropout.p)
    elif type(dropout) is not nn.Identity:
        return Reason.ADAPTER_MODULES
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
    if name in state["lora_variant"]:
        magnitude = _magnitude(layer, name, lora_bias)
        if type(magnitude) is Reason:
            return magnitude
        if not state["training"]:  # asked of the layer, too, by PEFT's DoRA
            p = 0.0
    return lora_A, lora_B, lora_bias, scaling, p, dropout.training, magnitude


def _base_operands(base: nn.Module) -> tuple[Tensor, Tensor | None] | Reason:
    """Weight [out_features, in_features] and bias of a base layer, whose hooks are not looked at."""
    plain = type(base) in _PLAIN_LINEARS
    if not plain and not _is_conv1d(base):
        return Reason.PARAMETRIZED if is_parametrized(base) else Reason.BASE_LAYER
    parameters = base.__dict__["_parameters"]
    weight, bias = parameters.get("weight", _DISPLACED), parameters.get("bias", _DISPLACED)
    reason = _why_not_frozen(weight)
    if reason is not None:
        return reason
    if bias is not None and type(bias) not in PLAIN_TENSORS:
        return not_plain(bias)
    return (weight if plain else weight.t()), bias


def _variant_or_modules(layer: nn.Module, name: str) -> Reason:
    """Some variants bring their own lora_A and lora_B."""
    return Reason.VARIANT if name in layer.__dict__["lora_variant"] else Reason.ADAPTER_MODULES


def _magnitude(layer: Any, name: str, lora_bias: Tensor | None, kind: str = "Linear") -> Tensor | Reason:
    """DoRA's magnitude vector, or why this LoRA variant of a ``kind`` of layer is not the DoRA that we compute."""
    if not _is_peft(layer.lora_variant[name], "variants", f"Dora{kind}Variant"):
        return Reason.VARIANT
    module = layer.lora_magnitude_vector[name]
    if not _is_peft(module, "dora", f"Dora{kind}Layer") or lora_bias is not None:
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


def _several_adapters(layer: Any, names: list[str]) -> Operands | SideBySide | Reason:
    """Adapters side by side are one adapter of the summed rank, as long as they see the same x.

    Under dropout they do not: each of them draws a mask.
    """
    base_layer = layer.__dict__["_modules"]["base_layer"]
    base: Any = _base_operands(base_layer)
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
            bias = _add_lora_bias(bias, lora_bias, scaling, weight.dtype)
        branches.append(branch)
    if drops:
        (lora_A, lora_B, _, scaling, p, training, _), *others = branches
        return SideBySide((weight, lora_A, lora_B, bias, scaling, p, training, None), others)
    stacked: Any = _stack([(lora_A, lora_B, scaling) for lora_A, lora_B, _, scaling, *_ in branches])
    if type(stacked) is Reason:
        return stacked
    lora_A, lora_B, scaling = stacked
    return weight, lora_A, lora_B, bias, scaling, 0.0, False, None


def _add_lora_bias(bias: Tensor | None, lora_bias: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    scaled = lora_bias * scaling
    return (scaled if bias is None else bias + scaled).to(dtype)


# --------------------------------------------------------------------------------------------------- embedding


def embedding_operands(layer: Any) -> EmbeddingOperands | Reason:
    """What ``lora_embedding`` needs from a ``lora.Embedding`` besides the ids, or why the layer must run its own
    forward now.
    """
    state = layer.__dict__
    names = active_adapters(state, "lora_embedding_A")
    if type(names) is Reason:
        return names
    base = state["_modules"]["base_layer"]
    if type(base) is not nn.Embedding:
        return Reason.PARAMETRIZED if is_parametrized(base) else Reason.BASE_LAYER
    if base.max_norm is not None or base.sparse or base.scale_grad_by_freq or hasattr(base, "embed_scale"):
        return Reason.BASE_LAYER  # PEFT multiplies the adapter's part by embed_scale
    reason = why_not_called_as_is(base)
    if reason is not None:
        return reason
    weight = base.__dict__["_parameters"].get("weight", _DISPLACED)
    reason = _why_not_frozen(weight)
    if reason is not None:
        return reason
    adapters, magnitude = [], None
    names = [names] if type(names) is str else names
    for name in names:
        if name not in layer.lora_embedding_A:
            return Reason.NO_ACTIVE_ADAPTER
        if name in state["lora_variant"]:
            magnitude = _magnitude(layer, name, None, "Embedding")
            if type(magnitude) is Reason:
                return magnitude
            if len(names) > 1:
                return Reason.DORA  # it scales what the adapters before it have added, too
        lora_A = layer.lora_embedding_A._parameters.get(name, _DISPLACED)
        lora_B = layer.lora_embedding_B._parameters.get(name, _DISPLACED)
        scaling: Any = usual_scaling(state["scaling"][name])
        if type(scaling) is Reason:
            return scaling
        if type(lora_A) not in PLAIN_TENSORS or type(lora_B) not in PLAIN_TENSORS:
            return not_plain(lora_B if type(lora_A) in PLAIN_TENSORS else lora_A)
        if name in layer.input_fns:
            return Reason.DTENSOR
        fits = lora_A.dtype == weight.dtype or (lora_A.dtype == torch.float32 and weight.dtype in LOW_PRECISION)
        if not fits or lora_B.dtype != lora_A.dtype or weight.dtype not in FLOATS:
            return Reason.MIXED_DTYPES
        adapters.append((lora_A, lora_B, scaling))
    stacked = adapters[0] if len(adapters) == 1 else _stack(adapters)
    return stacked if type(stacked) is Reason else (weight, *stacked, base.padding_idx, magnitude)


def ids_reason(ids: Any) -> Reason | None:
    """Why these token ids cannot be served by ``lora_embedding``; None if they can."""
    if type(ids) not in PLAIN_TENSORS:
        return Reason.DTENSOR
    if ids.layout != torch.strided or ids.is_nested:
        return Reason.LAYOUT
    if ids.dtype not in INDICES:
        return Reason.DTYPE
    return Reason.TRANSFORM if inside_transform() else None


# ------------------------------------------------------------------------------------------------------ shared


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


def call_reason(x: Any, weight: Tensor, weight_A: Tensor, weight_B: Tensor) -> Reason | None:
    """Why this input cannot be served by ``lora_linear`` on these weights; None if it can."""
    if type(x) not in PLAIN_TENSORS:
        return Reason.DTENSOR
    if x.layout != torch.strided or x.is_nested:
        return Reason.LAYOUT
    dtype = x.dtype
    if dtype not in FLOATS:
        return Reason.DTYPE
    if _any_autocast() and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        if weight.dtype not in FLOATS:
            return Reason.MIXED_DTYPES
    elif dtype != weight.dtype:
        return Reason.MIXED_DTYPES
    # PEFT casts x to the adapter's dtype. float32 adapters over 16-bit activations are what the op is made
    # for; an adapter narrower than the activations would round x, which the op does not do.
    wide = weight_A.dtype
    if wide != weight_B.dtype or not (wide == dtype or (wide == torch.float32 and dtype in LOW_PRECISION)):
        return Reason.MIXED_DTYPES
    if torch.is_grad_enabled() and not is_compiling() and weight.is_inference():
        return Reason.INFERENCE_TENSOR  # a Function saves the weight, where torch's own linear may not have to
    return Reason.TRANSFORM if inside_transform() else None


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer or a convolution multiplies x in."""
    if _any_autocast() and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _stack(adapters: list[tuple[Tensor, Tensor, float | Tensor]]) -> tuple[Tensor, Tensor, float | Tensor] | Reason:
    """One (lora_A, lora_B, scaling) that updates as much as all of these together."""
    dtype = adapters[0][0].dtype
    if any(t.dtype != dtype for lora_A, lora_B, _ in adapters for t in (lora_A, lora_B)):
        return Reason.MIXED_DTYPES
    scaling = adapters[0][2]
    if not all(type(s) is float and s == scaling for _, _, s in adapters):
        adapters = [(lora_A, lora_B * s, s) for lora_A, lora_B, s in adapters]
        scaling = 1.0
    return torch.cat([a for a, _, _ in adapters]), torch.cat([b for _, b, _ in adapters], dim=1), scaling


def _why_not_frozen(weight: Any) -> Reason | None:
    """Why a base weight is not a plain frozen matrix; None if it is."""
    if type(weight) not in PLAIN_TENSORS:
        return not_plain(weight)
    if weight.layout != torch.strided:
        return Reason.LAYOUT
    if weight.is_meta:
        return Reason.META
    return Reason.BASE_REQUIRES_GRAD if weight.requires_grad else None


def why_not_called_as_is(*modules: nn.Module) -> Reason | None:
    """Why calling one of these modules is more than its class's forward; None if it is not."""
    for module in modules:
        state = module.__dict__
        if "forward" in state:
            return Reason.INSTANCE_FORWARD
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return Reason.ADAPTER_HOOKS
        if state["_backward_hooks"] or state["_backward_pre_hooks"]:
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


def _is_conv1d(base: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is [in_features, out_features]."""
    return type(base).__name__ == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils"


def _is_peft(value: Any, module: str, name: str) -> bool:
    """Whether value's type is exactly PEFT's; compared by name, so that nothing is imported here."""
    return type(value).__name__ == name and type(value).__module__ == f"peft.tuners.lora.{module}"


# ---------------------------------------------------------------------------------------------------- one adapter


def plain_adapter(layer: Any, adapter: str | None) -> tuple[Any, ...]:
    """What ``LoRALinear.from_peft`` needs: weight, bias, lora_A, lora_B, alpha, scaling, dropout, use_rslora."""
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
