"""Batches whose samples use different adapters of a ``lora.Linear``, and adapters that act on some tokens only.

``adapter_names`` says which adapter each sample uses. An aLoRA adapter (Greenewald et al., 2025) acts from its
invocation tokens on: ``alora_offsets`` says how many tokens before the end of each sample that is. Both are one
``multi_lora_linear``, with an id per row; over a base layer that is not plain, its own product and the updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from ... import dispatch, operands
from ...formats import QuantizedWeight
from ...functional.multi import multi_lora_linear, multi_lora_linear_apart
from ...functional.packed import linear_of_layer
from ...ops.eager import as_rows
from ...plain import inside_transform
from ...reasons import Reason

Offsets = tuple["int | None", ...] | None
_Key = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], Offsets, int, torch.device]


class Routed(tuple[str, ...]):
    """Names that ``route_adapters`` gave: every call of such is served, in training, too."""


_ids: dict[_Key, Tensor] = {}
_MOST_IDS = 64
"""Of batches that are remembered: all layers of a model ask for the same ones."""


class Mixed(NamedTuple):
    """What a call computes with."""

    base: tuple[Tensor, Tensor | None] | None
    """Weight and bias; None for a base layer that has to be called."""
    ids: Tensor
    """int64 [rows]: which of the adapters below each uses, -1 for none."""
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    scalings: list[float | Tensor]
    lora_biases: list[Tensor | None]
    dropout_p: float
    """While training."""


def mixed(layer: Any, x: Any, given: Mapping[str, Any]) -> Mixed | Reason:
    """What a call with these extra arguments computes with, or why PEFT's own code must serve it.

    Args:
        given: ``adapter_names`` and ``alora_offsets``, or none of them.
    """
    if layer.merged:
        return Reason.ADAPTER_NAMES if given.get("adapter_names") is not None else Reason.MERGED
    if not isinstance(x, Tensor) or x.dim() < 2 or inside_transform():
        return Reason.TRANSFORM if isinstance(x, Tensor) and x.dim() > 1 else Reason.LAYOUT
    names, offsets = given.get("adapter_names"), given.get("alora_offsets")
    if names is None:
        active = layer.active_adapters
        if len(active) != 1:
            return Reason.ADAPTER_NAMES
        names = [active[0]] * len(x)
    if len(names) != len(x) or (offsets is not None and len(offsets) != len(x)):
        return Reason.ADAPTER_NAMES  # PEFT reports the error
    found = _found(layer, x, tuple(names), None if offsets is None else tuple(offsets))
    refused = found is Reason.DORA and type(names) is not Routed  # by PEFT, which says so
    return Reason.ADAPTER_NAMES if refused else found


def acts_on_some_tokens(layer: Any) -> bool:
    """Whether the one active adapter of a ``lora.Linear`` is an aLoRA."""
    active = layer.active_adapters
    return len(active) == 1 and operands.is_alora(layer, active[0])


def _found(layer: Any, x: Tensor, names: tuple[str, ...], offsets: Offsets) -> Mixed | Reason:
    known = layer.lora_A._modules
    used = tuple(name for name in dict.fromkeys(names) if name in known)  # not "__base__", nor other layers'
    base: Any = operands.base_operands(layer.base_layer)
    weight: Any = base[0] if type(base) is tuple else getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, (Tensor, QuantizedWeight)):
        return base
    branches, dtypes = [], None
    for name in used:
        branch: Any = operands.branch_operands(layer, name, some_tokens=True)
        if type(branch) is Reason:
            return branch
        lora_A, lora_B, lora_bias, scaling, p, training, magnitude = branch
        if magnitude is not None:
            return Reason.DORA
        if (lora_A.dtype, lora_B.dtype) != dtypes:  # all else that is asked is alike for all of them
            reason = operands.call_reason(x, weight, lora_A, lora_B)
            if reason is not None:
                return reason
            dtypes = lora_A.dtype, lora_B.dtype
        branches.append((lora_A, lora_B, scaling, lora_bias, p if training else 0.0))
    dropouts = {p for *_, p in branches} or {0.0}
    if len(dropouts) > 1:
        return Reason.DROPOUTS
    partial = tuple(name for name in used if operands.is_alora(layer, name))
    if partial and x.dim() > 3:
        return Reason.ADAPTER_NAMES
    ids = _ids_of(names, used, partial, offsets, x)
    lora_As, lora_Bs, scalings, lora_biases = (list(column) for column in [*zip(*branches)][:4] or [()] * 4)
    (dropout_p,) = dropouts
    return Mixed(
        _plain_base(layer, base, lora_As, lora_Bs), ids, lora_As, lora_Bs, scalings, lora_biases, dropout_p
    )  # fmt: skip


def _plain_base(layer: Any, base: Any, lora_As: list[Tensor], lora_Bs: list[Tensor]) -> Any:
    """Weight and bias where the op may multiply with them itself."""
    if type(base) is not tuple or type(base[0]) is QuantizedWeight or not lora_As:
        return None
    if operands.why_not_called_as_is(layer.base_layer) is not None:
        return None
    return base if len({t.dtype for t in (*lora_As, *lora_Bs)}) == 1 else None


def _ids_of(
    names: tuple[str, ...], used: tuple[str, ...], partial: tuple[str, ...], offsets: Offsets, x: Tensor
) -> Tensor:
    """The id of each row of x."""
    tokens = x.shape[1:-1].numel()
    number = {name: i for i, name in enumerate(used)}
    of_samples = [number.get(name, -1) for name in names]
    if is_compiling() or type(x) is not Tensor:
        return _make_ids(of_samples, _starts(names, partial, offsets, tokens), tokens, x.device)
    key = (names, used, partial, offsets, tokens, x.device)
    ids = _ids.get(key)
    if ids is None:
        if len(_ids) >= _MOST_IDS:
            _ids.clear()
        with torch.inference_mode(False):  # a later call may train
            ids = _make_ids(of_samples, _starts(names, partial, offsets, tokens), tokens, x.device)
        if type(ids) is Tensor:
            _ids[key] = ids
    return ids


def _starts(names: tuple[str, ...], partial: tuple[str, ...], offsets: Offsets, tokens: int) -> list[int]:
    """From which token on each sample's adapter acts."""
    if not partial:
        return []
    each = offsets or (None,) * len(names)
    return [tokens - min(int(o or 0), tokens) if name in partial else 0 for name, o in zip(names, each)]


