"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .inject import Targets, first_match, inject
from .modules import LoRAEmbedding, LoRALinear, scaling_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."

_BEYOND_PLAIN_LORA = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication",
    "lora_bias", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""Fields of PEFT's config that, if set, mean more than A and B on linear layers."""
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights alone; others need a base that was changed with them."""


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the adapter of ``model`` into ``directory``, where PEFT's ``from_pretrained`` reads it, too.

    The directory is created if needed. Both files are complete before the first is renamed into place, so that
    a failed or interrupted save leaves an adapter that was there before intact.

    Args:
        model: a model with ``LoRALinear`` layers, or a ``PeftModel``, whose active adapter is saved.
        directory: where to write.

    Raises:
        ValueError: there is no adapter, or not exactly one; the directory is a file; layers mix scaling
            rules.
    """
    from safetensors.torch import save_file

    model, target = _unwrapped(model), Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"save_adapter: {target} is not a directory")
    peft_adapter = _peft_adapter("save_adapter", model)
    if peft_adapter is None:
        layers = _lora_layers("save_adapter", model)
        if not layers:
            raise ValueError("save_adapter: the model has no LoRALinear layer")
        config = json.dumps(_describe(model, layers), indent=2, sort_keys=True)
        tensors = {key: p.detach().to("cpu", copy=True).contiguous() for key, p in _parameters(layers).items()}

    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        source = Path(temporary)
        if peft_adapter is None:
            (source / CONFIG_FILE).write_text(config)
            save_file(tensors, source / WEIGHTS_FILE, metadata={"format": "pt"})
        else:
            model.save_pretrained(temporary, selected_adapters=[peft_adapter])
            source = source if peft_adapter == "default" else source / peft_adapter
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            with open(source / name, "rb") as file:
                os.fsync(file.fileno())
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(source / name, target / name)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Loads an adapter that ``save_adapter`` or PEFT wrote.

    A plain model first gets ``LoRALinear`` layers as the file's config says (they train afterwards). A model
    that already has them, or a ``PeftModel``, gets the values copied into its (active) adapter. Everything is
    checked before the first change: after an error the model is as it was.

    Args:
        model: a plain model, a model with ``LoRALinear`` layers, or a ``PeftModel``.
        directory: where the adapter is. Only safetensors files are read, never pickles.

    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: a file is corrupt, or does not fit the model; the message names the file and the key.
    """
    model, source = _unwrapped(model), Path(directory)
    config, tensors = _read(source)
    weights_file = source / WEIGHTS_FILE
    peft_adapter = _peft_adapter("load_adapter", model)
    if peft_adapter is not None:
        _load_into_peft(model, peft_adapter, config, tensors, source)
        return

    _refuse_more_than_lora(config, source / CONFIG_FILE)
    targets = _targets(config, source / CONFIG_FILE)
    layers = _lora_layers("load_adapter", model)
    if layers:
        _check_scaling({name: layer.scaling for name, layer in layers.items()}, config, source / CONFIG_FILE)
        merged = next((name for name, layer in layers.items() if layer.merged), None)
        if merged is not None:
            raise ValueError(f"load_adapter: {merged} is merged; unmerge it before loading")
        _check_tensors(_shapes(_parameters(layers)), tensors, weights_file)
    else:
        plan, _ = targets.plan("load_adapter", model, config["lora_dropout"])
        shapes = {}
        for name, (linear, rank, _) in plan.items():
            n, k = linear.weight.shape
            shapes |= {_key(name, "lora_A"): (rank, k), _key(name, "lora_B"): (n, rank)}
        _check_tensors(shapes, tensors, weights_file)
        inject(model, **vars(targets), dropout=config["lora_dropout"], use_rslora=config["use_rslora"])
        layers = _lora_layers("load_adapter", model)
    _copy(tensors, _parameters(layers))


# ---------------------------------------------------------------------------------------------------- models


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # torch.compile's wrapper puts its name into every key


def _peft_adapter(op: str, model: nn.Module) -> str | None:
    """Name of the active adapter of a ``PeftModel``; None for a model without PEFT."""
    if not hasattr(model, "peft_config"):
        return None
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(f"{op}: {type(model).__name__} holds PEFT adapters but is no PeftModel")
    if len(model.active_adapters) != 1:
        raise ValueError(f"{op}: one adapter must be active, not {model.active_adapters}; use set_adapter")
    return model.active_adapters[0]


def _lora_layers(op: str, model: nn.Module) -> dict[str, LoRALinear]:
    embedding = next((name for name, module in model.named_modules() if isinstance(module, LoRAEmbedding)), None)
    if embedding is not None:
        raise ValueError(f"{op}: {embedding or 'the model'} is a LoRAEmbedding, which adapter files do not hold yet")
    return {name: module for name, module in model.named_modules() if name and isinstance(module, LoRALinear)}


def _key(name: str, part: str) -> str:
    return f"{_PREFIX}{name}.{part}.weight"


def _parameters(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    return {_key(name, part): getattr(layer, part) for name, layer in layers.items() for part in ("lora_A", "lora_B")}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    for key, slot in slots.items():
        slot.copy_(tensors[key])


def _load_into_peft(
    model: nn.Module, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path
) -> None:
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    layers = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
    if any(layer.merged for layer in layers.values()):
        raise ValueError("load_adapter: the adapter is merged; call unmerge_adapter() before loading")
    scalings = {name: float(layer.scaling[adapter]) for name, layer in layers.items()}
    _check_scaling(scalings, config, source / CONFIG_FILE)
    slots = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    _check_tensors(_shapes(slots), tensors, source / WEIGHTS_FILE)
    _copy(tensors, slots)  # a state_dict's tensors share the parameters' memory


# --------------------------------------------------------------------------------------------------- reading


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, its numbers checked, and the tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_file, weights_file = source / CONFIG_FILE, source / WEIGHTS_FILE
    if not config_file.is_file():
        raise FileNotFoundError(f"load_adapter: {config_file} does not exist")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"load_adapter: {config_file} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"load_adapter: {config_file} is not of a LoRA adapter, its peft_type is {kind!r}")
    config = {"lora_dropout": 0.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, **config}
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[field], dict):
            raise ValueError(f"load_adapter: {config_file}: {field} is {config[field]!r}")
        numbers |= config[field]
    for field, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"load_adapter: {config_file}: {field} is {value!r}, expected a number")

    if not weights_file.is_file():
        if (source / _PICKLE_FILE).is_file():
            raise ValueError(
                f"load_adapter: {source / _PICKLE_FILE} is a pickle, which is not read because it can run code; "
                "save the adapter with PEFT as safetensors"
            )
        raise FileNotFoundError(f"load_adapter: {weights_file} does not exist")
    try:
        return config, load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {weights_file} is corrupt: {error}") from None


def _refuse_more_than_lora(config: Mapping[str, Any], file: Path) -> None:
    more = {field: config[field] for field in _BEYOND_PLAIN_LORA if config.get(field)}
    if config.get("bias", "none") != "none":
        more["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        more["init_lora_weights"] = config["init_lora_weights"]
    if more:
        fields = ", ".join(f"{field}={value!r}" for field, value in more.items())
        raise ValueError(f"load_adapter: {file}: {fields} is not plain LoRA; load it with PEFT and use lk.patch")


def _targets(config: Mapping[str, Any], file: Path) -> Targets:
    if not config.get("target_modules"):
        raise ValueError(f"load_adapter: {file}: target_modules is {config.get('target_modules')!r}")
    return Targets(
        config["target_modules"], config["r"], config["lora_alpha"],
        config["rank_pattern"], config["alpha_pattern"],
        config.get("exclude_modules"), config.get("layers_to_transform"), config.get("layers_pattern"),
    )  # fmt: skip


def _check_scaling(scalings: Mapping[str, float], config: Mapping[str, Any], file: Path) -> None:
    for name, scaling in scalings.items():
        rank = first_match(config["rank_pattern"], name, config["r"])
        alpha = first_match(config["alpha_pattern"], name, config["lora_alpha"])
        saved = scaling_of(rank, alpha, config["use_rslora"])
        if not math.isclose(saved, scaling, rel_tol=1e-6):
            raise ValueError(
                f"load_adapter: {file}: the adapter scales {name} by {saved:g} (r={rank}, lora_alpha={alpha}), "
                f"the model by {scaling:g}; make the model's adapter with the same r and alpha"
            )


def _check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Keys and shapes must be exactly those of the model."""
    for key, shape in expected.items():
        if key not in tensors:
            missing = len(expected.keys() - tensors.keys())
            raise ValueError(f"load_adapter: {file}: {key} is missing ({missing} of {len(expected)} keys are)")
        found = tuple(tensors[key].shape)
        if found != shape:
            raise ValueError(f"load_adapter: {file}: {key} has shape {found}, the model needs {shape}")
        if not tensors[key].is_floating_point():
            raise ValueError(f"load_adapter: {file}: {key} is {tensors[key].dtype}, expected floating point")
    unexpected = sorted(tensors.keys() - expected.keys())
    if unexpected:
        raise ValueError(
            f"load_adapter: {file}: {unexpected[0]} has no place in the model ({len(unexpected)} such keys)"
        )


