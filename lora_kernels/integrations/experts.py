"""The experts of a mixture as transformers declares them: one 3-D parameter per projection, whichever the family.

``transformers.integrations.use_experts_implementation`` gives an experts module its layout (``is_transposed``,
``has_bias``, ``has_gate``) and lets ``config._experts_implementation`` choose the code that serves it. All of them
compute the same function; here it is computed with LoRA on either projection, by ``grouped_lora_linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional.grouped import grouped_lora_linear
from ..functional.routing import Routing, combine, permute, route
from ..operands import ExpertsBranch, why_not_called_as_is, why_not_frozen
from ..ops.grouped_lora_linear import groups, of_group
from ..plain import FLOATS, is_parametrized
from ..reasons import Reason

IMPLEMENTATION = "lora_kernels"
"""The name under which ``register`` makes this code known to transformers."""


def _interface(module: nn.Module) -> Any:
    """What experts that transformers' decorator has made look their implementations up in; None for other modules."""
    forward = type(module).forward
    code, closure = getattr(forward, "__code__", None), getattr(forward, "__closure__", None)
    if code is None or not closure or "experts_interface" not in code.co_freevars:
        return None
    return closure[code.co_freevars.index("experts_interface")].cell_contents


def is_declared(module: nn.Module) -> bool:
    """Whether ``module`` holds experts whose layout transformers' decorator declares."""
    return _interface(module) is not None


def why_not(experts: Any) -> Reason | None:
    """Why the experts' own forward must serve a call; None if ``forward`` computes the same."""
    interface = _interface(experts)
    if interface is None:
        return Reason.TARGET_PARAMETERS
    if is_parametrized(experts):
        return Reason.PARAMETRIZED
    chosen = experts.config._experts_implementation
    if chosen not in (None, "eager", IMPLEMENTATION):
        chosen = interface.get(chosen)
        if not getattr(chosen, "__module__", "").startswith("transformers."):
            return Reason.EXPERTS_IMPLEMENTATION
    parameters = experts.__dict__["_parameters"]
    for name in projections(experts):
        weight = parameters.get(name, Reason.DISPLACED)
        reason = why_not_frozen(weight)
        if reason is not None:
            return reason
        if weight.dim() != 3:
            return Reason.DISPLACED  # an empty shard of ZeRO-3
        if weight.dtype not in FLOATS:
            return Reason.DTYPE
    return why_not_called_as_is(experts)


def projections(experts: Any) -> tuple[str, str]:
    """The names of the two parameters."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def forward(
    experts: Any, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, branches: Mapping[str, ExpertsBranch]
) -> Tensor:
    """What the experts compute, with LoRA.

    Args:
        experts: for which ``why_not`` is None.
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
            return _frozen(x, weight, routing.offsets, bias)
        lora_A, lora_B, scaling = branches[name]
        return grouped_lora_linear(x, weight, lora_A, lora_B, routing.offsets, bias, scaling=scaling)


def _frozen(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
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
