"""``adapter_names``: a batch whose samples use different adapters of a ``lora.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, operands
from ...formats import QuantizedWeight
from ...functional.packed import linear_of_layer
from ...ops.eager import as_rows
from ...reasons import Reason

Group = tuple[list[int], Tensor, Tensor, "Tensor | None", "float | Tensor"]
"""Samples that share an adapter; its lora_A, lora_B, bias of lora_B and scaling."""


def groups(layer: Any, x: Tensor, names: Sequence[str]) -> list[Group] | Reason:
    """What ``add_updates`` adds for ``names``, one per sample of x, or why PEFT's own code must serve the call."""
    if layer.merged or len(names) != len(x):
        return Reason.ADAPTER_NAMES  # PEFT reports the error
    samples: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        samples.setdefault(name, []).append(index)
    base: Any = operands.base_operands(layer.base_layer)
    weight = base[0] if type(base) is tuple else getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, (Tensor, QuantizedWeight)):
        return base
    found: list[Group] = []
    for name, indices in samples.items():
        if name not in layer.lora_A:  # "__base__", or an adapter of other layers
            continue
        branch: Any = operands.branch_operands(layer, name)
        if type(branch) is not tuple:
            return branch
        lora_A, lora_B, lora_bias, scaling, p, training, magnitude = branch
        if magnitude is not None or (p > 0.0 and training):
            return Reason.ADAPTER_NAMES  # PEFT refuses DoRA, and draws its own mask
        reason = operands.call_reason(x, weight, lora_A, lora_B)
        if reason is not None:
            return reason
        found.append((indices, lora_A, lora_B, lora_bias, scaling))
    return found


def base_result(base: Any, x: Tensor) -> Tensor:
    """The base layer's own result; from a quantised weight by the op, where nothing hooks the layer."""
    found: Any = operands.base_operands(base)
    if type(found) is tuple and type(found[0]) is QuantizedWeight and operands.why_not_called_as_is(base) is None:
        weight, bias = found
        if bias is None or not bias.requires_grad:
            return linear_of_layer(x, weight, bias)
    return base(x)


def add_updates(y: Tensor, x: Tensor, found: list[Group]) -> Tensor:
    """y, the base layer's own result, after each group's update was added to its samples in place.

    Other samples keep their bits. No adapter is multiplied with another's samples, not even by zero: one that holds
    NaN spoils nothing but its own.
    """
    dtype = y.dtype
    for indices, lora_A, lora_B, lora_bias, scaling in found:
        first, last = indices[0], indices[-1] + 1
        adjacent = last - first == len(indices)
        where = slice(first, last) if adjacent else torch.tensor(indices, device=x.device)
        if isinstance(scaling, Tensor):
            lora_B, scaling, lora_bias = lora_B * scaling, 1.0, None if lora_bias is None else lora_bias * scaling
        s = as_rows(x[where]).to(dtype) @ lora_A.to(dtype).t()
        B = lora_B.to(dtype).t()
        if adjacent and lora_bias is None and y.is_contiguous():
            y[where].view(-1, y.shape[-1]).addmm_(s, B, alpha=scaling)
            continue
        if lora_bias is None:
            update = s @ B * scaling
        else:
            update = torch.addmm((lora_bias * scaling).to(dtype), s, B, alpha=scaling)
        y[where] += update.view(len(indices), *y.shape[1:])
    if not torch.compiler.is_compiling():
        dispatch.count_served("lora_linear", "reference")
    return y
