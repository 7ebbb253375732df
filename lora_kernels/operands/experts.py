"""What ``grouped_lora_linear`` needs from PEFT's adapter of the experts of a mixture, which are one 3-D parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reasons import Reason
from .adapters import active_adapters, branch_operands, stack

ExpertsBranch = tuple[Tensor, Tensor, "float | Tensor"]
"""lora_A [experts, rank, in_features], lora_B [experts, out_features, rank], scaling."""


def experts_branch(layer: Any, is_transposed: bool) -> ExpertsBranch | Reason | None:
    """What the active adapters of a ``ParamWrapper`` add to its parameter, None if nothing, or why PEFT's own forward
    must serve the call.

    Args:
        is_transposed: whether the parameter is [experts, in_features, out_features].
    """
    names: Any = active_adapters(layer.__dict__, "lora_A")
    if type(names) is Reason:
        return None if names is Reason.NO_ACTIVE_ADAPTER else names
    branches = []
    for name in [names] if type(names) is str else names:
        branch: Any = branch_operands(layer, name)
        if branch is Reason.NO_ACTIVE_ADAPTER:
            continue
        if type(branch) is Reason:
            return branch
        lora_A, lora_B, lora_bias, scaling, p, _, magnitude = branch
        if lora_bias is not None or magnitude is not None or p > 0.0:
            return Reason.ADAPTER_MODULES  # PEFT refuses to make such
        branches.append((*_of_experts(layer, lora_A, lora_B, is_transposed), scaling))
    if not branches:
        return None
    return branches[0] if len(branches) == 1 else stack(branches)


def _of_experts(layer: Any, lora_A: Tensor, lora_B: Tensor, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """PEFT's factors, of all experts side by side, as [experts, rank, in_features] and [experts, out_features, rank].

    In lora_A [experts * rank, _] the expert comes before the rank, in lora_B [_, rank * experts] behind it. Which of
    the two is on the inputs' side depends on PEFT's version: up to 0.18 the parameter's last size is always lora_B's,
    0.19.0 made it lora_A's for transposed parameters, later versions for all others. The layer remembers what it did.
    """
    state = layer.__dict__
    experts = state["num_experts"]
    first = lora_A.reshape(experts, -1, lora_A.shape[1])
    second = lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 0, 1)
    last_size_is_lora_A = state.get("_did_swap_in_out_features", False)
    if last_size_is_lora_A != is_transposed:
        return first, second
    return second.transpose(1, 2), first.transpose(1, 2)
