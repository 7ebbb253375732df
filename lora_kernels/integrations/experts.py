"""The experts of a mixture as transformers declares them: one 3-D parameter per projection, whichever the family.

Whatever ``config._experts_implementation`` chooses computes the same function; here it is computed with LoRA on either
projection, by ``grouped_lora_linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional.grouped import grouped_lora_linear
from ..functional.routing import Routing, combine, permute, route
from ..operands import ExpertsBranch
from ..operands.experts import IMPLEMENTATION, projections
from ..ops.grouped_lora_linear import groups, of_group


def forward(
    experts: Any, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, branches: Mapping[str, ExpertsBranch]
) -> Tensor:
    """What the experts compute, with LoRA.

    Args:
        experts: for which ``why_not_experts`` is None.
        hidden_states: [tokens, features].
        expert_ids: integer [tokens, top_k]. weights: [tokens, top_k]. The router's choices.
        branches: of the projections that have an adapter, by the parameter's name.

    Returns:
        [tokens, features], dtype of ``hidden_states``.
    """
    up, down = projections(experts)
    routing = route(expert_ids, experts.num_experts)
    h = _project(experts, up, permute(hidden_states, routing), routing, branches)
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    y = _project(experts, down, h, routing, branches)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
        weights = weights.masked_fill(expert_ids >= experts.num_experts, 0.0)
    return combine(y, weights, routing).to(hidden_states.dtype)


def _project(experts: Any, name: str, x: Tensor, routing: Routing, branches: Mapping[str, ExpertsBranch]) -> Tensor:
    """x [rows, in_features] through one projection, in the weight's dtype, also under autocast: casting it would make a
    second copy of all experts.
    """
    weight = getattr(experts, name)
    x = x.to(weight.dtype)
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    bias = getattr(experts, name + "_bias") if experts.has_bias else None
    with torch.autocast(x.device.type, enabled=False):
        if name not in branches:
            return _without_adapter(x, weight, routing.offsets, bias)
        lora_A, lora_B, scaling = branches[name]
        return grouped_lora_linear(x, weight, lora_A, lora_B, routing.offsets, bias, scaling=scaling)


def _without_adapter(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """``grouped_lora_linear`` without an adapter, by torch's product where that takes the operands.

    It leaves rows behind the last group as they happen to be.
    """
    if not _grouped_mm_takes(x, weight):
        parts = [F.linear(x[rows], weight[g], of_group(bias, g, 1)) for g, rows in groups(offsets)]
        served = sum(map(len, parts))
        return torch.cat([*parts, x.new_zeros(len(x) - served, weight.shape[1])])
    rows = torch.arange(len(x), device=x.device, dtype=torch.int32)
    is_behind = (rows >= offsets[-1]).unsqueeze(1)
    y = F.grouped_mm(x.masked_fill(is_behind, 0.0), weight.transpose(1, 2), offs=offsets)
    if bias is not None:
        experts = torch.searchsorted(offsets, rows, right=True).clamp(max=len(offsets) - 1)
        y = y + bias[experts]
    return y.masked_fill(is_behind, 0.0)


def _grouped_mm_takes(x: Tensor, weight: Tensor) -> bool:
    steps = (weight.stride(1), weight.stride(2), x.stride(0))
    return x.dtype != torch.float64 and all(step == 1 or step * x.element_size() % 16 == 0 for step in steps)


def register() -> None:
    """Makes ``experts_implementation="lora_kernels"`` known to transformers, for models with or without adapters.

    Raises:
        ImportError: transformers is not installed, or has no ``integrations.moe`` (older than 5).
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _unadapted)


def _unadapted(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In the form that transformers calls."""
    return forward(experts, hidden_states, top_k_index, top_k_weights, {})
