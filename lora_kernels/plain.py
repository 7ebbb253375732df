"""What the ops compute with: plain tensors of four dtypes, of modules without hooks, outside of transforms."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from .reasons import Reason

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
"""Types that the ops compute with themselves. torch.export traces with fakes."""
LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that the ops compute in."""
INDICES = (torch.int64, torch.int32)
"""Dtypes of the ids of tokens, labels, tasks and adapters, and of ranks."""


def are_indices(*given: Tensor | None) -> bool:
    """Whether the dtypes are those of indices; None is none."""
    return all(index is None or index.dtype in INDICES for index in given)


def sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What sums of these are formed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def float32_products(dtype: torch.dtype) -> str | None:
    """How torch is told to form products of float32 on a GPU: "tf32" or "ieee"; None for other dtypes."""
    if dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None
        for given in args
        for t in (given if isinstance(given, list) else (given,))
    ):
        raise RuntimeError(f"{op}: {Reason.TRANSFORM} (vmap, grad, jvp) is not supported; use plain autograd")


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return _has_any_global_hook() or any(getattr(module, name) for name in hooks)


def is_parametrized(module: nn.Module) -> bool:
    """Whether torch computes some of the module's parameters (``torch.nn.utils.parametrize``)."""
    return "parametrizations" in module._modules


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a tensor that torch has spread over processes."""
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def not_plain(found: Tensor | Reason | None) -> Reason:
    """Why ``parameters.get(name, Reason.DISPLACED)`` of a module has given no tensor that the ops compute with."""
    return found if isinstance(found, Reason) else Reason.DTENSOR


def why_no_base(layer: Any) -> Reason | None:
    """Why an adapter of ours cannot share the weight and bias of a linear layer or embedding; None if it can."""
    if is_parametrized(layer):
        return Reason.PARAMETRIZED
    if "forward" in layer.__dict__:
        return Reason.INSTANCE_FORWARD
    for name in ("weight",) if isinstance(layer, nn.Embedding) else ("weight", "bias"):
        parameter: Any = layer._parameters.get(name, Reason.DISPLACED)
        if parameter is None and name == "bias":
            continue
        if type(parameter) is Tensor:  # what a wrapper computes or cuts out of its own
            return Reason.DISPLACED
        if type(parameter) not in PLAIN_TENSORS:
            return not_plain(parameter)
        if parameter.layout != torch.strided:
            return Reason.LAYOUT
        if parameter.dtype not in FLOATS:
            return Reason.DTYPE
    return None if layer._parameters["weight"].dim() == 2 else Reason.LAYOUT


def passed_by(model: nn.Module) -> set[nn.Module]:
    """The layers in ``model`` that torch's own modules never or not always call: they read the weight themselves."""
    found: set[nn.Module] = set()
    parent: Any  # of whichever class
    for parent in model.modules():
        forward = getattr(type(parent), "forward", None)  # a scripted module's class has none
        if forward is nn.MultiheadAttention.forward:
            found.add(parent.out_proj)
        elif may_take_fast_path(parent):
            found |= {parent.linear1, parent.linear2}
        elif forward is _LINEAR_CROSS_ENTROPY:
            found.add(parent.linear)
    return found


_LINEAR_CROSS_ENTROPY = getattr(getattr(nn, "LinearCrossEntropyLoss", None), "forward", nn)  # from torch 2.14 on


def may_take_fast_path(layer: Any) -> bool:
    """Whether this is an encoder layer of torch's whose calls in eval mode may be one op, on the weights of all parts.

    They are where no part has a forward hook, among others.
    """
    if getattr(type(layer), "forward", None) is not nn.TransformerEncoderLayer.forward:
        return False
    attention = layer.self_attn
    return bool(
        layer.activation_relu_or_gelu
        and getattr(attention, "batch_first", False)
        and getattr(attention, "in_proj_bias", None) is not None
        and attention.num_heads % 2 == 0
    )