# --------------------------------------------------------------------------------------------------- writing


def _describe(model: nn.Module, layers: Mapping[str, LoRALinear]) -> dict[str, Any]:
    """The ``LoraConfig`` under which PEFT builds these layers."""
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        raise ValueError("save_adapter: some layers use rsLoRA and some do not; PEFT's format cannot say so")
    dropouts = Counter(layer.dropout_p for layer in layers.values())
    if len(dropouts) > 1:
        warnings.warn(f"save_adapter: PEFT's format holds one dropout, not {sorted(dropouts)}", stacklevel=3)
    r, rank_pattern = _default_and_pattern({name: layer.rank for name, layer in layers.items()})
    alpha, alpha_pattern = _default_and_pattern({name: _alpha(layer) for name, layer in layers.items()})
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.most_common(1)[0][0],
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "target_modules": _target_names(model, layers),
        "task_type": None,
        "use_rslora": next(iter(layers.values())).use_rslora,
    }


def _alpha(layer: LoRALinear) -> float:
    """The alpha that gives the layer's scaling, which PEFT may have changed since (``set_scale``)."""
    if math.isclose(scaling_of(layer.rank, layer.alpha, layer.use_rslora), layer.scaling, rel_tol=1e-9):
        return layer.alpha
    return layer.scaling / scaling_of(layer.rank, 1.0, layer.use_rslora)


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and PEFT's pattern for the others: by last name where that says it, else by
    whole name.
    """
    default = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[float]] = {}
    for name, value in values.items():
        by_leaf.setdefault(_leaf(name), set()).add(value)
    pattern = {}
    for name, value in values.items():
        if value != default:
            uniform = len(by_leaf[_leaf(name)]) == 1
            pattern[re.escape(_leaf(name)) if uniform else "^" + re.escape(name)] = value
    return default, pattern


def _target_names(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str]:
    """The last names of the layers where they choose these layers and no other module, else their whole
    names.
    """
    leaves = {_leaf(name) for name in layers}
    chosen = {name for name, _ in model.named_modules() if _leaf(name) in leaves}
    return sorted(leaves) if chosen == set(layers) else sorted(layers)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