def _make_ids(of_samples: list[int], starts: list[int], tokens: int, device: torch.device) -> Tensor:
    ids = torch.tensor(of_samples, dtype=torch.int64, device=device)
    if not starts:
        return ids if tokens == 1 else ids.repeat_interleave(tokens)
    acts = torch.arange(tokens, device=device) >= torch.tensor(starts, device=device).unsqueeze(1)
    return torch.where(acts, ids.unsqueeze(1), -1).view(-1)


def forward(layer: Any, x: Tensor, found: Mixed) -> Tensor:
    """The layer's output."""
    if found.base is None:
        return _add_updates(_base_result(layer.base_layer, x), x, found)
    weight, bias = found.base
    ids, y = found.ids.view(x.shape[:-1]), None
    if found.dropout_p == 0.0:
        y = multi_lora_linear_apart(x, weight, found.lora_As, found.lora_Bs, found.scalings, ids, bias)
    if y is None:
        y = _by_pools(x, weight, bias, ids, found)
    return _add_biases(y, found) if any(b is not None for b in found.lora_biases) else y


def _by_pools(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, found: Mixed) -> Tensor:
    lora_A, lora_B, ranks = _pools(found.lora_As, found.lora_Bs)
    scaling = found.scalings[0]
    if not all(type(s) is float and s == scaling for s in found.scalings):
        scaling = torch.stack([torch.as_tensor(s, dtype=torch.float32, device=x.device) for s in found.scalings])
    return multi_lora_linear(
        x, weight, lora_A, lora_B, ids, bias,
        scaling=scaling, ranks=ranks, dropout_p=found.dropout_p, training=found.dropout_p > 0.0,
    )  # fmt: skip


