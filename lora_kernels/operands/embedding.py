"""What ``lora_embedding`` needs from a PEFT layer besides the ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..plain import FLOATS, INDICES, LOW_PRECISION, PLAIN_TENSORS, inside_transform, is_parametrized, not_plain
from ..reasons import Reason
from .adapters import active_adapters, magnitude_of, stack, usual_scaling, why_not_called_as_is, why_not_frozen

EmbeddingOperands = tuple[Tensor, Tensor, Tensor, "float | Tensor", "int | None", "Tensor | None"]
"""weight, lora_A, lora_B, scaling, padding_idx, DoRA's magnitude or None."""

_DISPLACED = Reason.DISPLACED


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
    reason = why_not_frozen(weight)
    if reason is not None:
        return reason
    adapters, magnitude = [], None
    names = [names] if type(names) is str else names
    for name in names:
        if name not in layer.lora_embedding_A:
            return Reason.NO_ACTIVE_ADAPTER
        if name in state["lora_variant"]:
            magnitude = magnitude_of(layer, name, None, "Embedding")
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
    stacked = adapters[0] if len(adapters) == 1 else stack(adapters)
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
