"""``patch(loss=True)``: the loss of transformers' language models by ``linear_cross_entropy``, without logits."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import class_swaps, dispatch, operands
from ..formats import QuantizedWeight
from ..frozen_linears import FrozenLinear
from ..functional.cross_entropy import linear_cross_entropy
from ..plain import PLAIN_TENSORS, has_hooks, is_parametrized, not_plain
from ..reasons import Reason
from ..report import LOSS, LOSS_ROW, Report

_PLAN = "_head_and_loss"
_OF_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of a model that are its loss function's."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
"""What configs call a bound of the logits (Gemma), and what they are multiplied (Cohere, Falcon-H1) or divided
(Granite) by. That the model does so, and nothing else, is tried out before anything is swapped.
"""


class Plan(NamedTuple):
    """How a model's forward comes apart: backbone, head, loss."""

    backbone: str
    head: str
    """Names of children."""
    names: tuple[str, ...]
    """Of forward's arguments, in order."""
    passed_on: frozenset[str] | None
    """Arguments that the backbone takes; None: any."""
    softcap: float | None
    logit_scale: float | None
    output: type[Any] | None = None
    takes_loss_arguments: bool = True


class FusedLoss(nn.Module):
    """What is put in front of a model's own class: a forward with labels that makes no logits.

    Its first part is the model's backbone, with its hooks; head and loss are one ``linear_cross_entropy``, which has
    the head's adapter in it. ``output_logits=True`` has logits made, by the model's own forward; so has a call without
    gradients, as in an evaluation, unless ``output_logits`` is False. Calls without labels are the model's own.
    """


class _Head(NamedTuple):
    """Arguments of ``linear_cross_entropy``."""

    weight: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    scaling: float


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
    plan: Any = Reason.INSTANCE_FORWARD if "forward" in model.__dict__ else _plan(model)
    if isinstance(plan, Reason):
        return plan
    head: Any = _head_when_called(model, plan)
    if isinstance(head, Reason):
        return head
    plan = _tried(model, plan)
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
    head: Any = reason or _head(model, plan)
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
    routes = given.get("output_router_logits")  # whose balance is a part of the loss
    if getattr(config, "output_router_logits", False) if routes is None else routes:
        return Reason.LOSS_FORWARD
    if not plan.takes_loss_arguments and any(given.get(name) is not None for name in _OF_LOSS):
        return Reason.EXTRA_ARGUMENTS
    if plan.passed_on is not None:
        others = {name for name, value in given.items() if value is not None} - plan.passed_on
        if others - {"labels", "logits_to_keep", "return_dict", *_OF_LOSS}:
            return Reason.EXTRA_ARGUMENTS
    return None


def _head(model: Any, plan: Plan) -> _Head | Reason:
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
        return _Head(weight, None, None, bias, 1.0)  # type: ignore[arg-type]
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
    return reason or _Head(weight, lora_A, lora_B, bias, scaling)


def _loss_of(model: Any, plan: Plan, head: _Head, given: dict[str, Any]) -> Any:
    """The model's output, without logits."""
    left_out = {"labels", "logits_to_keep", "return_dict"}
    if plan.passed_on is not None:
        left_out |= set(given) - plan.passed_on
    passed = {name: value for name, value in given.items() if name not in left_out}
    hidden = model._modules[plan.backbone](**passed)
    loss = _loss(hidden.last_hidden_state, head, plan, given)
    kind: Any = plan.output
    fields = kind.__dataclass_fields__
    return kind(loss=loss, **{name: value for name, value in hidden.items() if name in fields})


def _loss(x: Tensor, head: _Head, plan: Plan, given: dict[str, Any]) -> Tensor:
    """As ``ForCausalLMLoss``."""
    labels, count = given["labels"], given.get("num_items_in_batch")
    shifted = given.get("shift_labels")
    weight, lora_A, lora_B, bias, scaling = head
    labels = (labels if shifted is None else shifted).to(x.device)
    loss = linear_cross_entropy(
        x, weight, labels.view(x.shape[:-1]), lora_A, lora_B, bias, scaling=scaling, shift=shifted is None,
        ignore_index=given.get("ignore_index", -100), reduction="mean" if count is None else "sum",
        softcap=plan.softcap, logit_scale=plan.logit_scale,
    )  # fmt: skip
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


