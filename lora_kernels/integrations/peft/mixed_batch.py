"""``adapter_names``: a batch whose samples use different adapters of a ``lora.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import dispatch, operands
from ...formats import QuantizedWeight
from ...functional.multi import multi_lora_linear_of_layer
from ...functional.packed import linear_of_layer
from ...ops.eager import as_rows
from ...reasons import Reason

Group = tuple[list[int], Tensor, Tensor, "Tensor | None", "float | Tensor"]
"""Samples that share an adapter; its lora_A, lora_B, bias of lora_B and scaling."""


class Routed(tuple[str, ...]):
    """Names that ``route_adapters`` gave: every call of such is served, in training, too."""


class Batch(NamedTuple):
    """What ``forward`` adds to the base."""

    groups: list[Group]
    dropout_p: float
    """Of all groups alike, 0 where nothing is dropped."""


def batch_of(layer: Any, x: Tensor, names: Sequence[str]) -> Batch | Reason:
    """What ``forward`` adds for ``names``, one per sample of x, or why it cannot serve the call.

    ``Reason.ADAPTER_NAMES`` is one that PEFT reports as an error, or, but for ``Routed``, computes in its own way.
    """
    if layer.merged or len(names) != len(x):
        return Reason.ADAPTER_NAMES
    is_routed = type(names) is Routed
    base: Any = operands.base_operands(layer.base_layer)
    weight = base[0] if type(base) is tuple else layer.get_base_layer().weight
    found: list[Group] = []
    drops: set[float] = set()
    dtypes, adapters = None, layer.lora_A._modules
    for name, indices in _samples(names).items():
        if name not in adapters:  # "__base__", or an adapter of other layers
            continue
        branch: Any = operands.branch_operands(layer, name)
        if type(branch) is not tuple:
            return branch
        lora_A, lora_B, lora_bias, scaling, p, training, magnitude = branch
        p = p if training else 0.0
        if magnitude is not None or p > 0.0:
            if not is_routed:
                return Reason.ADAPTER_NAMES  # PEFT refuses DoRA, and draws its own mask
            if magnitude is not None:
                return Reason.DORA
        drops.add(p)
        if (lora_A.dtype, lora_B.dtype) != dtypes:
            reason = operands.call_reason(x, weight, lora_A, lora_B)
            if reason is not None:
                return reason
            dtypes = lora_A.dtype, lora_B.dtype
        found.append((indices, lora_A, lora_B, lora_bias, scaling))
    if not drops <= {0.0} and (len(drops) > 1 or _weight_of_one_op(layer.base_layer, x, found) is None):
        return Reason.DROPOUTS
    return Batch(found, max(drops, default=0.0))


def _samples(names: Sequence[str]) -> dict[str, list[int]]:
    """The samples of each name."""
    samples: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        samples.setdefault(name, []).append(index)
    return samples


def forward(layer: Any, x: Tensor, batch: Batch) -> Tensor:
    """What the layer computes: by ``multi_lora_linear`` where its base is a plain one that nothing hooks."""
    found, p = batch
    base = layer.base_layer
    weight = _weight_of_one_op(base, x, found)
    if weight is None:
        return add_updates(base_result(base, x), x, found)
    ids = [-1] * len(x)
    for slot, (samples, *_) in enumerate(found):
        for sample in samples:
            ids[sample] = slot
    adapter_ids = torch.tensor(ids, device=x.device)
    rows_each = x.shape[1:-1].numel()
    if rows_each != 1:
        adapter_ids = adapter_ids.repeat_interleave(rows_each)
    _, lora_A, lora_B, _, scalings = (list(of_all) for of_all in zip(*found))
    return multi_lora_linear_of_layer(x, weight[0], lora_A, lora_B, scalings, adapter_ids, weight[1], p)


def _weight_of_one_op(base: Any, x: Tensor, found: list[Group]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a base that the op multiplies with, None where ``add_updates`` has to serve."""
    if not found or x.dim() < 2:
        return None
    operands_of_base: Any = operands.base_operands(base)
    if type(operands_of_base) is not tuple or operands.why_not_called_as_is(base) is not None:
        return None
    weight, bias = operands_of_base
    dtype = found[0][1].dtype
    if type(weight) is QuantizedWeight or any(A.dtype != dtype or b is not None for _, A, _, b, _ in found):
        return None
    return weight, bias


def one_by_one(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor:
    """What the layer's own forward computes of each adapter's samples, with that adapter active."""
    parts, order = [], []
    before = layer._active_adapter
    try:
        for name, indices in _samples(names).items():
            own = x[torch.tensor(indices, device=x.device)]
            layer._active_adapter = [name]
            parts.append(layer.forward(own) if name in layer.lora_A else layer.base_layer(own))
            order += indices
    finally:
        layer._active_adapter = before
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(parts)[places.to(x.device)]


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
