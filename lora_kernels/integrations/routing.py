"""``route_adapters``: which adapter each sample of a batch uses, in training too."""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from ..modules.multi import MultiLoRALinear

BASE = "__base__"
"""PEFT's name for no adapter."""
_entering = threading.Lock()
_ended = itertools.count()


@contextmanager
def route_adapters(model: nn.Module, adapters: Sequence[str | int | None]) -> Iterator[None]:
    """Within it, every sample of a batch uses its own adapter, or none; forward, ``generate``, and backward.

    Gradients of an adapter come from its own samples: they are, up to rounding, those of a step on these alone. Without
    samples an adapter of PEFT's gets none, one of a pool zeros. Layers that ``lk.patch`` has fused compute the batch by
    one ``multi_lora_linear``, or, where that cannot serve them (DoRA), each adapter's samples by themselves; PEFT's own
    code serves the others. Which adapters train is not touched: ``model.base_model.set_adapter(["a", "b"])`` has
    several do. Outside, a model behaves as before: PEFT's active adapter serves all samples, and ``MultiLoRALinear``
    layers are their frozen base.

    Activation checkpointing calls layers again during backward. Backward must then run inside, too; outside it raises
    ``RuntimeError`` instead of forming gradients of another adapter. So does one backward of several batches that were
    called with different adapters. A context without gradients (``torch.no_grad()`` around it) is over when it ends.

    A model serves one such context at a time, whichever thread calls it. Code that ``torch.compile`` has made of fused
    layers and pools is made anew for other adapters; of PEFT's own layers it must have been made inside, since hooks
    that come later are not looked for.

    Args:
        model: a PEFT model with LoRA, or one with ``MultiLoRALinear`` layers (``lk.inject(..., adapters=...)``).
        adapters: one per sample: names of PEFT's adapters, or numbers of a pool's. None and ``"__base__"`` are the
            base alone. Beams of ``generate`` are samples, each ``num_beams`` times in turn.

    Raises:
        ValueError: the model has no such layers; an adapter that no layer has; adapters of parameters (PEFT's
            ``target_parameters``, as those of a mixture's experts), which serve all samples alike; or, in the call,
            there are not as many adapters as samples.
        TypeError: a name where a number belongs, or the other way round.
        RuntimeError: another thread is inside of such a context of this model.
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(f"route_adapters: adapters must be a sequence, one for each sample, got {adapters!r}")
    peft_layers, pools = _layers(model)
    if not peft_layers and not pools:
        raise ValueError("route_adapters: the model has neither PEFT's LoRA layers nor MultiLoRALinear layers")
    routes = []
    _check_no_parameters(model)
    if peft_layers:
        names = _names(peft_layers, adapters)
        if model.training and torch.is_grad_enabled():
            _warn_of_frozen(peft_layers, {*names} - {BASE})
        routes.append(_Route("adapter_names", _routed(names), tuple(names)))
    if pools:
        routes.append(_Route("adapter_ids", _numbers(pools, adapters), tuple(adapters)))
    with _entering:
        _check_thread([*peft_layers, *pools])
        for route, layers in zip(routes, [layers for layers in (peft_layers, pools) if layers]):
            for layer in layers:
                route.add_to(layer)
    try:
        yield
    finally:
        for route, layers in zip(routes, [layers for layers in (peft_layers, pools) if layers]):
            route.ends(layers)


class _Route:
    """A forward pre-hook of all layers: gives them their adapters, and afterwards looks for calls that backward makes.

    It stays on a layer until its next call outside of backward, which needs no adapters any more, or until another
    route takes its place. A copy of a layer is routed as long as the layer is, a pickled one is not.
    """

    def __init__(self, argument: str, value: Any, adapters: tuple[Any, ...]) -> None:
        torch.compiler.assume_constant_result(_backward_of_now)  # not where it is defined: it imports Dynamo
        self._argument, self._value, self._adapters, self._is_over = argument, value, adapters, False
        self._may_go_backward = torch.is_grad_enabled()
        self._thread = threading.get_ident()
        self._calls: dict[nn.Module, int] = {}
        self._again: dict[nn.Module, tuple[int, int]] = {}  # a backward, and how often it has called
        self._others: set[nn.Module] = set()  # called for other batches, of which backward may not be over
        self._earlier: set[nn.Module] = set()  # called before, whichever the adapters, in contexts with gradients

    def add_to(self, layer: nn.Module) -> None:
        for route in _routes_of(layer):
            if route._is_over:
                self._takes_over(layer, route)
                route._leave(layer)
        layer.register_forward_pre_hook(self, with_kwargs=True)
        layer.__dict__["is_routed"] = True

    def ends(self, layers: Sequence[nn.Module]) -> None:
        self._is_over = True
        stays = self._may_go_backward or torch.is_grad_enabled()
        # Code that is compiled from now on has looked at this hook, and is of no use where another one has ended.
        over = f"until {next(_ended)}"
        for layer in layers:
            if not stays and layer not in self._earlier:
                self._leave(layer)
            elif self in _routes_of(layer):
                layer.__dict__["is_routed"] = over

    @property
    def is_elsewhere(self) -> bool:
        return not self._is_over and self._thread != threading.get_ident()

    def _takes_over(self, layer: nn.Module, before: _Route) -> None:
        calls = before._calls.get(layer, 0)
        self._earlier.add(layer)
        if before._adapters == self._adapters:
            self._calls[layer] = calls
        elif calls > before._again.get(layer, (0, 0))[1]:
            self._others.add(layer)
        if layer in before._others:
            self._others.add(layer)

    def _leave(self, layer: nn.Module) -> None:
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is self:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
        if not _routes_of(layer):
            layer.__dict__.pop("is_routed", None)
        self._calls.pop(layer, None)  # a copy's layers would live as long as the original's
        self._again.pop(layer, None)
        self._others.discard(layer)
        self._earlier.discard(layer)

    def _count(self, layer: nn.Module) -> None:
        """``RuntimeError`` if backward calls the layer more often than this batch has, and so for another one."""
        task = _backward_of_now()
        if task == -1:
            self._calls[layer] = self._calls.get(layer, 0) + 1
            return
        before, times = self._again.get(layer, (task, 0))
        times = times + 1 if before == task else 1
        self._again[layer] = task, times
        if layer in self._others and times > self._calls.get(layer, 0):
            raise RuntimeError(
                "route_adapters: backward calls a layer again (activation checkpointing) for another batch than that "
                "of this context; call a batch's backward inside of its own `with route_adapters(...)`, before the next"
            )

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self._is_over:
            if not is_compiling():
                self._may_go_backward |= torch.is_grad_enabled()
                self._count(layer)
            return args, {**kwargs, self._argument: self._value}
        if _backward_of_now() == -1:
            if not is_compiling():  # who compiles has already looked at the hooks
                self._leave(layer)
        elif self._argument not in kwargs:
            raise RuntimeError(
                "route_adapters: backward calls a layer again (activation checkpointing) after the adapters of its "
                "batch were forgotten; call backward inside of `with route_adapters(...)`, too"
            )
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Route:
        return self  # a copy would never be over

    def __reduce__(self) -> tuple[Any, tuple]:
        return _over, ()


def _backward_of_now() -> int:
    """The number of the backward that makes this call, or that calls code which is compiled now; -1 for none."""
    return torch._C._current_graph_task_id()


def _routes_of(layer: nn.Module) -> list[_Route]:
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, _Route)]


def _check_thread(layers: Sequence[nn.Module]) -> None:
    if any(route.is_elsewhere for layer in layers for route in _routes_of(layer)):
        raise RuntimeError(
            "route_adapters: another thread is inside of such a context of this model, whose calls would get these "
            "adapters, too; let threads take turns"
        )


def _over() -> _Route:
    route = _Route("", None, ())
    route.ends(())
    return route


def _layers(model: nn.Module) -> tuple[list[Any], list[MultiLoRALinear]]:
    """Whatever PEFT gives ``adapter_names`` to, if there is LoRA among it, and pools."""
    lora_layer = getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", ())
    wrapper = getattr(sys.modules.get("peft.utils.other"), "AuxiliaryTrainingWrapper", ())
    peft_layers = [m for m in model.modules() if isinstance(m, lora_layer)]
    if peft_layers:
        peft_layers += [m for m in model.modules() if isinstance(m, wrapper)]
    return peft_layers, [m for m in model.modules() if isinstance(m, MultiLoRALinear)]


def _check_no_parameters(model: nn.Module) -> None:
    """``ValueError`` for PEFT's adapters of parameters: what reads a parameter does not know samples."""
    wrapper = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", ())
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, wrapper) and m.lora_A]
    if found:
        name, layer = found[0]
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"route_adapters: adapters of parameters (PEFT's target_parameters, experts of a mixture) serve all "
            f"samples alike, here {', '.join(sorted(layer.lora_A))} on {name}.{layer.parameter_name}{others}"
        )


