"""Checks that several public functions share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from .reasons import Reason

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
"""Types that the ops compute with themselves. torch.export traces with fakes."""


def inside_transform() -> bool:
    """Whether vmap, grad or forward-mode AD is at work, for which the ops have no rules."""
    if is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def refuse_transforms(op: str, args: tuple) -> None:
    """vmap and forward-mode AD have no rule: say so, instead of failing inside torch."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{op}: {Reason.TRANSFORM} (vmap, grad, jvp) is not supported; use plain autograd")
    if forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args
    ):
        raise RuntimeError(f"{op}: {Reason.TRANSFORM} (vmap, grad, jvp) is not supported; use plain autograd")


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return _has_any_global_hook() or any(getattr(module, name) for name in hooks)
