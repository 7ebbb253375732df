"""Triton's interpreter without what it does again and again: half of the time of a test in it.

It patches Triton's language at every call of a function on the device, by walking all its members, although a launch
has them patched for all functions of a module once it has called one. And it makes a table of all dtypes to look one
up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """For the rest of the process."""
    patch, launch, look_up = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched: set[int] = set()
    """Whose globals the running launch has met."""
    known: dict[str, Any] = {}

    def patch_once(function: Callable[..., Any]) -> Any:
        """What undoes it; None where nothing was done, which only a launch would undo."""
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # the last launch has undone it
        launch(executor, *args, **kwargs)

    def look_up_once(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, look_up_once
    interpreter.GridExecutor.__call__ = launch_anew
