"""Whether an input fits what a layer's operands are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..dispatch import any_autocast
from ..formats import QuantizedWeight
from ..plain import FLOATS, LOW_PRECISION, PLAIN_TENSORS, inside_transform
from ..reasons import Reason


def call_reason(x: Any, weight: Tensor | QuantizedWeight, weight_A: Tensor, weight_B: Tensor) -> Reason | None:
    """Why this input cannot be served by ``lora_linear`` on these weights; None if it can."""
    if type(x) not in PLAIN_TENSORS:
        return Reason.DTENSOR
    if x.layout != torch.strided or x.is_nested:
        return Reason.LAYOUT
    dtype = x.dtype
    if dtype not in FLOATS:
        return Reason.DTYPE
    if any_autocast() and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        if weight.dtype is not None and weight.dtype not in FLOATS:
            return Reason.MIXED_DTYPES
    elif dtype != weight.dtype:
        if type(weight) is not QuantizedWeight or (weight.dtype is not None and not x.is_cpu):
            return Reason.MIXED_DTYPES
        if weight.dtype is not None:
            dtype = torch.float32  # in which the product is formed then
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
    if any_autocast() and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
