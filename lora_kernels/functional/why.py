"""``why``: which backend would serve a call of a public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import dispatch
from ..spec import OpSpec

_BINDERS: dict[str, tuple[OpSpec, Callable[..., tuple]]] = {}


def explains(function: str, spec: OpSpec) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """A decorator: what it decorates turns the arguments of a public function into those of its op."""

    def register(bind: Callable[..., tuple]) -> Callable[..., tuple]:
        _BINDERS[function] = spec, bind
        return bind

    return register


def why(op: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
    """Which backend would serve this call, and why.

    Args:
        op: name of a public function, e.g. ``"lora_linear"``.
        *args, **kwargs: what that function takes. The op does not run and no random number is drawn; a CPU product of a
            kind that the process has not met is measured.

    Returns:
        NamedTuple (backend, schedule, reason).
    """
    if op not in _BINDERS:
        raise ValueError(f"why: unknown op {op!r}, expected one of {', '.join(sorted(_BINDERS))}")
    spec, bind = _BINDERS[op]
    return dispatch.explain(spec, bind(*args, **kwargs))
