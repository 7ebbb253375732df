"""Gated MLPs whose three layers have LoRA, served by one ``lora_mlp``. Importing this module imports PEFT.

An MLP is known by what it does: its forward is run once with stand-ins for its layers, which shows how it combines what
they give, in values and in gradients. No family of models is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import dispatch, operands
from ...formats import QuantizedWeight
from ...functional.mlp import Projection, lora_mlp_of_layers
from ...ops.gated_activation import ACTIVATIONS
from ...plain import FLOATS, LOW_PRECISION
from ...reasons import Reason
from .linear import FusedForward
from .packs import OURS, ROLES


class Roles(NamedTuple):
    """Names of the children, and the activation between them."""

    gate: str
    up: str
    down: str
    activation: str
    others: tuple[tuple[str, nn.Module | None], ...]
    """What else the module has, with names: its forward may depend on it."""
    settings: tuple[tuple[str | None, str, Any], ...]
    """The module's attributes, and those of the others (by name), likewise."""
    argument: str
    """What forward calls x."""


# ------------------------------------------------------------------------------------------------ what it does


def roles_of(mlp: nn.Module, layers: Collection[nn.Module]) -> Roles | Reason | None:
    """How ``mlp`` combines its layers; why it is no gated MLP that ``lora_mlp`` computes; None if it has not the parts
    of one: three of ``layers``, and nothing else that holds a tensor.
    """
    children = mlp._modules
    ours = [name for name, child in children.items() if child in layers]
    others = tuple((name, child) for name, child in children.items() if name not in ours)
    if len(ours) != 3 or any(True for _ in mlp.parameters(recurse=False)) or any(True for _ in mlp.buffers(False)):
        return None
    if any(child is not None and _holds_tensors(child) for _, child in others):
        return None
    if "forward" in mlp.__dict__:
        return Reason.INSTANCE_FORWARD
    weight = children[ours[0]].get_base_layer().weight  # type: ignore[union-attr, operator]
    dtypes = {torch.float64, weight.dtype} if weight.dtype in FLOATS else {torch.float64}
    found = {_watch(mlp, ours, training, dtype) for training in (True, False) for dtype in dtypes}
    if None in found or len({roles[:3] for roles in found if roles is not None}) != 1:
        return Reason.NOT_GATED
    # In 16 bits, some activations are alike.
    known = frozenset.intersection(*(roles[3] for roles in found if roles is not None))
    if len(known) != 1:
        return Reason.NOT_GATED
    gate, up, down, _ = next(roles for roles in found if roles is not None)
    (activation,) = known
    argument = next(iter(inspect.signature(mlp.forward).parameters), "")
    return Roles(gate, up, down, activation, others, tuple(_settings(mlp, others)), argument)


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


_OWN = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""


def _settings(
    mlp: nn.Module, others: tuple[tuple[str, nn.Module | None], ...]
) -> Iterator[tuple[str | None, str, Any]]:
    """(name of the child or None, attribute, value)."""
    for child, module in ((None, mlp), *others):
        if module is not None:
            for name, value in module.__dict__.items():
                if name not in _OWN and name not in OURS:
                    yield child, name, value


class _StandIn(nn.Module):
    """Gives what it was made with, and keeps what it was called with."""

    given: list[Any]
    result: Tensor
    otherwise: Tensor

    def __init__(self, result: Tensor, otherwise: Tensor, x: Tensor) -> None:
        super().__init__()
        self.given, self.result, self.otherwise, self.x = [], result, otherwise, x

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        return self.result if x is self.x else self.otherwise


