"""``patch(loss=True)``: the loss of transformers' language models by ``linear_cross_entropy``, without logits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import class_swaps, dispatch
from ..reasons import Reason
from ..report import LOSS, LOSS_ROW, Report
from .loss_parts import Head, Plan, adds_to_the_loss, head_of, logit_numbers, loss_of, plan_of
from .loss_trial import tried

_PLAN = "_head_and_loss"
_OF_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of a model that are its loss function's."""


class FusedLoss(nn.Module):
    """What is put in front of a model's own class: a forward with labels that makes no logits.

    Its first part is the model's backbone, with its hooks; head and loss are one ``linear_cross_entropy``, which has
    the head's adapter in it. ``output_logits=True`` has logits made, by the model's own forward; so has a call without
    gradients, as in an evaluation, unless ``output_logits`` is False. Calls without labels are the model's own.
    """


def check_model(model: nn.Module) -> None:
    """``ValueError`` if there is no language model."""
    if not any(True for _ in _language_models(model)):
        raise ValueError(
            f"patch: loss=True needs a model of transformers with a head, {type(model).__name__} holds none"
        )


def patch(model: nn.Module, wanted: bool, report: Report) -> None:
    """Swaps the classes of language models in ``model`` if ``wanted``; a row for each, and for those swapped before."""
    for name, module in _language_models(model):
        if not wanted and not isinstance(module, FusedLoss):
            continue
        reason = _fuse(module)
        (report.kept if reason else report.fused).append((f"{name}.{LOSS_ROW}".lstrip("."), reason or LOSS))


def originals() -> dict[type, type]:
    """The classes that take the place of models' own, and what they stand for."""
    return {ours: theirs for theirs, ours in _CLASSES.items()}


def forget(module: nn.Module) -> None:
    """What is kept on a model that has its class back."""
    module.__dict__.pop(_PLAN, None)


def _language_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Models of transformers that have a head, with their names; not those within another."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, kind) and module not in inside and module.get_output_embeddings() is not None:
            inside.update(module.modules())
            yield name, module


def _fuse(model: Any) -> Reason | None:
    """Swaps the class of a language model. Why its loss stays its own, None if it does not."""
    class_swaps.give_back(model, originals())
    plan: Any = Reason.INSTANCE_FORWARD if "forward" in model.__dict__ else plan_of(model)
    if isinstance(plan, Reason):
        return plan
    plan = tried(model, plan)
    if isinstance(plan, Reason):
        return plan
    model.__dict__[_PLAN] = plan
    model.__class__ = _fused(type(model))
    return None


# ------------------------------------------------------------------------------------------------------- classes


def _fused(original: type[Any]) -> type[Any]:
    """The class that takes the place of ``original``. Others read the signature of its forward."""
    if original not in _CLASSES:

        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _forward(self, original.forward, args, kwargs)

        kind: Any = type(f"Fused{original.__name__}", (FusedLoss, original), {"forward": forward})
        kind = class_swaps.in_place_of(original)(kind)
        kind.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]
        _CLASSES[original] = kind
    return _CLASSES[original]


_CLASSES: dict[type, type] = {}


def _reduce(self: Any, protocol: Any) -> Any:
    original = next((theirs for theirs, ours in _CLASSES.items() if ours is type(self)), None)
    if original is None:
        raise TypeError(f"{type(self).__name__}: a wrapped model (FSDP) is neither copied nor pickled; use state dicts")
    parts: Any = nn.Module.__reduce_ex__(self, protocol)
    return (_empty, (original,), *parts[2:])


def _empty(original: type[nn.Module]) -> nn.Module:
    kind: Any = _fused(original)
    return kind.__new__(kind)


# -------------------------------------------------------------------------------------------------------- one call


def _forward(model: Any, original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Of a model of a swapped class; no method, since a wrapper may keep it when the class is gone."""
    output_logits = kwargs.pop("output_logits", None)
    plan: Plan | None = model.__dict__.get(_PLAN)  # None where a wrapper has kept this forward of a model let go
    given = {} if plan is None else {**dict(zip(plan.names, args)), **kwargs}
    if plan is None or given.get("labels") is None:
        return original(model, *args, **kwargs)
    asked = not torch.is_grad_enabled() if output_logits is None else output_logits
    reason: Any = Reason.LOGITS if asked else _call_reason(model, plan, given)
    head: Any = reason or head_of(model, plan)
    if isinstance(head, Reason):
        if not is_compiling():
            dispatch.count_fallback(LOSS, head)
        return original(model, *args, **kwargs)
    return _loss_of(model, plan, head, given)


def _call_reason(model: Any, plan: Plan, given: dict[str, Any]) -> Reason | None:
    """Why a call with these arguments is the model's own; None if it is not."""
    config = model.config
    returns_dict = given.get("return_dict")
    if not (getattr(config, "return_dict", True) if returns_dict is None else returns_dict):
        return Reason.EXTRA_ARGUMENTS
    keeps = given.get("logits_to_keep", 0)
    if isinstance(keeps, Tensor) or keeps:
        return Reason.LOGITS
    if model.loss_function is not plan.loss_function:
        return Reason.LOSS_FUNCTION
    if adds_to_the_loss(config, given.get("output_router_logits")):
        return Reason.LOSS_FORWARD
    if logit_numbers(config) != plan.logit_numbers:
        return Reason.LOSS_CONFIG
    if not plan.takes_loss_arguments and any(given.get(name) is not None for name in _OF_LOSS):
        return Reason.EXTRA_ARGUMENTS
    if plan.passed_on is not None:
        others = {name for name, value in given.items() if value is not None} - plan.passed_on
        if others - {"labels", "logits_to_keep", "return_dict", *_OF_LOSS}:
            return Reason.EXTRA_ARGUMENTS
    return None


def _loss_of(model: Any, plan: Plan, head: Head, given: dict[str, Any]) -> Any:
    """The model's output, without logits."""
    left_out = {"labels", "logits_to_keep", "return_dict"}
    if plan.passed_on is not None:
        left_out |= set(given) - plan.passed_on
    passed = {name: value for name, value in given.items() if name not in left_out}
    hidden = model._modules[plan.backbone](**passed)
    loss = loss_of(hidden.last_hidden_state, head, plan, given)
    kind: Any = plan.output
    fields = kind.__dataclass_fields__
    return kind(loss=loss, **{name: value for name, value in hidden.items() if name in fields})
