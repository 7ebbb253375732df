"""What an op is: one ``OpSpec`` holds everything the package knows about it.

An op file in ``lora_kernels/ops/`` builds an ``OpSpec`` and hands it to ``dispatch.register``. From the one schema
string come the public op ``torch.ops.lora_kernels.<name>`` (what ``torch.compile`` sees) and its native twin
``torch.ops.lora_kernels_native.<name>``, which the C++ and CUDA extensions implement. ``dispatch.define_native`` adds
native ops that have no public one, for a kernel's own use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .reasons import Reason


class Verdict(NamedTuple):
    """A backend's answer to "would you serve this call?".

    ``schedule`` names the algorithm it would run; None means no, and ``reason`` says why either way.
    """

    schedule: str | None
    reason: str | Reason


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an op.

    ``supports(*args) -> Verdict`` is pure and cheap: it runs on every call.
    ``run(schedule, *args)`` computes the op's outputs, out of autocast's reach. None means that an extension does, by
    ``native(*args, schedule)``; None there is the native op of the same schema.
    """

    supports: Callable[..., Verdict]
    run: Callable[..., Any] | None = None
    native: Callable[..., Any] | None = None
    run_schedules: tuple[str | None, ...] = ()
    """What ``run`` computes, where an extension computes the other schedules."""
    explain: Callable[..., Verdict] | None = None
    """For ``lk.why``: a verdict in more detail, where ``supports`` has said yes and leaves the choice to the kernel."""


@dataclass(frozen=True)
class Autograd:
    """The gradient formula, shared by the registered op and the eager ``autograd.Function``."""

    setup_context: Callable[[Any, tuple, Any], None]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class OpSpec:
    """An op: schema, meaning (``reference``), shapes (``fake``), gradient, kernels and cost model."""

    name: str
    schema: str
    """Arguments and returns as torch's schema language writes them, without the name."""
    reference: Callable[..., Any]
    """Plain torch code with the op's exact meaning; serves any device and dtype torch serves."""
    fake: Callable[..., Any]
    """Output shapes and dtypes from input shapes and dtypes."""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    autograd: Autograd | None = None
    autocast: tuple[int, ...] = ()
    """Positions of the floating-point arguments that autocast casts, as it does for ``F.linear``; lists, too."""
    flops: Callable[..., int] | None = None
    """Multiply-adds count as two. Same arguments as the op."""
    bytes: Callable[..., int] | None = None
    """Compulsory traffic: each operand read once, each result written once."""

    @property
    def qualname(self) -> str:
        return f"lora_kernels::{self.name}"
