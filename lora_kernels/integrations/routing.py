"""``route_adapters``: which adapter each sample of a batch uses, in training too."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modules.multi import MultiLoRALinear

BASE = "__base__"
"""PEFT's name for no adapter."""


@contextmanager
def route_adapters(model: nn.Module, adapters: Sequence[str | int | None]) -> Iterator[None]:
    """Within it, every sample of a batch uses its own adapter, or none; forward, ``generate``, and backward.

    Gradients of an adapter come from its own samples: they are, up to rounding, those of a step on these alone. Layers
    that ``lk.patch`` has fused compute the batch by one ``multi_lora_linear``; PEFT's own code serves the others.
    Outside, a model behaves as before: PEFT's active adapter serves all samples, and ``MultiLoRALinear`` layers are
    their frozen base.

    Activation checkpointing calls layers again during backward. Backward must then run inside, too; outside it raises
    ``RuntimeError`` instead of forming gradients of another adapter.

    Args:
        model: a PEFT model with LoRA, or one with ``MultiLoRALinear`` layers (``lk.inject(..., adapters=...)``).
        adapters: one per sample: names of PEFT's adapters, or numbers of a pool's. None and ``"__base__"`` are the
            base alone.

    Raises:
        ValueError: the model has no such layers; an adapter that no layer has.
        TypeError: a name where a number belongs, or the other way round.
    """
    peft_layers, pools = _layers(model)
    if not peft_layers and not pools:
        raise ValueError("route_adapters: the model has neither PEFT's LoRA layers nor MultiLoRALinear layers")
    routes = []
    if peft_layers:
        routes.append(_Route("adapter_names", _names(peft_layers, adapters)))
    if pools:
        routes.append(_Route("adapter_ids", _numbers(pools, adapters)))
    for route, layers in zip(routes, [layers for layers in (peft_layers, pools) if layers]):
        for layer in layers:
            route.add_to(layer)
    try:
        yield
    finally:
        for route in routes:
            route.ends()


class _Route:
    """A forward pre-hook of all layers: gives them their adapters, and afterwards looks for calls that backward makes.

    It stays on a layer until its next call outside of backward, which needs no adapters any more.
    """

    def __init__(self, argument: str, value: Any) -> None:
        self._argument, self._value, self._is_over = argument, value, False
        self._handles: dict[nn.Module, Any] = {}

    def add_to(self, layer: nn.Module) -> None:
        self._handles[layer] = layer.register_forward_pre_hook(self, with_kwargs=True)

    def ends(self) -> None:
        self._is_over = True

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self._is_over:
            return args, {**kwargs, self._argument: self._value}
        if torch._C._current_graph_task_id() == -1:
            self._handles.pop(layer).remove()
        elif self._argument not in kwargs:
            raise RuntimeError(
                "route_adapters: backward calls a layer again (activation checkpointing) after the adapters of its "
                "batch were forgotten; call backward inside of `with route_adapters(...)`, too"
            )
        return None


def _layers(model: nn.Module) -> tuple[list[Any], list[MultiLoRALinear]]:
    lora_layer = getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", ())
    peft_layers = [m for m in model.modules() if isinstance(m, lora_layer)]
    return peft_layers, [m for m in model.modules() if isinstance(m, MultiLoRALinear)]


def _names(layers: Sequence[Any], adapters: Sequence[str | int | None]) -> list[str]:
    known = {name for layer in layers for name in layer.scaling}
    names = []
    for adapter in adapters:
        name = BASE if adapter is None else adapter
        if not isinstance(name, str):
            raise TypeError(f"route_adapters: adapters of a PEFT model are names, got {adapter!r}")
        if name != BASE and name not in known:
            raise ValueError(f"route_adapters: no layer has an adapter {name!r}, known are {', '.join(sorted(known))}")
        names.append(name)
    return names


def _numbers(pools: Sequence[MultiLoRALinear], adapters: Sequence[str | int | None]) -> torch.Tensor:
    count = min(pool.adapters for pool in pools)
    numbers = []
    for adapter in adapters:
        number = -1 if adapter is None or adapter == BASE else adapter
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"route_adapters: adapters of MultiLoRALinear layers are numbers, got {adapter!r}")
        if not -1 <= number < count:
            raise ValueError(f"route_adapters: adapters must be numbers from -1 to {count - 1}, got {number}")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.int64, device=pools[0].weight.device)
