"""What the loss of a language model is made of: the parts of its forward, its head, the loss of hidden states."""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import class_swaps, operands
from ..formats import QuantizedWeight
from ..frozen_linears import FrozenLinear
from ..functional.cross_entropy import linear_cross_entropy
from ..plain import PLAIN_TENSORS, has_hooks, is_parametrized, not_plain
from ..reasons import Reason

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
"""What configs call a bound of the logits (Gemma), and what they are multiplied (Cohere, Falcon-H1) or divided
(Granite) by. That the model does so, and nothing else, is tried out before anything is swapped.
"""


class LogitNumbers(NamedTuple):
    """What a config has done to the logits."""

    softcap: float | None
    factor: float | None
    divisor: float | None

    @property
    def scale(self) -> float | None:
        """Factor and divisor in one."""
        if self.factor is None and self.divisor is None:
            return None
        return (self.factor or 1.0) / (self.divisor or 1.0)


class Plan(NamedTuple):
    """How a model's forward comes apart: backbone, head, loss."""

    backbone: str
    head: str
    """Names of children."""
    names: tuple[str, ...]
    """Of forward's arguments, in order."""
    passed_on: frozenset[str] | None
    """Arguments that the backbone takes; None: any."""
    loss_function: Any
    logit_numbers: LogitNumbers
    """Both as they were tried."""
    output: type[Any] | None = None
    takes_loss_arguments: bool = True


class Head(NamedTuple):
    """Arguments of ``linear_cross_entropy``."""

    weight: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    scaling: float


def plan_of(model: Any) -> Plan | Reason:
    """How the forward comes apart if it is of the usual kind; that is still to be tried."""
    losses = sys.modules.get("transformers.loss.loss_utils")
    if model.loss_function is not getattr(losses, "ForCausalLMLoss", None):
        return Reason.LOSS_FUNCTION
    backbone, head = model.base_model_prefix, model.get_output_embeddings()
    heads = [name for name, child in model._modules.items() if child is head]
    if not heads or backbone not in model._modules:
        return Reason.LOSS_FORWARD
    names, takes_any = _arguments(type(model).forward)
    inner_names, inner_takes_any = _arguments(type(model._modules[backbone]).forward)
    if "labels" not in names or takes_any > inner_takes_any:
        return Reason.LOSS_FORWARD
    if adds_to_the_loss(model.config, False):
        return Reason.LOSS_FORWARD
    passed_on = None if inner_takes_any else frozenset(inner_names)
    return Plan(backbone, heads[0], names, passed_on, model.loss_function, logit_numbers(model.config))


def logit_numbers(config: Any) -> LogitNumbers:
    """Those of a model's config, or of that of its language model."""
    config = _text_config(config)
    return LogitNumbers(*(_first(config, names) for names in (_CAPS, _FACTORS, _DIVISORS)))


def adds_to_the_loss(config: Any, routes: bool | None) -> bool:
    """Whether more than the cross entropy is asked for: the balance of experts, or a penalty of large logits.

    Args:
        routes: ``output_router_logits`` of the call; None leaves it to the config.
    """
    configs = config, _text_config(config)
    if routes is None:
        routes = any(getattr(c, "output_router_logits", False) for c in configs)
    return bool(routes) or any(getattr(c, "z_loss_coefficient", None) for c in configs)


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _arguments(forward: Any) -> tuple[tuple[str, ...], bool]:
    """Names of a forward's arguments behind ``self``, and whether it takes any others."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY]
    return tuple(named), any(p.kind is p.VAR_KEYWORD for p in parameters)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def head_of(model: Any, plan: Plan) -> Head | Reason:
    """What the head is made of now, or why it is called."""
    layer: Any = model._modules[plan.head]
    if has_hooks(layer):
        return Reason.ADAPTER_HOOKS
    if "forward" in layer.__dict__:
        return Reason.INSTANCE_FORWARD
    if type(layer) is nn.Linear or type(layer) is FrozenLinear:
        if is_parametrized(layer):
            return Reason.PARAMETRIZED
        weight, bias = (layer._parameters.get(name, Reason.DISPLACED) for name in ("weight", "bias"))
        for parameter in (weight, bias):
            if parameter is not None and type(parameter) not in PLAIN_TENSORS:
                return not_plain(parameter)
        return Head(weight, None, None, bias, 1.0)  # type: ignore[arg-type]
    if class_swaps.swapped_in(layer) is None or "lora_A" not in layer._modules:
        return Reason.LAYER_TYPE
    if layer._disable_adapters:
        return Reason.DISABLED
    found: Any = operands.operands(layer)
    if isinstance(found, Reason):
        return found
    if isinstance(found, operands.SideBySide):
        return Reason.HEAD_DROPOUT
    weight, lora_A, lora_B, bias, scaling, dropout_p, training, magnitude = found
    if isinstance(weight, QuantizedWeight):
        return Reason.FORMAT
    if magnitude is not None:
        return Reason.DORA
    if isinstance(scaling, Tensor):
        return Reason.TENSOR_SCALING
    if training and dropout_p > 0.0:
        return Reason.HEAD_DROPOUT
    reason = operands.call_reason(weight.new_empty(0), weight, lora_A, lora_B)
    return reason or Head(weight, lora_A, lora_B, bias, scaling)


def loss_of(x: Tensor, head: Head, plan: Plan, given: dict[str, Any]) -> Tensor:
    """As ``ForCausalLMLoss``."""
    labels, count, ignored = given.get("shift_labels"), given.get("num_items_in_batch"), given.get("ignore_index", -100)
    if labels is None:
        labels = nn.functional.pad(given["labels"], (0, 1), value=ignored)[..., 1:]
    if labels.numel() != x.shape[:-1].numel():
        raise ValueError(
            f"labels must be {list(x.shape[:-1])} to fit the hidden states {list(x.shape)}, got {list(labels.shape)}"
        )
    weight, lora_A, lora_B, bias, scaling = head
    loss = linear_cross_entropy(
        x, weight, labels.reshape(x.shape[:-1]).to(x.device), lora_A, lora_B, bias, scaling=scaling,
        ignore_index=ignored, reduction="mean" if count is None else "sum", softcap=plan.logit_numbers.softcap,
        logit_scale=plan.logit_numbers.scale,
    )  # fmt: skip
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
