"""``why``: which backend would serve a call of a public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import dispatch
from ..formats import QuantizedWeight
from ..spec import OpSpec

_BINDERS: dict[tuple[str, bool], tuple[OpSpec, Callable[..., tuple]]] = {}

Zeros = Callable[..., Tensor]
"""``zeros(*shape)``: floating point, on some device; ``zeros(*shape, dtype=torch.int64)``."""
Example = Callable[[Zeros], tuple]

_EXAMPLES: dict[str, Example] = {}


def explains(
    function: str, spec: OpSpec, *, is_packed: bool = False, example: Example | None = None
) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """A decorator: what it decorates turns the arguments of a public function into those of its op, which is another
    one where the weight is quantised (``is_packed``).

    Args:
        example: arguments of a call of some hundred rows, for ``examples``; None where another function's would do.
    """

    def register(bind: Callable[..., tuple]) -> Callable[..., tuple]:
        _BINDERS[function, is_packed] = spec, bind
        if example is not None:
            _EXAMPLES[function] = example
        return bind

    return register


def examples() -> dict[str, Example]:
    """By public function, what makes arguments for it: to ask ``why`` without a model."""
    return dict(_EXAMPLES)


def why(op: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
    """Which backend would serve this call, and why.

    Args:
        op: name of a public function, e.g. ``"lora_linear"``.
        *args, **kwargs: what that function takes. The op does not run and no random number is drawn; a CPU product of a
            kind that the process has not met is measured.

    Returns:
        NamedTuple (backend, schedule, reason).

    Raises:
        ValueError: no such function, or none over a quantised weight; otherwise as the function itself.
        TypeError: as the function itself.
        RuntimeError: ``use_backend`` asks for a backend that cannot serve the call.
    """
    key = op, any(isinstance(given, QuantizedWeight) for given in (*args, *kwargs.values()))
    if key not in _BINDERS:
        known = sorted(name for name, is_packed in _BINDERS if is_packed == key[1])
        of_what = "op over a quantised weight" if key[1] else "op"
        raise ValueError(f"why: unknown {of_what} {op!r}, expected one of {', '.join(known)}")
    spec, bind = _BINDERS[key]
    return dispatch.explain(spec, bind(*args, **kwargs))