# ------------------------------------------------------------------------------------------- what a forward is made of


def _plan(model: Any) -> Plan | Reason:
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
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    cap, factor, divisor = (_first(config, keys) for keys in (_CAPS, _FACTORS, _DIVISORS))
    scale = None if factor is None and divisor is None else (factor or 1.0) / (divisor or 1.0)
    return Plan(backbone, heads[0], names, None if inner_takes_any else frozenset(inner_names), cap, scale)


def _arguments(forward: Any) -> tuple[tuple[str, ...], bool]:
    """Names of a forward's arguments behind ``self``, and whether it takes any others."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY]
    return tuple(named), any(p.kind is p.VAR_KEYWORD for p in parameters)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def _head_when_called(model: Any, plan: Plan) -> _Head | Reason:
    """The head in eval mode, where its adapter drops nothing."""
    with _in_eval_mode(model):
        return _head(model, plan)


_TOKENS, _SPREAD = 8, 20.0
"""Of the call that is tried: tokens, and the spread of their logits, at which a bound of 30 or 50 shows."""


def _tried(model: Any, plan: Plan) -> Plan | Reason:
    """The plan if head and loss, on random hidden states, are the model's own; with what its output is.

    The states take the place of what the backbone returns, so that their logits spread. Loss and gradient are compared.
    """
    device = next(model.parameters()).device
    if any(p.is_meta for p in model.parameters()):
        return Reason.META
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with (
        torch.random.fork_rng(devices), dispatch.own_stats(), torch.inference_mode(False), torch.enable_grad(),
        _in_eval_mode(model),
    ):  # fmt: skip
        torch.manual_seed(0)
        head: Any = _head(model, plan)
        classes = head.weight.shape[0]
        labels = torch.randint(classes, (1, _TOKENS), device=device)
        labels[:, 2] = -100
        shifted = {"shift_labels": labels.flip(1), "num_items_in_batch": torch.tensor(3)}
        try:
            output = _agreed(model, plan, head, {"labels": labels})
            if output is None:
                return Reason.LOSS_FORWARD
            takes = plan.passed_on is None and _agreed(model, plan, head, {"labels": labels, **shifted}) is not None
        except Exception:  # whatever goes wrong in a forward that is called in an unusual way, it is left alone
            return Reason.LOSS_FORWARD
    return plan._replace(output=output, takes_loss_arguments=takes)


def _agreed(model: Any, plan: Plan, head: _Head, given: dict[str, Any]) -> type | None:
    """The class of the model's output, if loss and gradient are ours; else None."""
    seen: dict[str, Any] = {}

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        x = torch.randn_like(output.last_hidden_state)
        logits = torch.nn.functional.linear(x.to(head.weight.dtype), head.weight).float() * (plan.logit_scale or 1.0)
        x = (x.detach() * (_SPREAD / logits.detach().std())).requires_grad_()
        seen["x"], seen["keys"] = x, set(output.keys())
        output["last_hidden_state"] = x
        return output

    handle = model._modules[plan.backbone].register_forward_hook(replace)
    try:
        theirs = model(input_ids=torch.arange(_TOKENS, device=given["labels"].device)[None], **given)
    finally:
        handle.remove()
    x = seen["x"]
    fields = type(theirs).__dataclass_fields__
    if set(theirs.keys()) - {"loss", "logits"} != {key for key in seen["keys"] if key in fields}:
        return None
    loss = _loss(x, head, plan, given)
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    (grad,), (their_grad,) = torch.autograd.grad(loss, x), torch.autograd.grad(theirs.loss, x)
    loss_agrees = abs(loss.item() - theirs.loss.item()) <= tolerance * abs(theirs.loss.item())
    apart = (grad.double() - their_grad.double()).norm() <= 4 * tolerance * their_grad.double().norm()
    return type(theirs) if loss_agrees and bool(apart) else None


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
