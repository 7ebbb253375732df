"""The experts of a mixture as transformers declares them, and what PEFT's adapter of their parameters holds.

``transformers.integrations.use_experts_implementation`` gives a module of experts, whose projections are one 3-D
parameter each, its layout (``is_transposed``, ``has_bias``, ``has_gate``, ...) and lets
``config._experts_implementation`` choose the code that serves it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..plain import FLOATS, is_parametrized
from ..reasons import Reason
from .adapters import active_adapters, branch_operands, stack, why_not_called_as_is, why_not_frozen

IMPLEMENTATION = "lora_kernels"
"""The name under which our code is known to transformers, once registered."""

ExpertsBranch = tuple[Tensor, Tensor, "float | Tensor"]
"""lora_A [experts, rank, in_features], lora_B [experts, out_features, rank], scaling."""


_INTERFACES: dict[type, Any] = {}
"""Of the classes that were asked about: torch.compile cannot read a function's closure and then follow the function."""


def _interface(module: nn.Module) -> Any:
    """What experts that transformers' decorator has made look their implementations up in; None for other modules."""
    kind = type(module)
    if kind not in _INTERFACES:
        _INTERFACES[kind] = _declared(kind.forward)
    return _INTERFACES[kind]


def _declared(forward: Any) -> Any:
    code, closure = getattr(forward, "__code__", None), getattr(forward, "__closure__", None)
    if code is None or not closure or "experts_interface" not in code.co_freevars:
        return None
    return closure[code.co_freevars.index("experts_interface")].cell_contents


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds experts whose layout transformers' decorator declares."""
    return _interface(module) is not None


def why_not_experts(experts: Any) -> Reason | None:
    """Why the experts' own forward must serve a call; None if ours computes the same."""
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
        branches.append((*factors_of_experts(layer, lora_A, lora_B, is_transposed), scaling))
    if not branches:
        return None
    return branches[0] if len(branches) == 1 else stack(branches)


def factors_of_experts(layer: Any, lora_A: Tensor, lora_B: Tensor, is_transposed: bool) -> tuple[Tensor, Tensor]:
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
