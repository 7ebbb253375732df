"""Our classes in the place of others' classes: their names, which of them a module has, and giving the other back.

PEFT, transformers and accelerate tell classes apart by name, and people read names in ``repr``, warnings and
``get_layer_status``. So a swapped-in class goes by the name of the one that it replaces; ``lk.is_fused`` and the
reports say which layers are fused.

Between ``patch`` and ``unpatch`` others may have swapped a module's class in turn: torch's ``fully_shard`` gives it a
subclass made for the purpose, whose bases are its own mixin and the class that the module had.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any

from torch import nn

_SWAPPED_IN: set[type] = set()


def in_place_of(original: type, *, computes: bool = True) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """A decorator for a class of modules that is swapped in for ``original``: from then on it goes by its name.

    Args:
        computes: whether its forward does, and not only its layers' forwards, so that ``swapped_in`` tells of it.
    """

    def rename(ours: type[nn.Module]) -> type[nn.Module]:
        home = ours.__module__, ours.__qualname__

        def reduce(self: nn.Module, protocol: Any) -> Any:
            # Pickle finds a class by its name, which is the other's now; so it is told where to look.
            parts = super(ours, self).__reduce_ex__(protocol)
            return (_empty, home, *parts[2:]) if type(self) is ours else parts

        ours.__reduce_ex__ = reduce  # type: ignore[method-assign, assignment]
        ours.__name__, ours.__qualname__, ours.__module__ = (
            original.__name__, original.__qualname__, original.__module__,
        )  # fmt: skip
        if computes:
            _SWAPPED_IN.add(ours)
        return ours

    return rename


def _empty(module: str, name: str) -> nn.Module:
    kind = getattr(importlib.import_module(module), name)
    return kind.__new__(kind)


def swapped_in(module: nn.Module) -> type | None:
    """Which of the classes that go by another's name the module has; None if it has none."""
    return our_class(module, _SWAPPED_IN)


def our_class(module: nn.Module, ours: Collection[type]) -> type | None:
    """Which of ``ours`` the module has, be it under what ``fully_shard`` made of it; None if it has none.

    A subclass that somebody wrote is theirs.
    """
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for kind in type(module).__mro__:
        if kind in ours:
            return kind
        if not issubclass(kind, sharded):
            return None
    return None


def give_back(module: nn.Module, originals: Mapping[Any, type]) -> tuple[type[Any], type[Any]] | None:
    """Puts the original in the place of our class; returns both, None where the module has none of ours."""
    ours: Any = our_class(module, originals)
    if ours is None:
        return None
    original: Any = originals[ours]
    kind: Any = type(module)
    module.__class__ = _with_base(kind, ours, original)
    for name, value in list(module.__dict__.items()):
        # Hooks of accelerate and transformers keep the method that they wrap on the instance.
        if getattr(value, "__func__", None) is ours.forward:
            module.__dict__[name] = MethodType(original.forward, module)
    return ours, original


@functools.cache
def _with_base(kind: Any, ours: Any, original: Any) -> Any:
    """The class ``kind``, made again with ``original`` for its ancestor ``ours``."""
    if kind is ours:
        return original
    bases = tuple(_with_base(base, ours, original) if issubclass(base, ours) else base for base in kind.__bases__)
    body: dict[str, Any] = {name: v for name, v in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__.replace(ours.__name__, original.__name__), bases, body)
