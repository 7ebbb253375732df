"""Gated MLPs whose three layers have LoRA, served by one ``lora_mlp``. Importing this module imports PEFT.

An MLP is known by what it does: its forward is run once with stand-ins for its layers, which shows how it combines what
they give, in values and in gradients. No family of models is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import dispatch, operands
from ...class_swaps import in_place_of
from ...formats import QuantizedWeight
from ...functional.mlp import Projection, lora_mlp_of_layers
from ...ops.gated_activation import ACTIVATIONS
from ...reasons import Reason
from .linear import FusedForward
from .packs import ROLES


class Roles(NamedTuple):
    """Names of the children, and the activation between them."""

    gate: str
    up: str
    down: str
    activation: str
    others: tuple[tuple[str, nn.Module | None], ...]
    """What else the module has, with names: its forward may depend on it."""


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
    found, in_eval = (_watch(mlp, ours, training) for training in (True, False))
    if found is None or found != in_eval:
        return Reason.NOT_GATED
    return Roles(*found, others)


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


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


def _watch(mlp: nn.Module, names: list[str], training: bool) -> tuple[str, str, str, str] | None:
    """gate, up, down and the activation, from a forward whose layers are stand-ins; None if it is something else."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    inner = [4 * torch.randn(2, 64, generator=generator, dtype=torch.float64).requires_grad_() for _ in names]
    layers = {name: _StandIn(result, y, x) for name, result in zip(names, inner)}
    # Not a copy: only its children are others, and only in this one.
    twin = object.__new__(type(mlp))
    twin.__dict__.update(mlp.__dict__, training=training, _modules={**mlp._modules, **layers})
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            result: Any = type(mlp).forward(twin, x)
    except Exception:  # somebody's forward on something that it was not written for
        return None
    if result is not y or any(len(layer.given) != 1 for layer in layers.values()):
        return None
    down = [name for name, layer in layers.items() if layer.given[0] is not x]
    if len(down) != 1:
        return None
    (first, a), (second, b) = ((name, t) for name, t in zip(names, inner) if name not in down)
    h = layers[down[0]].given[0]
    for gate, up, e, g in ((first, second, a, b), (second, first, b, a)):
        for name, activation in ACTIVATIONS.items():
            if _is_product(h, activation, e, g):
                return gate, up, down[0], name
    return None


def _is_product(h: Any, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> bool:
    """Whether h is activation(gate) * up, in value and in gradients."""
    expected = activation(gate) * up
    if not isinstance(h, Tensor) or h.shape != expected.shape or h.dtype != expected.dtype or not h.requires_grad:
        return False
    weights = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
    ours = (expected, *torch.autograd.grad(expected, (gate, up), weights))
    theirs = (h, *torch.autograd.grad(h, (gate, up), weights, retain_graph=True, allow_unused=True))
    return all(t is not None and torch.allclose(o, t, rtol=1e-7, atol=1e-9) for o, t in zip(ours, theirs))


# ----------------------------------------------------------------------------------------------- what replaces it


class FusedMLP(nn.Module):
    """What replaces a gated MLP, beside its own class: a forward of one op where that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found: Any = Reason.EXTRA_ARGUMENTS if args or kwargs else _operands(self, x)
        if type(found) is not Reason:
            return lora_mlp_of_layers(x, *found)
        if not torch.compiler.is_compiling():
            dispatch.count_fallback("lora_mlp", found)
        return super().forward(x, *args, **kwargs)


def _operands(mlp: Any, x: Any) -> tuple[list[Projection], str, float] | Reason:
    """What ``lora_mlp`` needs besides x, or why the module must run its own forward now."""
    roles: Roles = mlp.__dict__[ROLES]
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


_CLASSES: dict[type, type[FusedMLP]] = {}


def swap(mlp: nn.Module, roles: Roles) -> None:
    """Makes ``mlp`` a fused one."""
    mlp.__dict__[ROLES] = roles
    mlp.__class__ = _fused(type(mlp))


def _fused(base: type[nn.Module]) -> type[FusedMLP]:
    """The class that takes the place of ``base``."""
    if base not in _CLASSES:
        kind: Any = in_place_of(base)(type(f"Fused{base.__name__}", (FusedMLP, base), {}))
        kind.__reduce_ex__ = _reduce
        _CLASSES[base] = kind
    return _CLASSES[base]


def _reduce(self: FusedMLP, protocol: Any) -> Any:
    original = originals().get(type(self))
    if original is None:
        raise TypeError(
            f"{type(self).__name__}: a wrapped module (FSDP) is neither copied nor pickled; use state dicts"
        )
    parts: Any = nn.Module.__reduce_ex__(self, protocol)
    return (_empty, (original,), *parts[2:])


def _empty(base: type[nn.Module]) -> nn.Module:
    kind = _fused(base)
    return kind.__new__(kind)


def originals() -> Mapping[type, type]:
    """The classes that ``swap`` has made, and what they stand for."""
    return {ours: theirs for theirs, ours in _CLASSES.items()}


def why_not(mlp: nn.Module) -> Reason | None:
    """Why the next call of a fused MLP, on an input of the weights' dtype, is its own; None if it is not."""
    gate = mlp.__dict__["_modules"][mlp.__dict__[ROLES].gate]
    weight = gate.get_base_layer().weight
    found = _operands(mlp, torch.empty(0, dtype=weight.dtype, device=weight.device))
    return found if type(found) is Reason else None


def forget(mlp: nn.Module) -> None:
    """What ``swap`` has left beside the class."""
    mlp.__dict__.pop(ROLES, None)
