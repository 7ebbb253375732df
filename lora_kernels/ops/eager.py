"""The route of an op in eager mode, from a public function's checked arguments to a backend and back through autograd.

A call with gradients goes through a hand-written ``autograd.Function``, the cheapest way; a call without goes straight
to the backend; under ``torch.compile`` both are the registered op. A Function adds to this what it saves and how its
gradients are formed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..plain import refuse_transforms
from ..spec import OpSpec
from ..support import cuda


class EagerFunction(torch.autograd.Function):
    """What the Functions of the ops are made of."""

    differentiable: ClassVar[tuple[int, ...]]
    """Positions of the arguments that may require grad, tensors or lists of them; a tensor may be None."""

    @classmethod
    def on(cls, args: tuple) -> Any:
        """The Function's results for the op's arguments."""
        return cls.apply(*args)

    @staticmethod
    def results(output: Any) -> Any:
        """What the public function takes from the op's output."""
        return output


def call(spec: OpSpec, function: type[EagerFunction], args: tuple, *, inference: OpSpec | None = None) -> Any:
    """``function.results`` of the op, whatever autograd, autocast and the compiler make of the call.

    Args:
        args: the op's, checked.
        inference: what serves a call without gradients, where that is not ``spec``.
    """
    if is_compiling():
        return function.results(getattr(torch.ops.lora_kernels, spec.name).default(*args))
    refuse_transforms(spec.name, args)
    if spec.autocast and dispatch.any_autocast():
        device = args[0].device.type
        if dispatch.autocast_enabled(device):
            args = dispatch.autocast_args(spec, device, args)
    return run(function, args, inference or spec)


def run(function: type[EagerFunction], args: tuple, inference: OpSpec) -> Any:
    """``call`` where nobody compiles, transforms or casts."""
    if torch.is_grad_enabled():
        for i in function.differentiable:
            t = args[i]
            if t is not None and (any_requires_grad(t) if type(t) is list else t.requires_grad):
                return function.on(args)
    return function.results(dispatch.run(inference, *args))


def any_requires_grad(tensors: list[Tensor]) -> bool:
    """Whether one of them does."""
    for t in tensors:  # noqa: SIM110 - felt in a small layer, as a generator's start is
        if t.requires_grad:
            return True
    return False


def forward(ctx: Any, spec: OpSpec, args: tuple, save: Callable[[Any, tuple, Any], None]) -> Any:
    """A Function's forward up to its results: the op's output, saved by ``save(ctx, args, output)``."""
    output = dispatch.run(spec, *args)
    save(ctx, args, output)
    keep_what_was_asked(ctx)
    return output


def keep_what_was_asked(ctx: Any) -> None:
    """For ``backward``: the backend and the schedule that a Function's forward was asked to take, and who counts it."""
    ctx.forced_backend = dispatch.forced_backend()
    ctx.cuda_schedule = cuda.asked_schedule()
    ctx.counters = dispatch.own_counters()


def backward(gradients: Callable[..., tuple]) -> Callable[..., tuple]:
    """A decorator for a Function's backward ``(ctx, *grads)``: once differentiable, and by the backend and the schedule
    that the forward was asked to take, counted where that was. Backward may run in another thread, or after
    ``with use_backend(...)`` has ended.
    """

    @functools.wraps(gradients)
    def as_forward_was(ctx: Any, *grads: Tensor | None) -> tuple:
        if ctx.forced_backend is None and ctx.cuda_schedule is None and ctx.counters is None:
            return gradients(ctx, *grads)
        with contextlib.ExitStack() as asked:
            if ctx.forced_backend is not None:
                asked.enter_context(dispatch.use_backend(ctx.forced_backend))
            if ctx.cuda_schedule is not None:
                asked.enter_context(cuda.use_schedule(ctx.cuda_schedule))
            if ctx.counters is not None:
                asked.enter_context(dispatch.own_stats(ctx.counters))
            return gradients(ctx, *grads)

    return torch.autograd.function.once_differentiable(as_forward_was)


def not_a_view(y: Tensor) -> Tensor:
    """The same memory as a tensor of its own: autograd forbids in-place changes of a view that a Function returns."""
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


def as_rows(t: Tensor) -> Tensor:
    """[..., columns] as [rows, columns]; torch's ``reshape(-1, columns)`` cannot tell the rows of no columns."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])
