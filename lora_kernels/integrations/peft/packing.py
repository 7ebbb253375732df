"""Which layers of a model are served together, and taking them apart again. Importing this module imports PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...class_swaps import give_back
from ...reasons import Reason
from ...report import FUSED, FUSED_COLUMNS, FUSED_MLP, FUSED_PACK, FUSED_ROWS, Report
from . import mlp as _mlp
from . import packs as _packs
from .linear import FusedForward, next_call


def pack(model: nn.Module, layers: Mapping[str, nn.Module], groups: list[list[str]], report: Report) -> None:
    """Makes packs of ``groups`` of fused layers, and gated MLPs of what is one; says so in their rows.

    Args:
        layers: PEFT's, by name.
        groups: names of layers that read the same tensor, in the order of their calls.
    """
    rows: dict[str, str] = {}
    groups = [[name for name in names if isinstance(layers[name], FusedForward)] for names in groups]
    for names in groups:
        if len(names) < 2:
            continue
        reason = _why_not_together([layers[name] for name in names])
        if reason is not None:
            report.apart.append((names[0].rpartition(".")[0], reason))
            continue
        _packs.attach([layers[name] for name in names])
        rows |= dict.fromkeys(names, FUSED_PACK)
    of_layers = set(layers.values())
    pairs = {names[0].rpartition(".")[0] for names in groups if len(names) == 2}
    for name in sorted(pairs):
        module = model.get_submodule(name)
        roles = _mlp.roles_of(module, of_layers)
        if roles is None:
            continue
        reason = roles if isinstance(roles, Reason) else None
        if isinstance(roles, _mlp.Roles):
            _mlp.swap(module, roles)
            reason = _mlp.why_not(module)
            if reason is None:
                rows |= {f"{name}.{layer}".lstrip("."): FUSED_MLP for layer in (roles.gate, roles.up, roles.down)}
        if reason is not None:
            report.apart.append((name, reason))
    report.fused = [(name, rows.get(name, what) if what == FUSED else what) for name, what in report.fused]


def _why_not_together(layers: list[nn.Module]) -> Reason | None:
    """Why the next calls of these layers would not be one op."""
    for layer in layers:
        reason, what = next_call(layer)
        if reason is not None:
            return reason
        if what in (FUSED_COLUMNS, FUSED_ROWS):
            return Reason.PACK_SHARDED
        if what != FUSED:
            return Reason.PACK_DORA if what.startswith("dora") else Reason.PACK_QUANTIZED
    return None


def take_apart(model: nn.Module) -> None:
    """Undoes ``pack``."""
    _packs.detach(model.modules())
    originals: dict[Any, type] = dict(_mlp.originals())
    for module in model.modules():
        if give_back(module, originals) is not None:
            _mlp.forget(module)
