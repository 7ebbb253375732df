"""Which calls of a PEFT ``lora.Linear`` are exactly one ``lora_linear``, and the reason where one is not.

Asked on every call, because everything here can change between two calls: adapters are switched, hooks come and go,
a model is sharded or offloaded. So the checks are plain dictionary reads, which torch.compile turns into guards.
``__dict__``, ``_modules`` and ``_parameters`` are read directly: ``nn.Module.__getattr__`` costs ten times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as _forward_ad
from torch.nn.modules import module as _module

from ..modules import FrozenLinear
from ..reasons import Reason

Operands = tuple[Tensor, Tensor, Tensor, "Tensor | None", "float | Tensor", float, bool]
"""weight, lora_A, lora_B, bias, scaling, dropout_p, training."""
Branch = tuple[Tensor, Tensor, "Tensor | None", "float | Tensor", float, bool]
"""lora_A, lora_B, bias of lora_B, scaling, dropout_p, training."""

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_PLAIN_LINEARS = (nn.Linear, FrozenLinear)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GLOBAL_HOOKS = (
    _module._global_forward_hooks, _module._global_forward_pre_hooks,
    _module._global_backward_hooks, _module._global_backward_pre_hooks,
)  # fmt: skip
_any_autocast = torch._C._is_any_autocast_enabled  # several times cheaper than asking for one device


def operands(layer: nn.Module) -> Operands | Reason:
    """What ``lora_linear`` needs from ``layer`` besides x, or why the layer must run its own forward now."""
    state = layer.__dict__
    if state["_disable_adapters"]:
        return Reason.DISABLED
    if state["merged_adapters"]:
        return Reason.MERGED
    name = state["_active_adapter"]
    if type(name) is not str:
        if len(name) != 1:
            known = state["_modules"]["lora_A"]._modules
            name = [n for n in name if n in known]
            if len(name) > 1:
                return _several_adapters(layer, name)
            if not name:
                return Reason.NO_ACTIVE_ADAPTER
        name = name[0]
    return adapter_operands(layer, name)


def adapter_operands(layer: nn.Module, name: str) -> Operands | Reason:
    """As ``operands``, for one adapter, whether it is the active one or not."""
    found = branch_operands(layer, name)
    if type(found) is not tuple:
        return found
    lora_A, lora_B, lora_bias, scaling, p, training = found
    found = base_operands(layer)
    if type(found) is not tuple:
        return found
    weight, bias = found
    if lora_bias is not None:
        bias = _add_lora_bias(bias, lora_bias, scaling, weight.dtype)
    return weight, lora_A, lora_B, bias, scaling, p, training


def base_operands(layer: nn.Module) -> tuple[Tensor, Tensor | None] | Reason:
    """Weight [out_features, in_features] and bias of the base layer."""
    base = layer.__dict__["_modules"]["base_layer"]
    plain = type(base) in _PLAIN_LINEARS
    if not plain and not _is_conv1d(base):
        return Reason.PARAMETRIZED if _is_parametrized(base) else Reason.BASE_LAYER
    state = base.__dict__
    reason = _why_not_called_as_is(state)
    if reason is not None:
        return reason
    # A weight that sharding has moved out of _parameters is None here, and refused like a subclass.
    parameters = state["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) not in _PLAIN_TENSORS or (bias is not None and type(bias) not in _PLAIN_TENSORS):
        return Reason.DTENSOR
    if weight.layout != torch.strided:
        return Reason.LAYOUT
    if weight.is_meta:
        return Reason.META
    if weight.requires_grad:
        return Reason.BASE_REQUIRES_GRAD
    return (weight if plain else weight.t()), bias


def branch_operands(layer: nn.Module, name: str, variant: Reason | None = None) -> Branch | Reason:
    """The adapter ``name``. ``variant`` is the LoRA variant that the caller can compute, None for plain LoRA."""
    state = layer.__dict__
    children = state["_modules"]
    A = children["lora_A"].__dict__["_modules"].get(name)
    if A is None:
        return Reason.NO_ACTIVE_ADAPTER
    if name in state["lora_variant"]:
        found = Reason.DORA if state["use_dora"].get(name) else Reason.VARIANT
        if found is not variant:
            return found

    B = children["lora_B"].__dict__["_modules"][name]
    dropout = children["lora_dropout"].__dict__["_modules"][name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return Reason.PARAMETRIZED if _is_parametrized(A) or _is_parametrized(B) else Reason.ADAPTER_MODULES
    p = 0.0
    if type(dropout) is nn.Dropout and not dropout.inplace:
        p = dropout.p
    elif type(dropout) is not nn.Identity:
        return Reason.ADAPTER_MODULES
    for child in (A, B, dropout):
        reason = _why_not_called_as_is(child.__dict__)
        if reason is not None:
            return reason
    if _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1] or _GLOBAL_HOOKS[2] or _GLOBAL_HOOKS[3]:
        return Reason.ADAPTER_HOOKS

    own_A, own_B = A.__dict__["_parameters"], B.__dict__["_parameters"]
    lora_A, lora_B, lora_bias = own_A.get("weight"), own_B.get("weight"), own_B["bias"]
    if own_A["bias"] is not None:
        return Reason.ADAPTER_MODULES
    if type(lora_A) not in _PLAIN_TENSORS or type(lora_B) not in _PLAIN_TENSORS:
        return Reason.DTENSOR
    scaling = state["scaling"][name]
    if isinstance(scaling, Tensor) and (type(scaling) not in _PLAIN_TENSORS or scaling.dim() != 0):
        return Reason.TENSOR_SCALING
    return lora_A, lora_B, lora_bias, scaling, p, dropout.training


def dora_operands(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, float | Tensor] | Reason:
    """weight, lora_A, lora_B, magnitude, bias and scaling of a layer for which ``operands`` says ``Reason.DORA``."""
    if layer.__dict__["_active_adapter"].__class__ is not str and len(layer.active_adapters) != 1:
        return Reason.DORA
    name = layer.active_adapters[0]
    found = branch_operands(layer, name, Reason.DORA)
    if type(found) is not tuple:
        return found
    lora_A, lora_B, lora_bias, scaling, p, training = found
    if lora_bias is not None:
        return Reason.LORA_BIAS
    if p > 0.0 and (training or layer.training):
        return Reason.DORA_DROPOUT
    magnitude = layer.lora_magnitude_vector[name]
    reason = _why_not_called_as_is(magnitude.__dict__)
    if reason is not None:
        return reason
    if type(magnitude.weight) not in _PLAIN_TENSORS:
        return Reason.DTENSOR
    if magnitude.weight.device != lora_A.device:
        return Reason.DORA  # "ephemeral_gpu_offload" keeps it elsewhere
    found = base_operands(layer)
    if type(found) is not tuple:
        return found
    return found[0], lora_A, lora_B, magnitude.weight, found[1], scaling


def _several_adapters(layer: nn.Module, names: list[str]) -> Operands | Reason:
    """Adapters side by side are one adapter: their A stacked, their scaled B next to each other."""
    found = base_operands(layer)
    if type(found) is not tuple:
        return found
    weight, bias = found
    branches = [branch_operands(layer, name) for name in names]
    for branch in branches:
        if type(branch) is not tuple:
            return branch
        if branch[0].dtype != branches[0][0].dtype or branch[1].dtype != branches[0][0].dtype:
            return Reason.MIXED_DTYPES
        if branch[4] > 0.0 and branch[5]:
            return Reason.SEVERAL_ADAPTERS
    scaling = branches[0][3]
    shared = all(type(s) is float and s == scaling for _, _, _, s, _, _ in branches)
    Bs = []
    for _, lora_B, lora_bias, own_scaling, _, _ in branches:
        Bs.append(lora_B if shared else lora_B * own_scaling)
        if lora_bias is not None:
            bias = _add_lora_bias(bias, lora_bias, own_scaling, weight.dtype)
    A = torch.cat([branch[0] for branch in branches])
    return weight, A, torch.cat(Bs, dim=1), bias, scaling if shared else 1.0, 0.0, False


def _add_lora_bias(bias: Tensor | None, lora_bias: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    scaled = lora_bias * scaling
    return (scaled if bias is None else bias + scaled).to(dtype)


def call_reason(x: Any, weight: Tensor, weight_A: Tensor, weight_B: Tensor) -> Reason | None:
    """Why this input cannot be served by ``lora_linear`` on these weights; None if it can."""
    if type(x) not in _PLAIN_TENSORS:
        return Reason.DTENSOR
    if x.layout != torch.strided or x.is_nested:
        return Reason.LAYOUT
    dtype = x.dtype
    if dtype not in _FLOATS:
        return Reason.DTYPE
    if _any_autocast() and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif dtype != weight.dtype:
        return Reason.MIXED_DTYPES
    # PEFT casts x to the adapter's dtype. float32 adapters over 16-bit activations are what the op is made
    # for; an adapter narrower than the activations would round x, which the op does not do.
    wide = weight_A.dtype
    if wide != weight_B.dtype or not (wide == dtype or (wide == torch.float32 and dtype in _LOW_PRECISION)):
        return Reason.MIXED_DTYPES
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or _forward_ad._current_level >= 0:
        return Reason.TRANSFORM
    return None


def _is_parametrized(module: nn.Module) -> bool:
    return "parametrizations" in module._modules


def _is_conv1d(base: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is [in_features, out_features]."""
    return type(base).__name__ == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils"


def _why_not_called_as_is(state: dict[str, Any]) -> Reason | None:
    """Why calling a module with this ``__dict__`` is more than its class's forward; None if it is not."""
    if "forward" in state:
        return Reason.INSTANCE_FORWARD
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]:
        return Reason.ADAPTER_HOOKS
    return Reason.ADAPTER_HOOKS if state["_backward_pre_hooks"] else None
