"""Merging PEFT's adapters into a ``QuantizedLinear``, whose bytes PEFT cannot add to: it is quantised again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from ...formats import FORMATS
from ...modules.quantized import QuantizedLinear


@torch.no_grad()
def merge(layer: Any, base: QuantizedLinear, adapter_names: list[str] | None) -> None:
    """``lora.Linear.merge``, always safe: an adapter whose sum is not finite changes nothing.

    Raises:
        ValueError: it is not. Adapters before it are merged then, as PEFT has it.
        RuntimeError: a bias in lora_B, and none in the base layer.
    """
    for name in check_adapters_to_merge(layer, adapter_names):
        if name not in layer.lora_A:
            continue
        weight = base.quantized_weight().dequantize(torch.float32)
        if name in layer.lora_variant:
            exact = layer.lora_variant[name].merge_safe(layer, name, weight)
        else:
            exact = weight + layer.get_delta_weight(name).to(weight)
        bias = _bias(layer, base, name, 1)
        _write(base, exact, bias, f"merge: the sum of the weight and adapter {name!r}")
        layer.merged_adapters.append(name)
        warnings.warn("merge: a packed weight is quantised again, which rounds it", UserWarning, stacklevel=3)


@torch.no_grad()
def unmerge(layer: Any, base: QuantizedLinear) -> None:
    """``lora.Linear.unmerge``: subtracts, and quantises again, so that a little of the adapter stays."""
    if not layer.merged:
        warnings.warn("unmerge: nothing is merged", UserWarning, stacklevel=3)
    while layer.merged_adapters:
        name = layer.merged_adapters.pop()
        if name not in layer.lora_A:
            continue
        weight = base.quantized_weight().dequantize(torch.float32)
        if name in layer.lora_variant:
            exact = layer.lora_variant[name].unmerge(layer, name, weight)
        else:
            exact = weight - layer.get_delta_weight(name).to(weight)
        _write(base, exact, _bias(layer, base, name, -1), f"unmerge: the weight without adapter {name!r}")


def _bias(layer: Any, base: QuantizedLinear, name: str, sign: int) -> Tensor | None:
    if not layer.lora_bias[name]:
        return None
    if base.bias is None:
        raise RuntimeError("merge: lora_bias=True needs a bias in the base layer")
    return base.bias + sign * layer.lora_B[name].bias * layer.scaling[name]


def _write(base: QuantizedLinear, exact: Tensor, bias: Tensor | None, what: str) -> None:
    weight = base.quantized_weight()
    finite = torch.isfinite(exact).all() and (bias is None or torch.isfinite(bias).all())
    merged = FORMATS[weight.format].again(exact, weight) if finite else None
    if merged is None or not torch.isfinite(merged.dequantize()).all():
        raise ValueError(f"{what} is not finite; it was not changed")
    for part, new in zip(weight.parts, merged.parts):
        part.copy_(new.view(part.shape))
    if bias is not None:
        base.bias.copy_(bias)