def _pools(lora_As: list[Tensor], lora_Bs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """lora_A [adapters, rank, K], lora_B [adapters, N, rank] and, where they differ, the ranks."""
    if len(lora_As) == 1:
        return lora_As[0].unsqueeze(0), lora_Bs[0].unsqueeze(0), None
    own = [len(A) for A in lora_As]
    most = max(own)
    if min(own) == most:
        return torch.stack(lora_As), torch.stack(lora_Bs), None
    wide_As = [F.pad(A, (0, 0, 0, most - len(A))) for A in lora_As]
    wide_Bs = [F.pad(B, (0, most - B.shape[1])) for B in lora_Bs]
    return torch.stack(wide_As), torch.stack(wide_Bs), torch.tensor(own, device=lora_As[0].device)


def _add_biases(y: Tensor, found: Mixed) -> Tensor:
    """``y`` with the scaled bias of each row's lora_B."""
    none = y.new_zeros(y.shape[-1])
    each = [none if b is None else (b * s).to(y.dtype) for b, s in zip(found.lora_biases, found.scalings)]
    return y + torch.stack([*each, none])[found.ids].view(y.shape)  # -1 is the last


def _base_result(base: Any, x: Tensor) -> Tensor:
    """The base layer's own result; from a quantised weight by the op, where nothing hooks the layer."""
    found: Any = operands.base_operands(base)
    if type(found) is tuple and type(found[0]) is QuantizedWeight and operands.why_not_called_as_is(base) is None:
        weight, bias = found
        if bias is None or not bias.requires_grad:
            return linear_of_layer(x, weight, bias)
    return base(x)


def _add_updates(y: Tensor, x: Tensor, found: Mixed) -> Tensor:
    """y, the base layer's own result, after each adapter's update was added to its rows in place.

    Other rows keep their bits. No adapter is multiplied with another's rows, not even by zero: one that holds NaN
    spoils nothing but its own.
    """
    rows_of_x, shape = as_rows(F.dropout(x, found.dropout_p, found.dropout_p > 0.0)), y.shape
    rows_of_y = as_rows(y)
    for i, (lora_A, lora_B, scaling, lora_bias) in enumerate(
        zip(found.lora_As, found.lora_Bs, found.scalings, found.lora_biases)
    ):
        where = torch.nonzero(found.ids == i).squeeze(1)
        s = rows_of_x[where].to(y.dtype) @ lora_A.to(y.dtype).t()
        update = (s @ lora_B.to(y.dtype).t()) * scaling
        if lora_bias is not None:
            update = update + (lora_bias * scaling).to(y.dtype)
        rows_of_y = rows_of_y.index_add(0, where, update.to(y.dtype))
    if not is_compiling():
        dispatch.count_served("lora_linear", "reference")
    return rows_of_y.view(shape)


def one_by_one(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor:
    """What the layer's own forward computes of each adapter's samples, with that adapter active."""
    parts, order = [], []
    before = layer._active_adapter
    try:
        for name in dict.fromkeys(names):
            samples = [i for i, other in enumerate(names) if other == name]
            own = x[torch.tensor(samples, device=x.device)]
            layer._active_adapter = [name]
            parts.append(layer.forward(own) if name in layer.lora_A else layer.base_layer(own))
            order += samples
    finally:
        layer._active_adapter = before
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(parts)[places.to(x.device)]


def extra_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reason | None:
    """Why a call with more than x is PEFT's own; None if ``mixed`` knows all of it."""
    known = kwargs.keys() <= {"adapter_names", "alora_offsets"}
    return None if known and not args else Reason.EXTRA_ARGUMENTS
