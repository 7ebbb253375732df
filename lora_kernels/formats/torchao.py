"""Weights that torchao has replaced by tensors of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..reasons import Reason


def weight_of(module: nn.Module, *kinds: str) -> Any:
    """The module's weight, if it is one of these classes of torchao's, a reason where activations are quantised, too;
    None where it is something else. Told by name, so that nothing is imported.
    """
    weight: Any = module.__dict__["_parameters"].get("weight")
    kind = type(weight)
    if kind.__name__ not in kinds or not kind.__module__.startswith("torchao."):
        return None
    return weight if getattr(weight, "act_quant_kwargs", None) is None else Reason.ACTIVATIONS
