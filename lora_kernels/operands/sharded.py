"""Tensor-parallel layers: what ``lora_linear_of_shards`` needs from one, besides x.

Known are the two ways in which PEFT has LoRA on sharded linear layers: base and lora_B column-parallel, lora_A whole;
or base and lora_A row-parallel, lora_B whole. The weights are DTensors, and who made them so says how a module is
called: transformers (``tp_plan``) by a forward on the instance, torch (``parallelize_module``) by two hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..plain import PLAIN_TENSORS, is_dtensor
from ..reasons import Reason
from .adapters import active_adapters, dropout_probability, usual_scaling, why_not_called_as_is

_TRANSFORMERS = "transformers.distributed.tensor_parallel"
_TORCH_STYLES = "torch.distributed.tensor.parallel.style"
_TORCH_HOOKS = "torch.distributed.tensor._api"
_DISPLACED = Reason.DISPLACED


class Shards(NamedTuple):
    """One process's part of a layer."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout_p: float
    training: bool
    by_rows: bool
    group: Any
    """The processes over which the layer is spread."""


class _Split(NamedTuple):
    """How a module's call goes over to shards and back."""

    by_rows: bool
    mesh: Any


def sharded_operands(layer: Any) -> Shards | Reason:
    """What ``layer``, whose base weight is no plain tensor, gives to a call on shards, or why it runs its own
    forward.
    """
    name: Any = active_adapters(layer.__dict__, "lora_A")
    if type(name) is Reason:
        return name
    children = layer.__dict__["_modules"]
    base = children["base_layer"]
    split = _split_of(base)
    if split is None:
        return Reason.DTENSOR
    if type(name) is not str:
        return Reason.SHARDING
    if name not in children["lora_A"]._modules:
        return Reason.NO_ACTIVE_ADAPTER
    if name in layer.lora_variant:
        return Reason.VARIANT
    A, B, dropout = (children[of]._modules[name] for of in ("lora_A", "lora_B", "lora_dropout"))
    if type(A) is not nn.Linear or type(B) is not nn.Linear or A._parameters.get("bias", _DISPLACED) is not None:
        return Reason.ADAPTER_MODULES
    if B._parameters.get("bias", _DISPLACED) is not None:
        return Reason.LORA_BIAS
    spread, whole = (A, B) if split.by_rows else (B, A)
    if _split_of(spread) != split:
        return Reason.SHARDING
    p: Any = dropout_probability(dropout)
    scaling: Any = usual_scaling(layer.scaling[name])
    for found in (p, scaling, why_not_called_as_is(whole, dropout)):
        if type(found) is Reason:
            return found

    dimension = 1 if split.by_rows else 0
    of_whole: Any = whole._parameters.get("weight")
    of_spread, weight = (_shard(module, "weight", split.mesh, dimension) for module in (spread, base))
    bias = None
    if base._parameters.get("bias", _DISPLACED) is not None:
        bias = _shard(base, "bias", split.mesh, None if split.by_rows else 0)
        if bias is None:
            return Reason.SHARDING
    if weight is None or of_spread is None or type(of_whole) not in PLAIN_TENSORS:
        return Reason.SHARDING
    if weight.requires_grad:
        return Reason.BASE_REQUIRES_GRAD
    lora_A, lora_B = (of_spread, of_whole) if split.by_rows else (of_whole, of_spread)
    return Shards(weight, lora_A, lora_B, bias, scaling, p, dropout.training, split.by_rows, split.mesh.get_group())


def _shard(module: nn.Module, name: str, mesh: Any, dimension: int | None) -> Tensor | None:
    """This process's part of a parameter that is cut evenly along ``dimension``, or whole everywhere for None; None if
    it is not.
    """
    parameter: Any = module._parameters.get(name)
    if not is_dtensor(parameter) or parameter.is_meta or parameter.device_mesh != mesh:
        return None
    (placement,) = parameter.placements
    if dimension is None:
        fits = placement.is_replicate()
    else:
        is_cut = type(placement).__name__ == "Shard" and placement.dim % parameter.dim() == dimension
        fits = is_cut and parameter.shape[dimension] % mesh.size() == 0
    local = parameter.to_local() if fits else None
    return local if type(local) in PLAIN_TENSORS else None


# ------------------------------------------------------------------------------------------- how a module is called


def _split_of(module: Any) -> _Split | None:
    """Which of the two ways the calls of a linear layer take; None if they do anything else."""
    if type(module) is not nn.Linear or module._backward_hooks or module._backward_pre_hooks:
        return None
    if "forward" in module.__dict__:
        return None if module._forward_hooks or module._forward_pre_hooks else _by_transformers(module)
    return _by_torch(module)


def _by_transformers(module: Any) -> _Split | None:
    """A closure over the module, its own forward, the mesh and one of transformers' styles."""
    forward = module.__dict__["forward"]
    if getattr(forward, "__module__", None) != _TRANSFORMERS:
        return None
    inside = _closure(forward)
    style: Any = inside.get("self")
    original, mesh = inside.get("original_forward"), inside.get("mesh")
    if getattr(original, "__func__", None) is not nn.Linear.forward or getattr(original, "__self__", 0) is not module:
        return None
    if type(style).__module__ != _TRANSFORMERS or getattr(mesh, "ndim", 0) != 1:
        return None
    return _usual(type(style).__name__, style.input_layouts, style.output_layouts, style.use_local_output, mesh)


def _by_torch(module: Any) -> _Split | None:
    """A hook before and a hook after, each a closure over the mesh and what a style of torch's does there."""
    before, after = list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())
    if len(before) != 1 or len(after) != 1:
        return None
    if any(getattr(hook, "__module__", None) != _TORCH_HOOKS for hook in (*before, *after)):
        return None
    enters, leaves = _closure(before[0]), _closure(after[0])
    prepare_input, prepare_output = enters.get("input_fn"), leaves.get("output_fn")
    mesh = enters.get("device_mesh")
    if not isinstance(prepare_input, functools.partial) or not isinstance(prepare_output, functools.partial):
        return None
    if getattr(mesh, "ndim", 0) != 1 or leaves.get("device_mesh") != mesh:
        return None
    kind, _, what = prepare_input.func.__qualname__.partition(".")
    if prepare_input.func.__module__ != _TORCH_STYLES or what != "_prepare_input_fn":
        return None
    if (
        prepare_output.func.__module__ != _TORCH_STYLES
        or prepare_output.func.__qualname__ != f"{kind}._prepare_output_fn"
    ):
        return None
    ((given,), (wanted,)), ((output,), is_local) = prepare_input.args, prepare_output.args
    return _usual(kind, given, output, is_local, mesh) if given == wanted else None


def _usual(style: str, given: Any, output: Any, is_local: bool, mesh: Any) -> _Split | None:
    """The way of a style with the layouts that it has by default: no other communication than that of its product."""
    whole, spread = (output, given) if style == "RowwiseParallel" else (given, output)
    if style not in ("ColwiseParallel", "RowwiseParallel") or not is_local:
        return None
    is_last = type(spread).__name__ == "Shard" and spread.dim == -1
    return _Split(style == "RowwiseParallel", mesh) if is_last and whole.is_replicate() else None


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function has from around it, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return {} if code is None or cells is None else {name: c.cell_contents for name, c in zip(code.co_freevars, cells)}
