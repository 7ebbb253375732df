"""Adapters of experts as one pair of matrices per expert, under the names of the base model's checkpoint.

PEFT keeps the factors of all experts in two matrices. Engines that serve a model load what a checkpoint with a linear
layer per expert would have; transformers' map of checkpoint names says how its family calls those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..operands import is_experts, projections
from ..operands.experts import factors_of_experts

_USUAL_NAMES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""The layers of an expert, of a family whose checkpoints keep all experts in one tensor, too."""


class PerExpert(NamedTuple):
    """A file of an adapter, with a pair of matrices per expert and layer."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    """What it changes in PEFT's config."""
    misread: list[str]
    """Why PEFT will not read it back as it was; nothing where it will."""


def per_expert(op: str, model: Any, adapter: str, tensors: Mapping[str, Tensor]) -> PerExpert:
    """What PEFT saves for an adapter, with those of experts taken apart.

    Args:
        model: a ``PeftModel``.
        tensors: by PEFT's keys.

    Raises:
        ValueError: there are no experts with this adapter, or a config of PEFT's cannot say their ranks.
    """
    result, config = dict(tensors), model.peft_config[adapter]
    leaves: dict[str, tuple[int, float]] = {}
    kept: list[str] = []
    fused: set[str] = set()
    is_known = True
    for name, wrapper in _wrappers(model, adapter):
        experts = wrapper.get_base_layer()
        if not is_experts(experts) or wrapper.parameter_name not in projections(experts):
            kept.append(f"{_own_name(name)}.{wrapper.parameter_name}")
            continue
        of_experts = _factors(result, name, wrapper, experts.is_transposed)
        path, names, is_of_family = _checkpoint_names(model, _own_name(name), wrapper.parameter_name)
        is_known = is_known and is_of_family
        fused.update(names if len(names) > 1 else ())
        for leaf, rows in zip(names, _rows_of(experts, wrapper.parameter_name, len(names)), strict=True):
            size = wrapper.r[adapter], wrapper.lora_alpha[adapter]
            if leaves.setdefault(leaf, size) != size:
                raise ValueError(f'{op}: experts="2d" needs one rank and alpha for all {leaf}, {name} has others')
            for expert, (lora_A, lora_B) in enumerate(zip(*of_experts, strict=True)):
                result[f"{path}.{expert}.{leaf}.lora_A.weight"] = lora_A.clone()
                result[f"{path}.{expert}.{leaf}.lora_B.weight"] = lora_B[rows].clone()
    if not leaves:
        raise ValueError(f'{op}: experts="2d" needs an adapter of experts, {adapter!r} has none')
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name}
    is_plain = leaves.keys().isdisjoint(name.removesuffix(".base_layer").rpartition(".")[2] for name in others)
    misread = _misread(config, leaves, fused, is_known, is_plain)
    return PerExpert(result, _config_changes(config, leaves, kept, is_plain), misread)


def _misread(
    config: Any, leaves: Mapping[str, tuple[int, float]], fused: set[str], is_known: bool, is_plain: bool
) -> list[str]:
    """Why PEFT, which fuses the layers again, will leave the adapter out, scale it otherwise, or fail.

    Args:
        leaves: rank and alpha of each layer of an expert. fused: those that are one parameter of the model.
        is_known: the family's checkpoints have a layer per expert. is_plain: as ``_config_changes``.
    """
    of_config = config.r, config.lora_alpha
    found = {
        "the family's checkpoints have no layer per expert": not is_known,
        "other layers have the names of an expert's": not is_plain,
        "it uses rsLoRA": config.use_rslora,
        "gate and up have an adapter, and down has none": bool(fused) and fused == leaves.keys(),
        "gate and up have another rank or alpha than r and lora_alpha say": any(leaves[f] != of_config for f in fused),
    }
    return [reason for reason, holds in found.items() if holds]


def _wrappers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and adapter in module.lora_A:
            yield name, module


def _own_name(name: str) -> str:
    """Of the module inside all wrappers."""
    return name.removesuffix(".base_layer") if not name.endswith(".base_layer.base_layer") else _own_name(name[:-11])


def _factors(tensors: dict[str, Tensor], name: str, wrapper: Any, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """lora_A [experts, rank, in_features] and lora_B [experts, out_features, rank], taken out of ``tensors``."""
    lora_A, lora_B = (tensors.pop(f"{name}.{part}.weight") for part in ("lora_A", "lora_B"))
    return factors_of_experts(wrapper, lora_A, lora_B, is_transposed)


def _rows_of(experts: Any, parameter: str, layers: int) -> list[slice]:
    """Which outputs of a projection are those of each of its layers."""
    if layers == 1:
        return [slice(None)]
    weight = getattr(experts, parameter)
    half = weight.shape[2 if experts.is_transposed else 1] // 2
    if experts.is_concatenated:
        return [slice(0, half), slice(half, None)]
    return [slice(0, None, 2), slice(1, None, 2)]


def _checkpoint_names(model: Any, path: str, parameter: str) -> tuple[str, tuple[str, ...], bool]:
    """The path of the experts in a checkpoint of the model's family, and the names of the layers that are
    ``parameter``; last, whether the checkpoint has such layers, or these are their usual names.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names: tuple[str, ...] = _USUAL_NAMES[parameter]
    are_there = False
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for entry in get_checkpoint_conversion_mapping(kind) or ():
        sources, targets = list(entry.source_patterns), list(entry.target_patterns)
        if getattr(entry, "operations", None):
            if targets[0].endswith(f"experts.{parameter}") and all(".*." in source for source in sources):
                names, are_there = tuple(source.split(".*.")[1].removesuffix(".weight") for source in sources), True
        elif targets[0].strip(".").isidentifier() and sources[0].strip(".").isidentifier():
            path = path.replace(targets[0], sources[0])
    return path, names, are_there


def _config_changes(
    config: Any, leaves: Mapping[str, tuple[int, float]], kept: list[str], is_plain: bool
) -> dict[str, Any]:
    """``is_plain``: the names of an expert's layers choose no other layers (of a shared expert, say)."""
    targets: Any = config.target_modules or ()
    if not isinstance(targets, str) and is_plain:
        targets = sorted({*targets, *leaves})
    else:
        chosen = (
            targets
            if isinstance(targets, str)
            else "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in sorted(targets))
        )
        of_experts = rf".*\.experts\.\d+\.(?:{'|'.join(leaves)})"
        targets = f"{chosen}|{of_experts}" if chosen else of_experts
    changes: dict[str, Any] = {"target_modules": targets, "target_parameters": kept or None}
    for field, of_config, place in (("rank_pattern", config.r, 0), ("alpha_pattern", config.lora_alpha, 1)):
        others = {leaf: size[place] for leaf, size in leaves.items() if size[place] != of_config}
        changes[field] = {**getattr(config, field), **others}
    return changes