def _stand_in_values(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[2, 64]: of both signs, from a thousandth to what an activation is hardly ever given."""
    largest = 2.0 if dtype in LOW_PRECISION else 5.0
    sizes = torch.logspace(-3, largest, 64, dtype=torch.float64)
    signs = torch.where(torch.rand(2, 64, generator=generator) < 0.5, -1.0, 1.0)
    shuffled = torch.stack([sizes[torch.randperm(64, generator=generator)] for _ in range(2)])
    return (shuffled * signs).to(dtype).requires_grad_()


def _watch(
    mlp: nn.Module, names: list[str], training: bool, dtype: torch.dtype
) -> tuple[str, str, str, frozenset[str]] | None:
    """gate, up, down and the activations that it may be, from a forward whose layers are stand-ins; None if it is
    something else.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    inner = [_stand_in_values(dtype, generator) for _ in names]
    layers = {name: _StandIn(result, y, x) for name, result in zip(names, inner)}
    # Not a copy: only its children are others, and only in this one.
    twin = object.__new__(type(mlp))
    twin.__dict__.update(mlp.__dict__, training=training, _modules={**mlp._modules, **layers})
    others = [m for name, child in mlp._modules.items() if child is not None and name not in names
              for m in child.modules()]  # fmt: skip
    modes = [m.training for m in others]
    try:
        for m in others:
            m.training = training
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            result: Any = type(mlp).forward(twin, x)
    except Exception:  # somebody's forward on something that it was not written for
        return None
    finally:
        for m, mode in zip(others, modes):
            m.training = mode
    if result is not y or any(len(layer.given) != 1 for layer in layers.values()):
        return None
    down = [name for name, layer in layers.items() if layer.given[0] is not x]
    if len(down) != 1:
        return None
    (first, a), (second, b) = ((name, t) for name, t in zip(names, inner) if name not in down)
    h = layers[down[0]].given[0]
    for gate, up, e, g in ((first, second, a, b), (second, first, b, a)):
        found = frozenset(name for name, activation in ACTIVATIONS.items() if _is_product(h, activation, e, g))
        if found:
            return gate, up, down[0], found
    return None


def _is_product(h: Any, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> bool:
    """Whether h is activation(gate) * up, in value and in gradients."""
    expected = activation(gate) * up
    if not isinstance(h, Tensor) or h.shape != expected.shape or h.dtype != expected.dtype or not h.requires_grad:
        return False
    weights = torch.linspace(0.5, 1.5, h.numel(), dtype=h.dtype).view_as(h)
    ours = (expected, *torch.autograd.grad(expected, (gate, up), weights))
    theirs = (h, *torch.autograd.grad(h, (gate, up), weights, retain_graph=True, allow_unused=True))
    rounding = 32 * torch.finfo(h.dtype).eps
    sizes = gate.abs() * up.abs(), (1 + gate.abs()) * up.abs(), gate.abs()  # of what each is a sum or product of
    return all(
        t is not None and bool(((o - t).abs() <= rounding * (size + rounding)).all())
        for o, t, size in zip(ours, theirs, sizes)
    )


# ----------------------------------------------------------------------------------------------- what replaces it


_PLAIN = (bool, int, float, str)


def call(mlp: nn.Module, roles: Roles, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Reason:
    """What a fused MLP gives for a call of these arguments, by one op, or why its own forward must."""
    given = args if args else (kwargs[roles.argument],) if roles.argument in kwargs else ()
    found: Any = Reason.EXTRA_ARGUMENTS
    if len(given) == 1 and len(args) + len(kwargs) == 1:
        found = _operands(mlp, roles, given[0])
        if type(found) is not Reason:
            return lora_mlp_of_layers(given[0], *found)
    if not torch.compiler.is_compiling():
        dispatch.count_fallback("lora_mlp", found)
    return found


def _operands(mlp: Any, roles: Roles, x: Any) -> tuple[list[Projection], str, float] | Reason:
    """What ``lora_mlp`` needs besides x, or why the module must run its own forward now."""
    children = mlp.__dict__["_modules"]
    projections: list[Projection] = []
    drops: Any = None
    for name, known in roles.others:
        child = children.get(name)
        if child is not known:
            return Reason.NOT_GATED
        reason = None if child is None else operands.why_not_called_as_is(child)
        if reason is not None:
            return reason
    for of_child, name, known in roles.settings:
        now = (mlp if of_child is None else children[of_child]).__dict__.get(name, _OWN)
        if now is not known and not (type(now) is type(known) in _PLAIN and now == known):
            return Reason.NOT_GATED
    for name in (roles.gate, roles.up, roles.down):
        layer = children.get(name)
        if not isinstance(layer, FusedForward):
            return Reason.LAYER_TYPE
        found: Any = operands.why_not_called_as_is(layer) or operands.operands(layer)
        if type(found) is not tuple:
            return found if type(found) is Reason else Reason.SIDE_BY_SIDE
        weight, lora_A, lora_B, bias, scaling, p, training, magnitude = found
        if magnitude is not None:
            return Reason.PACK_DORA
        if type(weight) is QuantizedWeight:
            return Reason.PACK_QUANTIZED
        if bias is not None and bias.requires_grad:
            return Reason.BIAS_REQUIRES_GRAD
        reason = operands.call_reason(x, weight, lora_A, lora_B)
        if reason is not None:
            return reason
        if weight.device != x.device:
            return Reason.DEVICES
        probability = p if training else 0.0
        if drops is not None and drops != probability:
            return Reason.PACK_DROPOUTS
        drops = probability
        projections.append(Projection(weight, lora_A, lora_B, bias, scaling))
    return projections, roles.activation, drops


def why_not(mlp: nn.Module) -> Reason | None:
    """Why the next call of a fused MLP, on an input of the weights' dtype, is its own; None if it is not."""
    roles = mlp.__dict__[ROLES]
    weight = mlp.__dict__["_modules"][roles.gate].get_base_layer().weight
    found = _operands(mlp, roles, torch.empty(0, dtype=weight.dtype, device=weight.device))
    return found if type(found) is Reason else None
