"""Which layers of a model are served together, and taking them apart again. Importing this module imports PEFT."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...reasons import Reason
from ...report import FUSED, FUSED_COLUMNS, FUSED_GATHERED, FUSED_MLP, FUSED_PACK, FUSED_ROWS, Report
from . import mlp as _mlp
from . import packs as _packs
from . import parents as _parents
from .linear import FusedForward, next_call


def pack(model: nn.Module, layers: Mapping[str, nn.Module], groups: list[list[str]], report: Report) -> None:
    """Makes packs of ``groups`` of fused layers, and gated MLPs of what is one; says so in their rows.

    Args:
        layers: PEFT's, by name.
        groups: names of layers that read the same tensor, in the order of their calls.
    """
    rows: dict[str, str] = {}
    groups = [[name for name in names if isinstance(layers[name], FusedForward)] for names in groups]
    kinds: dict[str, type[_parents.Parent]] = {}
    for names in groups:
        if len(names) < 2:
            continue
        name = _parent(names)
        parent = model.get_submodule(name)
        reason = _why_not_together(parent, [layers[name] for name in names])
        if reason is not None:
            report.apart.append((name, reason))
            continue
        _packs.attach(parent, [layers[name] for name in names])
        kinds[name] = _parents.Parent
        rows |= dict.fromkeys(names, FUSED_PACK)
    of_layers = set(layers.values())
    for name in sorted({_parent(names) for names in groups if len(names) == 2}):
        module = model.get_submodule(name)
        roles = _mlp.roles_of(module, of_layers)
        if roles is None:
            continue
        reason = roles if isinstance(roles, Reason) else None
        if isinstance(roles, _mlp.Roles):
            module.__dict__[_packs.ROLES] = roles
            kinds[name] = _parents.FusedMLP
            reason = _mlp.why_not(module)
            if reason is None:
                rows |= {f"{name}.{layer}".lstrip("."): FUSED_MLP for layer in (roles.gate, roles.up, roles.down)}
        if reason is not None:
            report.apart.append((name, reason))
    for name, kind in kinds.items():
        _parents.swap(model.get_submodule(name), kind)
    report.fused = [(name, rows.get(name, what) if what == FUSED else what) for name, what in report.fused]


def _parent(names: list[str]) -> str:
    return names[0].rpartition(".")[0]


def _why_not_together(parent: nn.Module, layers: list[nn.Module]) -> Reason | None:
    """Why the next calls of these layers would not be one op."""
    if "forward" in parent.__dict__:
        return Reason.INSTANCE_FORWARD
    for layer in layers:
        reason, what = next_call(layer)
        if reason is not None:
            return reason
        if what in (FUSED_COLUMNS, FUSED_ROWS):
            return Reason.PACK_SHARDED
        if what == FUSED_GATHERED:
            return Reason.ADAPTER_HOOKS  # those of each layer gather for that layer
        if what != FUSED:
            return Reason.PACK_DORA if what.startswith("dora") else Reason.PACK_QUANTIZED
    return None


def take_apart(model: nn.Module) -> None:
    """Undoes ``pack``."""
    _parents.take_apart(model.modules())
    _packs.detach(model.modules())
