"""``save_adapter``: a model's adapter into PEFT's two files."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import CONFIG_FILE, WEIGHTS_FILE, alpha_of, describe
from .experts import PerExpert, per_expert
from .files import replacing
from .models import Layer, active_adapter, layer_slots, lora_layers, peft_slots
from .slots import slots_of
from .wrappers import mentions_wrapper, own_class, unwrapped, wrapper_kinds

_OP = "save_adapter"
_ABOUT_NAMES = (
    "target_modules", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter: int | None = None, experts: str = "3d"
) -> None:
    """Writes the adapter of ``model`` into ``directory``, where PEFT's ``from_pretrained`` reads it, too.

    The directory is created if needed. The two files replace older ones together: a save that fails leaves the adapter
    that was there before, and one that is killed leaves the old or the new one for ``load_adapter``. Names in the files
    are those of the model without wrappers (``torch.compile``, DDP, FSDP, activation checkpointing, ``AveragedModel``),
    around the model or inside. Values that accelerate has offloaded are read where it keeps them. DTensors are
    gathered: every process of their mesh must call this.

    Args:
        model: a model with ``LoRALinear`` layers, or a ``PeftModel``, whose active adapter is saved; also wrapped.
        directory: where to write.
        adapter: the number of an adapter of ``MultiLoRALinear`` layers, for a model that has those.
        experts: how the adapter of a mixture's experts is written (PEFT's ``target_parameters``). "3d": as PEFT does,
            all experts in two matrices. "2d": two matrices per expert and linear layer, under the names that the base
            model's checkpoints have, as engines for serving load them; gate and up then have the same lora_A. PEFT
            reads that back where the family's checkpoints have a layer per expert, no other layer has its name, rsLoRA
            is off, down has an adapter, and gate and up have the config's rank and alpha. Elsewhere PEFT fails, or says
            nothing and leaves the experts' adapter out, or scales it otherwise: a ``UserWarning`` says why.

    Raises:
        ValueError: there is no adapter, or not exactly one; experts is neither, or "2d" without experts; the directory
            is a file; layers mix scaling rules; a tensor has no values here (meta device) or only a part of them
            (DeepSpeed ZeRO-3, FSDP's first version), the message names it.
        OSError: the files cannot be written.
    """
    if experts not in ("3d", "2d"):
        raise ValueError(f'{_OP}: experts must be "3d" or "2d", got {experts!r}')
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{_OP}: {target} is not a directory")
    kinds = wrapper_kinds(model)
    with unwrapped(model) as bare:
        active = active_adapter(_OP, bare)
        if active is not None:
            if adapter is not None:
                raise ValueError(f"{_OP}: adapter is for models with MultiLoRALinear layers; use set_adapter")
            _save_peft(bare, active, target, kinds, experts)
        elif experts == "2d":
            raise ValueError(f'{_OP}: experts="2d" needs a PeftModel with an adapter of experts')
        else:
            _save_layers(bare, target, adapter)


def _save_layers(model: nn.Module, target: Path, number: int | None) -> None:
    from safetensors.torch import save_file

    layers = lora_layers(_OP, model, number)
    if not layers:
        raise ValueError(f"{_OP}: the model has no LoRALinear layer")
    _check_one_name_each(model, layers)
    config = _config_of(model, layers)
    slots = layer_slots(_OP, slots_of(model), layers, number, writing=False)
    tensors = {key: slot.read() for key, slot in slots.items()}
    with replacing(target) as staged:
        _write_json(staged / CONFIG_FILE, config)
        save_file(tensors, staged / WEIGHTS_FILE, metadata={"format": "pt"})


def _save_peft(model: Any, adapter: str, target: Path, kinds: Collection[str], experts: str) -> None:
    """By PEFT's own code, which is given the tensors."""
    options: dict[str, Any] = {}
    config = model.peft_config[adapter]
    if config.peft_type == "LORA":
        slots = slots_of(model)
        found = peft_slots(_OP, model, slots, adapter, "auto", writing=False)
        without = peft_slots(_OP, model, slots, adapter, False, writing=False)
        state: dict[str, Tensor] = {slot.name: slot.read() for slot in found.values()}
        options = {"state_dict": state, "save_embedding_layers": len(found) > len(without)}
    with replacing(target) as staged:
        scratch = staged / "peft"
        model.save_pretrained(str(scratch), selected_adapters=[adapter], **options)
        source = scratch if adapter == "default" else scratch / adapter
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(source / name, staged / name)
        written = json.loads((staged / CONFIG_FILE).read_text())
        changes = _names_without_wrappers(model, adapter, kinds, written)
        misread: list[str] = []
        if experts == "2d":
            apart = _take_experts_apart(model, adapter, staged / WEIGHTS_FILE)
            changes, misread = changes | apart.config, apart.misread
        if changes:
            _write_json(staged / CONFIG_FILE, written | changes)
    if misread:
        warnings.warn(
            f"{_OP}: PEFT will not read this file as it is meant ({'; '.join(misread)}), and may not say so; it is for "
            'engines that load two matrices per expert and layer. experts="3d" is what PEFT reads',
            stacklevel=3,
        )


def _take_experts_apart(model: Any, adapter: str, weights: Path) -> PerExpert:
    """Writes the file again."""
    from safetensors.torch import load_file, save_file

    apart = per_expert(_OP, model, adapter, load_file(weights))
    save_file(apart.tensors, weights, metadata={"format": "pt"})
    return apart


def _write_json(file: Path, config: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


# ------------------------------------------------------------------------------------------------- the config


def _config_of(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The ``LoraConfig`` under which PEFT builds these layers."""
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        raise ValueError(f"{_OP}: some layers use rsLoRA and some do not; PEFT's format cannot say so")
    dropouts = Counter(layer.dropout_p for layer in layers.values())
    if len(dropouts) > 1:
        warnings.warn(f"{_OP}: PEFT's format holds one dropout, not {sorted(dropouts)}", stacklevel=4)
    alphas = {name: alpha_of(la.rank, la.alpha, la.use_rslora, la.scaling) for name, la in layers.items()}
    return {
        **describe({name: layer.rank for name, layer in layers.items()}, alphas, _names(model)),
        "auto_mapping": _auto_mapping(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": dropouts.most_common(1)[0][0],
        "peft_type": "LORA",
        "task_type": None,
        "use_rslora": next(iter(layers.values())).use_rslora,
    }


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    kind = own_class(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


def _check_one_name_each(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    first = {id(layer): name for name, layer in layers.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        known = first.get(id(module), name)
        if known != name:
            raise ValueError(
                f"{_OP}: {known} is also {name}; PEFT, which reads these files, would adapt the first of them only"
            )


def _names_without_wrappers(
    model: Any, adapter: str, kinds: Collection[str], written: Mapping[str, Any]
) -> dict[str, Any]:
    """What is to be changed in the config that PEFT wrote, because an adapter was made, or a class taken, of a wrapped
    model.
    """
    from peft.tuners.lora import LoraLayer

    changes: dict[str, Any] = {}
    base = model.get_base_model()
    mapping = written.get("auto_mapping")
    if mapping is not None and own_class(base) is not type(base):
        changes["auto_mapping"] = mapping | _auto_mapping(base)
    if written["peft_type"] != "LORA" or written.get("target_parameters"):
        return changes
    if not mentions_wrapper(json.dumps([written.get(field) for field in _ABOUT_NAMES]), kinds):
        return changes
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    own = {name: layer for name, layer in layers.items() if adapter in layer.scaling}
    below = tuple(f"{name}." for name in layers)
    names = [name for name in _names(base) if not name.startswith(below)]  # those that PEFT will choose from
    exact = describe(
        {name: layer.r[adapter] for name, layer in own.items()},
        {name: layer.lora_alpha[adapter] for name, layer in own.items()},
        names,
    )
    return changes | exact | {field: None for field in _ABOUT_NAMES if field in written and field not in exact}
