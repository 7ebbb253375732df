"""What interpreted kernels read and write: only memory of tensors that their launch was given.

A GPU would often show nothing of an address beyond them: what lies there is another tensor, or a page that nobody asked
for back. Fixtures that a file of tests has for all of them once it imports them, as those of ``poisoned.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from triton.runtime import interpreter

from lora_kernels.triton_kernels.launching import Launch


@pytest.fixture(autouse=True)
def memory_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An access outside of the storages of a launch's tensors fails the launch."""
    native, run = interpreter._interpreter, Launch.run
    storages: numpy.ndarray | None = None
    """Where those of the launch that runs begin and end; None for a test's own kernel."""

    def check(kind: str, pointers: numpy.ndarray, mask: numpy.ndarray, size: int) -> None:
        if storages is None:
            return
        touched = pointers[numpy.broadcast_to(mask, pointers.shape)].astype(numpy.uint64)
        before = numpy.searchsorted(storages[:, 0], touched, side="right")
        ends = numpy.concatenate([numpy.zeros(1, numpy.uint64), storages[:, 1]])[before]
        outside = touched + numpy.uint64(size) > ends
        assert not outside.any(), f"{kind} of {outside.sum()} elements outside of the launch's tensors"

    def checked_run(launch: Launch, counters: torch.Tensor | None = None) -> None:
        nonlocal storages
        spans = {
            (t.untyped_storage().data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes())
            for t in tensors_in((*launch.args, counters))
        }
        storages = numpy.array(sorted(spans), numpy.uint64).reshape(-1, 2)
        try:
            run(launch, counters)
        finally:
            storages = None

    def load(pointers: Any, mask: Any, other: Any, dtype: Any, native_load: Any = native.load) -> Any:
        check("load", pointers, mask, numpy.dtype(dtype).itemsize)
        return native_load(pointers, mask, other, dtype)

    def store(pointers: Any, value: Any, mask: Any, native_store: Any = native.store) -> Any:
        check("store", pointers, mask, value.dtype.itemsize)
        return native_store(pointers, value, mask)

    def atomic_rmw(op: Any, pointers: Any, value: Any, mask: Any, sem: Any, native_rmw: Any = native.atomic_rmw) -> Any:
        check("atomic", pointers, mask, value.dtype.itemsize)
        return native_rmw(op, pointers, value, mask, sem)

    monkeypatch.setattr(Launch, "run", checked_run)
    for name, function in (("load", load), ("store", store), ("atomic_rmw", atomic_rmw)):
        monkeypatch.setattr(native, name, function)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested tuples, and those of descriptors."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "base"):
        yield value.base
