"""The modules whose layers are served together: their classes, and giving those back. Importing this module imports
PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import class_swaps
from ...reasons import Reason
from . import mlp, packs


class Parent(nn.Module):
    """What replaces a module with packs, beside its own class: its forward is where they work.

    A module that is given another layer in the place of one of these, as PEFT's ``merge_and_unload`` does, has its own
    class again at once.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(packs.PACKS)
        if own is None:
            return super().forward(*args, **kwargs)
        calls, traced = own[0], is_compiling()
        thread = 0 if traced else get_ident()
        outer = calls.get(thread)
        call = calls[thread] = packs.Call(traced)
        try:
            result = super().forward(*args, **kwargs)
            if call.waiting:
                packs.note_misses(self, call)
            return result
        finally:
            if outer is None:
                del calls[thread]
            else:
                calls[thread] = outer

    def __setattr__(self, name: str, value: Any) -> None:
        replaced = self.__dict__["_modules"].get(name)
        super().__setattr__(name, value)
        if replaced is not None and replaced is not value and _is_served(self, name, replaced):
            leave(self)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        _forget(replica)  # its layers would be the original's
        return replica


class FusedMLP(Parent):
    """What replaces a gated MLP: a forward of one op where that computes the same."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Any = mlp.call(self, self.__dict__[packs.ROLES], args, kwargs)
        return super().forward(*args, **kwargs) if type(found) is Reason else found


_CLASSES: dict[tuple[type[Parent], type], type[Parent]] = {}


def swap(module: nn.Module, kind: type[Parent]) -> None:
    """Gives ``module`` a class of this kind."""
    module.__class__ = _in_place_of(kind, type(module))


def _in_place_of(kind: type[Parent], base: type[nn.Module]) -> type[Parent]:
    """The class that takes the place of ``base``."""
    if (kind, base) not in _CLASSES:
        rename = class_swaps.in_place_of(base, computes=kind is FusedMLP)
        ours: Any = rename(type(f"{kind.__name__}{base.__name__}", (kind, base), {}))
        ours.__reduce_ex__ = _reduce
        _CLASSES[kind, base] = ours
    return _CLASSES[kind, base]


def _reduce(self: Parent, protocol: Any) -> Any:
    found = next((which for which, ours in _CLASSES.items() if ours is type(self)), None)
    if found is None:
        raise TypeError(
            f"{type(self).__name__}: a wrapped module (FSDP) is neither copied nor pickled; use state dicts"
        )
    parts: Any = nn.Module.__reduce_ex__(self, protocol)
    return (_empty, found, *parts[2:])


def _empty(kind: type[Parent], base: type[nn.Module]) -> nn.Module:
    ours = _in_place_of(kind, base)
    return ours.__new__(ours)


def _originals() -> Mapping[type, type]:
    """The classes that ``swap`` has made, and what they stand for."""
    return {ours: base for (_, base), ours in _CLASSES.items()}


def _is_served(parent: nn.Module, name: str, layer: nn.Module) -> bool:
    roles = parent.__dict__.get(packs.ROLES)
    return packs.of_layer(layer) is not None or (roles is not None and name in roles[:3])


def leave(parent: nn.Module) -> None:
    """Takes apart what is served together in one module."""
    for pack in parent.__dict__.get(packs.PACKS, (None, ()))[1]:
        packs.detach(filter(None, pack.layers))
    _forget(parent)


def take_apart(modules: Iterable[nn.Module]) -> None:
    """``leave`` for all of these that are parents."""
    originals = _originals()
    for module in modules:
        if class_swaps.our_class(module, originals) is not None:
            leave(module)


def _forget(parent: nn.Module) -> None:
    for name in (packs.ROLES, packs.PACKS):
        parent.__dict__.pop(name, None)
    class_swaps.give_back(parent, _originals())
