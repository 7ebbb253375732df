"""The layers that replace PEFT's own. Importing this module imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from torch import Tensor, nn

from .. import dispatch
from ..functional import dora_linear, lora_embedding, lora_linear_of_layer
from ..reasons import Reason
from . import _layer_checks, _mixed_batch

original_create_new_module = LoraModel._create_new_module
"""What ``LoraModel`` had when ``patch_peft`` was called last."""


class FusedLinear(Linear):
    """PEFT's ``lora.Linear`` with a forward of one op where that computes the same.

    Where it does not (``_layer_checks``), PEFT's own forward serves the whole call and ``lk.stats()`` counts
    the reason. Nothing but ``forward`` differs: parameters, merging, adapter switching and hooks are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            reason = _extra_arguments(self, args, kwargs)
            if reason is None:
                found = _mixed_batch.groups(self, x, kwargs["adapter_names"])
                if type(found) is list:
                    return _mixed_batch.add_updates(self.base_layer(x), x, found)
                reason = found
        else:
            found = _layer_checks.operands(self)
            if type(found) is tuple:
                weight, lora_A, lora_B, bias, scaling, dropout_p, training, magnitude = found
                reason = _layer_checks.call_reason(x, weight, lora_A, lora_B)
                if reason is None and magnitude is None:
                    return lora_linear_of_layer(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training)
                if reason is None:
                    return dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling)
            else:
                reason = found
        _count("lora_linear", reason)
        return super().forward(x, *args, **kwargs)


class FusedEmbedding(Embedding):
    """PEFT's ``lora.Embedding``, as ``FusedLinear`` is its ``lora.Linear``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            reason = _extra_arguments(self, args, kwargs) or Reason.ADAPTER_NAMES
        else:
            found = _layer_checks.embedding_operands(self)
            reason = found if type(found) is Reason else _layer_checks.ids_reason(x)
            if reason is None:
                weight, lora_A, lora_B, scaling, padding_idx = found
                return lora_embedding(x, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)
        _count("lora_embedding", reason)
        return super().forward(x, *args, **kwargs)


class CountedParamWrapper(ParamWrapper):
    """PEFT's layer for ``target_parameters``, which computes ``W + s B A``; only counted."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _count("lora_linear", Reason.TARGET_PARAMETERS)
        return super().forward(x, *args, **kwargs)


SWAPS = {Linear: FusedLinear, Embedding: FusedEmbedding, ParamWrapper: CountedParamWrapper}
"""PEFT's layers and what replaces them."""


def _extra_arguments(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Reason | None:
    """Why a call with more than x is PEFT's own; None for ``adapter_names``."""
    if layer._disable_adapters:
        return Reason.DISABLED
    only_names = not args and len(kwargs) == 1 and kwargs.get("adapter_names") is not None
    return None if only_names else Reason.EXTRA_ARGUMENTS


def _count(op: str, reason: Reason) -> None:
    if not torch.compiler.is_compiling():  # a counter in traced code would recompile on every call
        dispatch.count_fallback(op, reason)


def create_in_patched_peft(*args: Any, **kwargs: Any) -> nn.Module:
    """Stands in for ``LoraModel._create_new_module`` on the class."""
    return swap(original_create_new_module(*args, **kwargs))


def create_in_patched_model(*args: Any, **kwargs: Any) -> nn.Module:
    """Stands in for ``LoraModel._create_new_module`` on one instance."""
    return swap(LoraModel._create_new_module(*args, **kwargs))


def swap(module: nn.Module) -> nn.Module:
    """``module``, of our class if it was of PEFT's."""
    ours = SWAPS.get(type(module))
    if ours is not None:
        module.__class__ = ours
    return module
