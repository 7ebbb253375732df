"""``target_parameters``: PEFT's wrappers around a parameter of a module. Importing this module imports PEFT.

PEFT gives the module W + s B A for the call, a matrix as large as W: for a mixture, of all experts. Around the experts
of transformers and around a plain linear layer the call is computed from W, B and A themselves.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as _peft
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ... import operands
from ...functional.lora import lora_linear_of_layer
from ...operands import ExpertsBranch
from ...plain import PLAIN_TENSORS, inside_transform
from ...reasons import Reason
from .. import experts as _experts

Experts = tuple[nn.Module, dict[str, ExpertsBranch]]
"""The experts, and what the adapters add to each parameter."""

_FORWARDS = [
    (kind, kind.forward)
    for kind in (getattr(_peft, name, None) for name in ("_LoraParameterProxy", "_LoraFactorsProxy"))
    if kind is not None
]
"""What makes PEFT's W + s B A, as it was when this module was imported."""


def is_of_linear(wrapper: Any) -> bool:
    """Whether the wrapper's parameter is the weight of the linear layer right below it."""
    return wrapper.parameter_name == "weight" and isinstance(wrapper.__dict__["_modules"]["base_layer"], nn.Linear)


def why_not_swapped(wrapper: Any) -> Reason | None:
    """Why every call of a wrapper is PEFT's own; None if ours may serve it."""
    is_served = is_of_linear(wrapper) or operands.is_experts(wrapper.get_base_layer())
    return None if is_served else Reason.TARGET_PARAMETERS


def experts_operands(outermost: Any) -> Experts | Reason:
    """What a call of wrappers around one another computes with, around the experts inside."""
    found: dict[str, ExpertsBranch] = {}
    base: Any = outermost.get_base_layer()
    reason = operands.why_not_experts(base)
    if reason is not None:
        return reason
    names = operands.projections(base)
    wrapper = outermost
    while wrapper is not base:
        if not isinstance(wrapper, ParamWrapper) or wrapper.parameter_name not in names:
            return Reason.TARGET_PARAMETERS  # a bias, say
        if wrapper is not outermost:
            reason = operands.why_not_called_as_is(wrapper)
            if reason is not None:
                return reason
        branch: Any = operands.experts_branch(wrapper, base.is_transposed)
        if type(branch) is Reason:
            return branch
        if branch is not None:
            reason = _misfit(getattr(base, wrapper.parameter_name), base.is_transposed, branch)
            if reason is not None:
                return reason
            found[wrapper.parameter_name] = branch
        wrapper = wrapper.__dict__["_modules"]["base_layer"]
    return base, found


def _misfit(weight: Tensor, is_transposed: bool, branch: ExpertsBranch) -> Reason | None:
    """Why factors of these sizes and dtypes are none of this parameter."""
    lora_A, lora_B, _ = branch
    experts, n, k = weight.transpose(1, 2).shape if is_transposed else weight.shape
    if lora_A.shape != (experts, lora_B.shape[2], k) or lora_B.shape[:2] != (experts, n):
        return Reason.TARGET_PARAMETERS
    if lora_A.device != weight.device:
        return Reason.DEVICES
    return operands.call_reason(weight.new_empty(0), weight, lora_A, lora_B)


def call(wrapper: Any, x: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of a call, or why it is PEFT's own."""
    if any(kind.forward is not forward for kind, forward in _FORWARDS):
        return Reason.PROXY_REPLACED
    if is_of_linear(wrapper):
        return Reason.EXTRA_ARGUMENTS if args or kwargs else _call_linear(wrapper, x)
    found: Any = _why_not_routed(x, args, kwargs) or experts_operands(wrapper)
    if type(found) is Reason:
        return found
    base, branches = found
    expert_ids, weights = args
    return _experts.forward(base, x, expert_ids, weights, branches)


def _call_linear(wrapper: Any, x: Tensor) -> Tensor | Reason:
    found: Any = operands.operands(wrapper)
    if type(found) is not tuple:
        return found if type(found) is Reason else Reason.ADAPTER_MODULES
    weight, lora_A, lora_B, bias, scaling, p, training, _ = found
    reason = operands.call_reason(x, weight, lora_A, lora_B)
    return reason or lora_linear_of_layer(x, weight, lora_A, lora_B, bias, scaling, p, training)


def _why_not_routed(x: Any, args: tuple, kwargs: dict[str, Any]) -> Reason | None:
    """Why the arguments are not x [tokens, features], and the experts and weights that a router chose for it."""
    if len(args) != 2 or kwargs:
        return Reason.EXTRA_ARGUMENTS
    if any(type(t) not in PLAIN_TENSORS for t in (x, *args)):
        return Reason.DTENSOR
    if any(t.dim() != 2 for t in (x, *args)):
        return Reason.EXTRA_ARGUMENTS
    return Reason.TRANSFORM if inside_transform() else None
