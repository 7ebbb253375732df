"""Which of our classes a module has, and giving it back the one that it had before.

Between ``patch`` and ``unpatch`` others may have swapped a module's class in turn: torch's ``fully_shard`` gives it a
subclass made for the purpose, whose bases are its own mixin and the class that the module had.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


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


def give_back(module: nn.Module, originals: Mapping[type, type]) -> tuple[type, type] | None:
    """Puts the original in the place of our class; returns both, None where the module has none of ours."""
    ours = our_class(module, originals)
    if ours is None:
        return None
    original = originals[ours]
    module.__class__ = _with_base(type(module), ours, original)
    return ours, original


@functools.cache
def _with_base(kind: type, ours: type, original: type) -> type:
    """``kind``, made again with ``original`` for its ancestor ``ours``."""
    if kind is ours:
        return original
    bases = tuple(_with_base(base, ours, original) if issubclass(base, ours) else base for base in kind.__bases__)
    body: dict[str, Any] = {name: v for name, v in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__.replace(ours.__name__, original.__name__), bases, body)