def _names(layers: Sequence[Any], adapters: Sequence[str | int | None]) -> list[str]:
    known = {name for layer in layers for name in getattr(layer, "scaling", ())}
    names = []
    for adapter in adapters:
        name = BASE if adapter is None else adapter
        if not isinstance(name, str):
            raise TypeError(f"route_adapters: adapters of a PEFT model are names, got {adapter!r}")
        if name != BASE and name not in known:
            raise ValueError(f"route_adapters: no layer has an adapter {name!r}, known are {', '.join(sorted(known))}")
        names.append(name)
    return names


def _routed(names: list[str]) -> Any:
    from .peft.mixed_batch import Routed

    return Routed(names)


def _warn_of_frozen(layers: Sequence[Any], names: set[str]) -> None:
    """PEFT freezes adapters that are not active, and an adapter without gradients is easily overlooked."""
    training = {
        part.split(".")[1]
        for layer in layers
        for part, parameter in layer.named_parameters()
        if parameter.requires_grad and part.startswith("lora_") and "." in part
    }
    frozen = sorted(names - training)
    if frozen:
        warnings.warn(
            f"route_adapters: {', '.join(frozen)} will get no gradient, since PEFT trains active adapters alone; "
            f"model.base_model.set_adapter({sorted(names)}) makes all of them active",
            stacklevel=4,
        )


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
