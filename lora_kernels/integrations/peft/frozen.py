"""Frozen linear layers without an adapter, plain or packed: those that ours are faster than."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import formats
from ...frozen_linears import FrozenLinear, faster_product
from ...modules.lora import LoRALinear
from ...modules.quantized import FrozenPacked, QuantizedLinear, frozen_packed
from ...reasons import Reason
from ...report import FROZEN_PACKED, Report


def patch_frozen(model: nn.Module, peft_layers: dict[str, Any], report: Report) -> None:
    """Swaps frozen plain linears; those inside a fused layer have no row of their own."""
    adapters = {
        child for layer in peft_layers.values() for child in layer.modules() if child is not layer.get_base_layer()
    }
    names = {name for name, _ in report.fused}
    fused = {layer.get_base_layer() for name, layer in peft_layers.items() if name in names}
    for name, module in model.named_modules():
        if module in adapters:
            continue
        own = module._parameters
        if type(module) not in (nn.Linear, FrozenLinear) or type(own.get("weight")) is not nn.Parameter:
            if module not in fused:
                _patch_packed(name, module, report)
            continue
        weight, bias = own.get("weight"), own.get("bias", Reason.DISPLACED)
        if "forward" in module.__dict__ or bias is Reason.DISPLACED:
            continue
        if weight.requires_grad or (isinstance(bias, Tensor) and bias.requires_grad):
            continue
        faster = faster_product(weight)
        if faster is not None:
            module.__class__ = FrozenLinear
        if module not in fused:
            (report.kept if faster is None else report.fused).append((name, faster or Reason.FAST_PRODUCT))


def _patch_packed(name: str, module: nn.Module, report: Report) -> None:
    """Swaps a layer with a quantised weight and no adapter; our own needs nothing."""
    if isinstance(module, (QuantizedLinear, LoRALinear)):
        return
    weight = formats.from_module(module)
    if weight is None:
        return
    reason = weight if isinstance(weight, Reason) else None
    if "forward" in module.__dict__:
        reason = Reason.INSTANCE_FORWARD
    elif any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        reason = Reason.BASE_REQUIRES_GRAD
    if reason is not None:
        report.kept.append((name, reason))
        return
    if not isinstance(module, FrozenPacked):
        module.__class__ = frozen_packed(type(module))
    report.fused.append((name, FROZEN_PACKED))
