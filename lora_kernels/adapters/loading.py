"""``load_adapter``: PEFT's two files into a model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.base import scaling_of
from .config import CONFIG_FILE, WEIGHTS_FILE, read_config, refuse_more_than_lora, targets_of
from .files import reading
from .inject import first_match, inject
from .models import (
    PREFIX,
    active_adapter,
    adapter_shapes,
    check_slots,
    embedding_slots,
    key_of,
    layer_slots,
    lora_layers,
    peft_slots,
)
from .slots import Part, Slot, slots_of
from .wrappers import check_may_grow, unwrapped, wrapper_kinds

_OP = "load_adapter"
_PICKLE_FILE = "adapter_model.bin"
_PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}
"""Floating point that torch converts to no other."""


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], *, adapter: int | None = None) -> None:
    """Loads an adapter that ``save_adapter`` or PEFT wrote.

    A plain model first gets ``LoRALinear`` layers as the file's config says (they train afterwards). A model
    that already has them, or a ``PeftModel``, gets the values copied into its (active) adapter. Input and output
    embeddings that PEFT saved beside the adapter (for a resized vocabulary, or because they are adapted) replace the
    model's, as in PEFT. Everything is checked before the first change: after an error the model is as it was.

    Values go where the model keeps them: into parameters, which stay the same objects; into accelerate's memory for
    what it has offloaded; into shards, for which every process of their mesh must call this. A parameter on the meta
    device is replaced by one with memory. Names are those of the model without wrappers, around it or inside.

    Args:
        model: a plain model, a model with ``LoRALinear`` layers, or a ``PeftModel``; also wrapped.
        directory: where the adapter is. Only safetensors files are read, never pickles.
        adapter: into which adapter of ``MultiLoRALinear`` layers, for a model that has those.

    Raises:
        FileNotFoundError: no such directory or file.
        OSError: a file cannot be read.
        ValueError: a file is corrupt, or does not fit the model; the message names the file and the key. The model has
            a tensor that cannot be written, be it partitioned by DeepSpeed ZeRO-3 or FSDP's first version.
    """
    source = Path(directory)
    with reading(source) as locate:
        config_file, weights_file = locate(CONFIG_FILE), locate(WEIGHTS_FILE)
        config = read_config(config_file)
        tensors = _read_tensors(weights_file, source / _PICKLE_FILE)
    kinds = wrapper_kinds(model)
    with unwrapped(model) as bare:
        active = active_adapter(_OP, bare)
        if active is not None:
            if adapter is not None:
                raise ValueError(f"{_OP}: adapter is for models with MultiLoRALinear layers; use set_adapter")
            _load_into_peft(bare, active, config, tensors, source)
            return
        layers = lora_layers(_OP, bare, adapter)
        refuse_more_than_lora(config, source / CONFIG_FILE)
        if not layers:
            check_may_grow(f"{_OP}: {source}", kinds)
        _load_into_layers(bare, layers, adapter, config, tensors, source)


def _load_into_layers(
    model: nn.Module, layers: Mapping[str, Any], number: int | None, config: Mapping[str, Any],
    tensors: Mapping[str, Tensor], source: Path,
) -> None:  # fmt: skip
    targets, slots = targets_of(config, source / CONFIG_FILE), slots_of(model)
    if layers:
        _check_scaling({name: layer.scaling for name, layer in layers.items()}, config, source / CONFIG_FILE)
        merged = next((name for name, layer in layers.items() if layer.merged), None)
        if merged is not None:
            raise ValueError(f"{_OP}: {source}: {merged} is merged; unmerge it before loading")
        own = layer_slots(f"{_OP}: {source}", slots, layers, number, writing=True)
        shapes = {key: slot.shape for key, slot in own.items()}
    else:
        try:
            plan, _ = targets.plan(f"{_OP}: {source / CONFIG_FILE}", model, config["lora_dropout"])
        except TypeError as error:
            raise ValueError(str(error)) from None
        shapes = {}
        for name, (linear, rank, _) in plan.items():
            a, b = adapter_shapes(linear, rank)
            shapes |= {key_of(name, "lora_A"): a, key_of(name, "lora_B"): b}
    embeddings = embedding_slots(model, slots, tensors.keys() - shapes.keys(), PREFIX)
    beside = _prepare_embeddings(embeddings, shapes, tensors, source)
    if not layers:
        inject(model, **vars(targets), dropout=config["lora_dropout"], use_rslora=config["use_rslora"])
        layers = lora_layers(_OP, model, None)
        own = layer_slots(f"{_OP}: {source}", slots, layers, None, writing=True)
    _write(own, {key: slot.prepare(tensors[key]) for key, slot in own.items()})
    _write(embeddings, beside)


def _load_into_peft(
    model: Any, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path
) -> None:
    from peft.tuners.lora import LoraLayer

    kind = model.peft_config[adapter].peft_type
    if kind != "LORA":
        raise ValueError(f"{_OP}: {source / CONFIG_FILE}: peft_type is 'LORA', the model's adapter is of {kind!s}")
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"{_OP}: {source}: the adapter is merged; call unmerge_adapter() before loading")
    scalings = {name: float(layer.scaling[adapter]) for name, layer in layers.items()}
    _check_scaling(scalings, config, source / CONFIG_FILE)
    slots = slots_of(model)
    own = peft_slots(f"{_OP}: {source}", model, slots, adapter, False, writing=True)
    embeddings = embedding_slots(model, slots, tensors.keys() - own.keys(), "")
    beside = _prepare_embeddings(embeddings, {key: slot.shape for key, slot in own.items()}, tensors, source)
    _write(own, {key: slot.prepare(tensors[key]) for key, slot in own.items()})
    _write(embeddings, beside)


# --------------------------------------------------------------------------------------------------- reading


def _read_tensors(file: Path, pickle: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.is_dir():
        raise ValueError(f"{_OP}: {file} is a directory, expected a file")
    if not file.exists():
        if pickle.is_file():
            raise ValueError(
                f"{_OP}: {pickle} is a pickle, which is not read because it can run code; "
                "save the adapter with PEFT as safetensors"
            )
        raise FileNotFoundError(f"{_OP}: {file} does not exist")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{_OP}: {file} is corrupt: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"{_OP}: cannot read it: {error.strerror or error}", str(file)) from None


def _check_scaling(scalings: Mapping[str, float], config: Mapping[str, Any], file: Path) -> None:
    for name, scaling in scalings.items():
        rank: Any = first_match(config["rank_pattern"], name, config["r"])
        alpha = first_match(config["alpha_pattern"], name, config["lora_alpha"])
        saved = scaling_of(rank, alpha, config["use_rslora"])
        if not math.isclose(saved, scaling, rel_tol=1e-6):
            raise ValueError(
                f"{_OP}: {file}: the adapter scales {name} by {saved:g} (r={rank}, lora_alpha={alpha}), "
                f"the model by {scaling:g}; make the model's adapter with the same r and alpha"
            )


def _check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Keys and shapes must be exactly those of the model."""
    for key, shape in expected.items():
        if key not in tensors:
            missing = len(expected.keys() - tensors.keys())
            raise ValueError(f"{_OP}: {file}: {key} is missing ({missing} of {len(expected)} keys are)")
        found = tuple(tensors[key].shape)
        if found != shape:
            raise ValueError(f"{_OP}: {file}: {key} has shape {found}, the model needs {shape}")
        if not tensors[key].is_floating_point() or tensors[key].dtype in _PACKED:
            raise ValueError(f"{_OP}: {file}: {key} is {tensors[key].dtype}, expected floating point")
    unexpected = sorted(tensors.keys() - expected.keys())
    if unexpected:
        raise ValueError(f"{_OP}: {file}: {unexpected[0]} has no place in the model ({len(unexpected)} such keys)")


def _prepare_embeddings(
    slots: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """Checks all tensors of the file: those of the adapter, whose shapes these are, and embeddings beside it, which are
    returned as their slots want them.
    """
    file = source / WEIGHTS_FILE
    check_slots(f"{_OP}: {source}", slots.values(), writing=True)
    for key, slot in slots.items():
        if tuple(tensors[key].shape) != slot.shape:
            raise ValueError(
                f"{_OP}: {file}: {key} has shape {tuple(tensors[key].shape)}, the model needs {slot.shape}; resize its "
                "vocabulary first (resize_token_embeddings)"
            )
    _check_tensors({**shapes, **{key: slot.shape for key, slot in slots.items()}}, tensors, file)
    first: dict[int, str] = {}
    for key, slot in slots.items():
        other = first.setdefault(id(slot.tensor), key)
        if other != key and not tensors[key].float().equal(tensors[other].float()):
            raise ValueError(f"{_OP}: {file}: {other} and {key} differ, and are one tied weight in the model")
    return {key: slot.prepare(tensors[key]) for key, slot in slots.items()}


def _write(slots: Mapping[str, Slot | Part], prepared: Mapping[str, Tensor]) -> None:
    for key, slot in slots.items():
        slot.write(prepared[key])
