"""``route_adapters``: samples of one batch go through different adapters, in training and without gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .mixed_batch import Routed

BASE = "__base__"
"""The name for no adapter, as PEFT has it."""


@contextmanager
def route_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Each sample of the batches within goes through an adapter of its own, or through none.

    ``with lk.route_adapters(model, ["a", "b", "__base__"]): loss = model(input_ids).sum()`` computes what three calls
    with one sample each would: an adapter's gradient is that of a step on its own samples. It is what ``adapter_names``
    is in PEFT, which serves that in eval mode alone. Layers that ``lk.patch`` has fused multiply the base once for all
    samples (``lk.multi_lora_linear``); where they cannot, DoRA for one, their own forward serves each adapter's
    samples by themselves, and ``lk.stats()`` counts the reason. All other layers of PEFT's compute what they make of
    ``adapter_names``; what they refuse there (merged adapters, say) raises their ``ValueError`` here.

    Which adapters train is not touched: ``model.base_model.set_adapter(["a", "b"])`` has several do. With gradient
    checkpointing, ``backward`` belongs inside the ``with``, since it calls the layers again.

    Args:
        model: a PEFT model, or a module that contains PEFT's LoRA layers.
        names: an adapter's name for each sample of the batch, "__base__" for none.

    Raises:
        TypeError: ``names`` is not a sequence of strings.
        ValueError: the model has no LoRA layers, or no adapter of a name; or, in the call, there are not as many names
            as samples.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"route_adapters: names must be a sequence of strings, one for each sample, got {names!r}")
    layers = list(_layers(model))
    known: set[str] = set()
    for layer in layers:
        known.update(getattr(layer, "lora_A", ()), getattr(layer, "lora_embedding_A", ()))
    if not known:
        raise ValueError("route_adapters: model must contain LoRA layers of PEFT's, got none")
    unknown = sorted({*names} - known - {BASE})
    if unknown:
        raise ValueError(
            f"route_adapters: names must be {', '.join(sorted(known))} or {BASE}, got {', '.join(map(repr, unknown))}"
        )
    if model.training and torch.is_grad_enabled():
        _warn_of_frozen(layers, {*names} - {BASE})
    routed = Routed(names)

    def give_names(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "adapter_names": routed}

    handles = [layer.register_forward_pre_hook(give_names, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> Iterator[Any]:
    """Whatever PEFT gives ``adapter_names`` to."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (m for m in model.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper)))


def _warn_of_frozen(layers: list[Any], names: set[str]) -> None:
    """PEFT freezes adapters that are not active, and an adapter without gradients is easily overlooked."""
    training = {
        part.split(".")[1]
        for layer in layers
        for part, parameter in layer.named_parameters()
        if parameter.requires_grad and part.startswith("lora_") and part.count(".")
    }
    frozen = sorted(names - training)
    if frozen:
        warnings.warn(
            f"route_adapters: {', '.join(frozen)} will get no gradient, since PEFT trains active adapters alone; "
            f"model.base_model.set_adapter({sorted(names)}) makes all of them active",
            stacklevel=4,
        )
