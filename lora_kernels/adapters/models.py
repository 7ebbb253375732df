"""The adapter that a model holds: the layers or the PEFT adapter, and the file's key of each of their tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..modules.embedding import LoRAEmbedding
from ..modules.lora import LoRALinear
from ..modules.multi import MultiLoRALinear
from .slots import Part, Slot, Slots

PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B")
_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Last names of the layers that PEFT saves beside an adapter when the vocabulary was resized or they are targeted."""


def active_adapter(op: str, model: nn.Module) -> str | None:
    """Name of the active adapter of a ``PeftModel``; None for a model without PEFT."""
    if not hasattr(model, "peft_config"):
        return None
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            return None  # an attribute that unload() has left behind
        raise ValueError(f"{op}: {type(model).__name__} holds PEFT adapters but is no PeftModel")
    if len(model.active_adapters) != 1:
        raise ValueError(f"{op}: one adapter must be active, not {model.active_adapters}; use set_adapter")
    return model.active_adapters[0]


Layer = LoRALinear | MultiLoRALinear


def lora_layers(op: str, model: nn.Module, number: int | None) -> dict[str, Layer]:
    """The ``LoRALinear`` layers of ``model`` by name, or those that have an adapter of this number among others."""
    embedding = next((name for name, module in model.named_modules() if isinstance(module, LoRAEmbedding)), None)
    if embedding is not None:
        raise ValueError(f"{op}: {embedding or 'the model'} is a LoRAEmbedding, which adapter files do not hold yet")
    found: dict[str, Layer] = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, (LoRALinear, MultiLoRALinear))
    }
    pools = {name: layer for name, layer in found.items() if isinstance(layer, MultiLoRALinear)}
    if number is None and pools:
        name, pool = next(iter(pools.items()))
        raise ValueError(f"{op}: adapter must say which one, {name} has {pool.adapters}")
    if number is not None and len(pools) < max(1, len(found)):
        raise ValueError(f"{op}: adapter {number!r} is one of several, and layers of the model have one or none")
    for name, pool in pools.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < pool.adapters:
            raise ValueError(f"{op}: adapter must be a number from 0 to {pool.adapters - 1} for {name}, got {number!r}")
    return found


def key_of(layer: str, part: str) -> str:
    """The file's key of a part of a layer's adapter."""
    return f"{PREFIX}{layer}.{part}.weight"


def layer_slots(
    op: str, model: Slots, layers: Mapping[str, Layer], number: int | None, *, writing: bool
) -> dict[str, Slot | Part]:
    """``{file key: slot}`` of all tensors of these layers' adapters, or of their adapters of this number.

    Raises:
        ValueError: the values of one cannot be read or, with ``writing``, replaced.
    """
    slots: dict[str, Slot | Part] = {}
    for name in layers:
        for part in PARTS:
            slot = model[f"{name}.{part}"]
            slots[key_of(name, part)] = slot if number is None else Part(slot, number)
    check_slots(op, slots.values(), writing=writing)
    for name, layer in layers.items():
        for part, shape in zip(PARTS, adapter_shapes(layer, layer.rank), strict=True):
            found = slots[key_of(name, part)].shape
            if found != shape:
                raise ValueError(
                    f"{op}: {name}.{part} has shape {found} where the layer says {shape}, as a shard has; call this "
                    "where the whole tensors are (FullyShardedDataParallel.summon_full_params)"
                )
    return slots


def adapter_shapes(linear: Any, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of lora_A and lora_B over ``linear``."""
    return (rank, linear.in_features), (linear.out_features, rank)


def peft_slots(
    op: str, model: nn.Module, slots: Slots, adapter: str, embeddings: bool | Literal["auto"], *, writing: bool
) -> dict[str, Slot]:
    """``{file key: slot}`` of all tensors that PEFT saves for a LoRA adapter of a ``PeftModel``.

    Args:
        embeddings: PEFT's ``save_embedding_layers``.

    Raises:
        ValueError: as ``layer_slots``; a layer's adapter is not among the tensors.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    # PEFT says which tensors those are and how they are called; it is given stand-ins, to find the slots again.
    names = {name: torch.empty(0, device="meta") for name in slots}
    name_of = {id(stand_in): name for name, stand_in in names.items()}
    found = get_peft_model_state_dict(model, names, adapter, save_embedding_layers=embeddings)
    result = {key: slots[name_of[id(stand_in)]] for key, stand_in in found.items()}

    check_slots(op, result.values(), writing=writing)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for part in PARTS:
            if adapter in getattr(layer, part) and hasattr(getattr(layer, part)[adapter], "weight"):
                own = slots[f"{name}.{part}.{adapter}.weight"]
                if f"{name}.{part}.weight" not in result:
                    check_slots(op, [own], writing=True)
                    raise ValueError(f"{op}: {own.name} is not among the tensors that PEFT saves")
                if len(own.shape) < 2 or 0 in own.shape:
                    raise ValueError(
                        f"{op}: {own.name} has shape {own.shape}, as a shard has; call this where the whole tensors "
                        "are (FullyShardedDataParallel.summon_full_params)"
                    )
    return result


def check_slots(op: str, slots: Iterable[Slot | Part], *, writing: bool) -> None:
    """ValueError, with its name, for the first slot whose values cannot be read or, with ``writing``, replaced."""
    for slot in slots:
        why = slot.misfit(writing=writing)
        if why is not None:
            raise ValueError(f"{op}: {slot.name} {why}")


def embedding_slots(model: nn.Module, slots: Slots, keys: Collection[str], prefix: str) -> dict[str, Slot]:
    """Which of ``keys`` are of input or output embeddings of the base model, and where it keeps them.

    Args:
        prefix: what the keys of the file have before the names of ``model``.
    """
    known = {id(module) for module in _embeddings(model)}
    result = {}
    for key in keys:
        path, _, part = key.removeprefix(prefix).rpartition(".")
        layer = path.removesuffix(".base_layer")
        if not key.startswith(prefix) or not (
            id(slots.modules.get(layer)) in known or layer.rpartition(".")[2] in _EMBEDDINGS
        ):
            continue
        for name in (path, layer):  # a layer of ours is its own base layer
            if name in slots.modules and slots.modules[name]._parameters.get(part) is not None:
                result[key] = slots[f"{name}.{part}"]
                break
    return result


def _embeddings(model: nn.Module) -> list[Any]:
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # no transformers model, or one without them
            continue
    return found
