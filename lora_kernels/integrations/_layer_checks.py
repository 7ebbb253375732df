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

Operands = tuple[Tensor, Tensor, Tensor, "Tensor | None", float, float, bool]
"""weight, lora_A, lora_B, bias, scaling, dropout_p, training."""

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
            if len(name) != 1:
                return Reason.SEVERAL_ADAPTERS if name else Reason.NO_ACTIVE_ADAPTER
        name = name[0]
    return adapter_operands(layer, name)


def adapter_operands(layer: nn.Module, name: str) -> Operands | Reason:
    """As ``operands``, for one adapter, whether it is the active one or not."""
    state = layer.__dict__
    children = state["_modules"]
    A = children["lora_A"].__dict__["_modules"].get(name)
    if A is None:
        return Reason.NO_ACTIVE_ADAPTER
    if name in state["lora_variant"]:
        return Reason.DORA if state["use_dora"].get(name) else Reason.VARIANT

    base = children["base_layer"]
    B = children["lora_B"].__dict__["_modules"][name]
    dropout = children["lora_dropout"].__dict__["_modules"][name]
    if type(base) not in _PLAIN_LINEARS:
        return _why_not_plain(layer, base)
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return Reason.PARAMETRIZED if _is_parametrized(A) or _is_parametrized(B) else Reason.ADAPTER_MODULES
    p = 0.0
    if type(dropout) is nn.Dropout and not dropout.inplace:
        p = dropout.p
    elif type(dropout) is not nn.Identity:
        return Reason.ADAPTER_MODULES
    for child in (base, A, B, dropout):
        own = child.__dict__
        if "forward" in own:
            return Reason.INSTANCE_FORWARD
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return Reason.ADAPTER_HOOKS
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return Reason.ADAPTER_HOOKS
    if _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1] or _GLOBAL_HOOKS[2] or _GLOBAL_HOOKS[3]:
        return Reason.ADAPTER_HOOKS
    scaling = state["scaling"][name]
    if isinstance(scaling, Tensor):
        return Reason.TENSOR_SCALING

    own, own_A, own_B = base.__dict__["_parameters"], A.__dict__["_parameters"], B.__dict__["_parameters"]
    if own_A["bias"] is not None or own_B["bias"] is not None:
        return Reason.LORA_BIAS
    # A weight that sharding has moved out of _parameters is None here, and refused like a subclass.
    weight, bias = own.get("weight"), own.get("bias")
    weight_A, weight_B = own_A.get("weight"), own_B.get("weight")
    for tensor in (weight, weight_A, weight_B):
        if type(tensor) not in _PLAIN_TENSORS:
            return Reason.DTENSOR
    if bias is not None and type(bias) not in _PLAIN_TENSORS:
        return Reason.DTENSOR
    if weight.layout != torch.strided:
        return Reason.LAYOUT
    if weight.is_meta:
        return Reason.META
    if weight.requires_grad:
        return Reason.BASE_REQUIRES_GRAD
    return weight, weight_A, weight_B, bias, scaling, p, dropout.training


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


def _why_not_plain(layer: nn.Module, base: nn.Module) -> Reason:
    if _is_parametrized(base):
        return Reason.PARAMETRIZED
    return Reason.FAN_IN_FAN_OUT if layer.fan_in_fan_out else Reason.BASE_LAYER
