"""The layer that replaces PEFT's ``lora.Linear``. Importing this module imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from .. import dispatch
from ..functional import lora_linear
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
            reason = _extra_arguments(self, kwargs)
        else:
            found = _layer_checks.operands(self)
            if type(found) is tuple:
                weight, lora_A, lora_B, bias, scaling, dropout_p, training = found
                reason = _layer_checks.call_reason(x, weight, lora_A, lora_B)
                if reason is None:
                    return lora_linear(
                        x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p, training=training
                    )
            else:
                reason = found
        if not torch.compiler.is_compiling():  # a counter in traced code would recompile on every call
            dispatch.count_fallback("lora_linear", reason)
        return super().forward(x, *args, **kwargs)


def _extra_arguments(layer: Linear, kwargs: dict[str, Any]) -> Reason:
    if layer._disable_adapters:
        return Reason.DISABLED
    return Reason.EXTRA_ARGUMENTS if kwargs.get("adapter_names") is None else Reason.ADAPTER_NAMES


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
