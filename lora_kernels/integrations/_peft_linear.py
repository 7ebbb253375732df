"""The layer that replaces PEFT's ``lora.Linear``. Importing this module imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from .. import dispatch
from ..functional import dora_linear, lora_linear
from ..reasons import Reason
from . import _layer_checks

original_create_new_module = LoraModel._create_new_module
"""What ``LoraModel`` had when ``patch_peft`` was called last."""


class FusedLinear(Linear):
    """PEFT's ``lora.Linear`` with a forward of one ``lora_linear`` where that computes the same.

    Where it does not (``_layer_checks``), PEFT's own forward serves the whole call and ``lk.stats()`` counts
    the reason. Nothing but ``forward`` differs: parameters, merging, adapter switching and hooks are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            found = _mixed_batch_groups(self, x, args, kwargs)
            if type(found) is list:
                return _mixed_batch(self.base_layer(x), x, found)
            reason = found
        else:
            found = _layer_checks.operands(self)
            if type(found) is tuple:
                weight, lora_A, lora_B, bias, scaling, dropout_p, training = found
                reason = _layer_checks.call_reason(x, weight, lora_A, lora_B)
                if reason is None:
                    return lora_linear(
                        x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p, training=training
                    )
            elif found is Reason.DORA:
                found = _layer_checks.dora_operands(self)
                if type(found) is tuple:
                    weight, lora_A, lora_B, magnitude, bias, scaling = found
                    reason = _layer_checks.call_reason(x, weight, lora_A, lora_B)
                    if reason is None:
                        return dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling)
                else:
                    reason = found
            else:
                reason = found
        if not torch.compiler.is_compiling():  # a counter in traced code would recompile on every call
            dispatch.count_fallback("lora_linear", reason)
        return super().forward(x, *args, **kwargs)


Group = tuple[list[int], Tensor, Tensor, "Tensor | None", "float | Tensor"]
"""Batch indices that share an adapter; its lora_A, lora_B, bias of lora_B and scaling."""


def _mixed_batch_groups(layer: Linear, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> list[Group] | Reason:
    """What ``_mixed_batch`` adds for ``adapter_names``, or why PEFT's own code must serve the call."""
    if layer._disable_adapters:
        return Reason.DISABLED
    names = kwargs.get("adapter_names")
    if args or names is None or len(kwargs) != 1:
        return Reason.EXTRA_ARGUMENTS
    if layer.merged or len(names) != len(x) or torch.is_grad_enabled():
        return Reason.ADAPTER_NAMES  # the first two are errors, which PEFT reports
    batch: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        batch.setdefault(name, []).append(index)
    groups: list[Group] = []
    for name, indices in batch.items():
        if name not in layer.lora_A:  # "__base__", or an adapter of other layers
            continue
        found = _layer_checks.branch_operands(layer, name)
        if type(found) is not tuple:
            return found
        lora_A, lora_B, lora_bias, scaling, p, training = found
        if p > 0.0 and training:
            return Reason.ADAPTER_NAMES
        reason = _layer_checks.call_reason(x, layer.get_base_layer().weight, lora_A, lora_B)
        if reason is not None:
            return reason
        groups.append((indices, lora_A, lora_B, lora_bias, scaling))
    return groups


def _mixed_batch(y: Tensor, x: Tensor, groups: list[Group]) -> Tensor:
    """Adds to y, the base layer's own result, the update of each group to its samples. Other samples stay as they are.

    No adapter is multiplied with another's rows, not even by zero: one that holds NaN spoils its own samples only.
    """
    dtype = y.dtype
    for indices, lora_A, lora_B, lora_bias, scaling in groups:
        first, last = indices[0], indices[-1] + 1
        adjacent = last - first == len(indices)
        index = None if adjacent else torch.tensor(indices, device=x.device)
        x_part = (x[first:last] if adjacent else x.index_select(0, index)).to(dtype)
        s = (x_part.reshape(-1, x.shape[-1]) @ lora_A.to(dtype).t()) * scaling
        bias = None if lora_bias is None else lora_bias * scaling
        if adjacent and y.is_contiguous():
            rows = y[first:last].view(-1, y.shape[-1])
            rows.addmm_(s.to(dtype), lora_B.to(dtype).t())
            if bias is not None:
                rows += bias.to(dtype)
        else:
            update = s.to(dtype) @ lora_B.to(dtype).t()
            if bias is not None:
                update += bias.to(dtype)
            target = slice(first, last) if adjacent else index
            y[target] += update.view_as(y[target])
    dispatch.count_served("lora_linear_mixed_batch", "reference")
    return y


def create_in_patched_peft(*args: Any, **kwargs: Any) -> nn.Module:
    """Stands in for ``LoraModel._create_new_module`` on the class."""
    return _fused(original_create_new_module(*args, **kwargs))


def create_in_patched_model(*args: Any, **kwargs: Any) -> nn.Module:
    """Stands in for ``LoraModel._create_new_module`` on one instance."""
    return _fused(LoraModel._create_new_module(*args, **kwargs))


def _fused(module: nn.Module) -> nn.Module:
    if type(module) is Linear:
        module.__class__ = FusedLinear
    return module
