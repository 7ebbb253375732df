"""Several active adapters of a ``lora.Linear`` under dropout: the base product once, and a mask for each adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ... import operands
from ...functional.branches import add_rows
from ...functional.lora import lora_linear_of_layer
from ...reasons import Reason


def call_reason(x: Any, found: operands.SideBySide) -> Reason | None:
    """As ``operands.call_reason``, for all of these adapters."""
    weight, lora_A, lora_B, *_ = found.first
    for A, B in [(lora_A, lora_B), *((branch[0], branch[1]) for branch in found.others)]:
        reason = operands.call_reason(x, weight, A, B)
        if reason is not None:
            return reason
    return None


def forward(x: Tensor, found: operands.SideBySide) -> Tensor:
    """The layer's output. The first adapter's mask is ``lora_linear``'s, the others' are torch's, which stores them."""
    weight, lora_A, lora_B, bias, scaling, p, training, _ = found.first
    y = lora_linear_of_layer(x, weight, lora_A, lora_B, bias, scaling, p, training)
    for lora_A, lora_B, _, scaling, p, training, _ in found.others:
        s = F.linear(F.dropout(x, p, training).to(y.dtype), lora_A.to(y.dtype))
        y = add_rows(y, s, lora_B, scaling)
    return y
