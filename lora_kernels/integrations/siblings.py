"""Which layers of a model read the same tensor, found by watching one forward of a few tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch


def siblings(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Any] | None) -> list[list[str]]:
    """The layers, by name, that belong to one module, whose forward calls them with one tensor, which nobody has
    changed in between: in the order of their calls.

    A layer that is called more than once belongs to none of them. The forward is that of ``model.eval()`` without
    gradients, with whatever hooks the model has; modes, random generators and ``lk.stats()`` are left as they were.

    Args:
        model: called with ``inputs``.
        inputs: keyword arguments of the model's forward. None: the ``dummy_inputs`` of a model of transformers.

    Raises:
        ValueError: the model cannot be called so.
    """
    called: list[tuple[str, Any, int]] = []  # holds every x, so that no other can have its id
    running: Counter[str] = Counter()  # calls of the layers' modules

    def note(name: str, args: tuple) -> None:
        x = args[0] if args and running[_parent(name)] else None
        called.append((name, x, x._version if isinstance(x, Tensor) and not x.is_inference() else 0))

    def count(name: str, calls: int) -> None:
        running[name] += calls

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args)) for name, layer in layers.items()
    ]
    for name in {_parent(name) for name in layers}:
        parent = model.get_submodule(name)
        hooks.append(parent.register_forward_pre_hook(lambda _, args, name=name: count(name, 1)))
        hooks.append(parent.register_forward_hook(lambda _, args, result, name=name: count(name, -1)))
    try:
        with _quietly(model):
            model(**(_dummy_inputs(model) if inputs is None else inputs))
    except Exception as error:  # whatever the model raises on inputs that it was not made for
        raise ValueError(
            "patch: to find the layers that read the same tensor, packs=True calls the model, which raised "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; "
            "give keyword arguments of its forward instead: packs={...}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(name for name, *_ in called)
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name, x, version in called:
        if times[name] == 1 and isinstance(x, Tensor):
            groups.setdefault((_parent(name), id(x), version), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _dummy_inputs(model: Any) -> dict[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # What accelerate has offloaded is on meta until it is called, and moves its inputs itself.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in base.dummy_inputs.items()}


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """A forward that nobody will have noticed."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    model.eval()
    try:
        with torch.random.fork_rng(devices), dispatch.own_stats(), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
