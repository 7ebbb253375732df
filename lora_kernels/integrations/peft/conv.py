"""PEFT's convolutions: the base's result, and the adapter's part accumulated into it by one product per adapter.

The base layer, the dropout and lora_A, a convolution like the base's, are called as they are. What is ours is lora_B, a
convolution with a kernel of one element: PEFT writes its result, that times the scaling, and the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import dispatch, operands
from ...functional.branches import add_channels, may_add_channels
from ...plain import FLOATS, PLAIN_TENSORS, inside_transform, is_parametrized, not_plain
from ...reasons import Reason
from ...support import cpu

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Adapter = tuple[str, Tensor, "float | Tensor"]
"""Name, weight of lora_B, scaling."""


def adapters(layer: Any) -> list[Adapter] | Reason:
    """The active adapters of one of PEFT's convolutions, or why the layer must run its own forward now."""
    state = layer.__dict__
    names = operands.active_adapters(state, "lora_A")
    if type(names) is Reason:
        return names
    base = state["_modules"]["base_layer"]
    if type(base) not in _CONVOLUTIONS:
        return Reason.PARAMETRIZED if is_parametrized(base) else Reason.BASE_LAYER
    reason = operands.why_not_called_as_is(base)  # a hook may keep the result that we write into
    if reason is not None:
        return reason
    found: list[Adapter] = []
    for name in [names] if type(names) is str else names:
        if name not in layer.lora_A:
            return Reason.NO_ACTIVE_ADAPTER
        if name in state["lora_variant"]:
            is_dora = type(state["lora_variant"][name]).__name__.startswith("DoraConv")
            return Reason.DORA if is_dora else Reason.VARIANT
        adapter: Any = _adapter(layer, name, type(base))
        if type(adapter) is Reason:
            return adapter
        found.append(adapter)
    return found


def _adapter(layer: Any, name: str, kind: type[nn.Module]) -> Adapter | Reason:
    A, B = layer.lora_A[name], layer.lora_B[name]
    if type(A) is not kind or type(B) is not kind:
        return Reason.PARAMETRIZED if is_parametrized(A) or is_parametrized(B) else Reason.ADAPTER_MODULES
    if {*B.kernel_size, *B.stride} != {1} or B.padding != (0,) * len(B.kernel_size):
        return Reason.ADAPTER_MODULES
    reason = operands.why_not_called_as_is(B)
    if reason is not None:
        return reason
    weight, bias = (B._parameters.get(part, Reason.DISPLACED) for part in ("weight", "bias"))
    if type(weight) not in PLAIN_TENSORS:
        return not_plain(weight)
    if bias is not None:
        return Reason.LORA_BIAS if isinstance(bias, Tensor) else Reason.DISPLACED
    if A.weight.dtype != weight.dtype or weight.dtype not in FLOATS:
        return Reason.MIXED_DTYPES
    scaling: Any = operands.usual_scaling(layer.scaling[name])
    return scaling if type(scaling) is Reason else (name, weight, scaling)


def call_reason(x: Any, found: list[Adapter]) -> Reason | None:
    """Why this input's convolution is PEFT's own; None if it is not."""
    if type(x) not in PLAIN_TENSORS:
        return Reason.DTENSOR
    if x.layout != torch.strided or x.is_nested:
        return Reason.LAYOUT
    dtype = operands.product_dtype(x)
    if dtype not in FLOATS:
        return Reason.DTYPE
    for _, weight, _ in found:
        if weight.dtype != dtype and not (weight.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
            return Reason.MIXED_DTYPES
    if not is_compiling() and x.is_cpu and not cpu.has_native_matmul(dtype):
        return Reason.DTYPE  # torch's matrix products would be slow loops, its convolutions are not
    return Reason.TRANSFORM if inside_transform() else None


def forward(layer: Any, x: Tensor, found: list[Adapter]) -> Tensor:
    """The layer's output, in the base result's dtype."""
    y = layer.base_layer(x)
    for name, weight, scaling in found:
        x = layer._cast_input_dtype(x, weight.dtype)  # PEFT's, which a model can switch off
        s = layer.lora_A[name](layer.lora_dropout[name](x))
        y = _add(y, s, weight, scaling, layer.lora_B[name])
    if not is_compiling():
        dispatch.count_served("lora_conv", "reference")
    return y


def _add(y: Tensor, s: Tensor, weight: Tensor, scaling: float | Tensor, lora_B: Any) -> Tensor:
    batched = y.dim() == weight.dim()
    if batched and not is_compiling() and may_add_channels(y, lora_B.groups):
        return add_channels(y, s, weight, scaling, lora_B.groups)
    return y + lora_B._conv_forward(s.to(y.dtype), weight.to(y.dtype), None) * scaling
