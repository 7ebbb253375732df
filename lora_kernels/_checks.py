"""Argument checks that several public functions share."""

from __future__ import annotations

import torch
from torch import Tensor

from .reasons import Reason


def refuse_transforms(op: str, args: tuple) -> None:
    """vmap and forward-mode AD have no rule: say so, instead of failing inside torch."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{op}: {Reason.TRANSFORM} (vmap, grad, jvp) is not supported; use plain autograd")
    if torch.autograd.forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in args
    ):
        raise RuntimeError(f"{op}: {Reason.TRANSFORM} (vmap, grad, jvp) is not supported; use plain autograd")
