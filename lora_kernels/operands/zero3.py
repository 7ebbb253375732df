"""Layers under DeepSpeed's ZeRO-3, which cuts every parameter over the processes and, by hooks on a module, makes the
module's own parameters whole around its forward and its backward.

A fused layer reads the parameters of parts that it does not call, so their hooks do not run. What DeepSpeed has for
this are "external parameters": named to it once, they are made whole with those of the module that reads them.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_OFFLOAD = "deepspeed.runtime.zero.parameter_offload"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")


def is_whole_for_caller(module: nn.Module) -> bool:
    """Whether the hooks of ``module`` are only ZeRO-3's, and DeepSpeed keeps its parameters whole until the forward
    that is running, which is not the module's own, has ended, and again for the backward of it.
    """
    reader = _reader()
    if reader is None or not _only_gathers(module):
        return False
    of_reader = reader.__dict__.get("_external_params", {})
    return all(id(p) in of_reader and _is_whole(p) for p in module.parameters())


def gather_parts(layer: Any) -> bool:
    """Names the parameters of a running layer's plain base and active adapters to DeepSpeed, and gathers them now.

    Every process of a ZeRO-3 group must call this alike, as it must call the layer.

    Returns:
        Whether anything has changed: False for layers that ZeRO-3 has no part in, or whose parts it gathers already.
    """
    if _reader() is not layer or type(layer.base_layer) is not nn.Linear:
        return False
    names = layer.active_adapters
    parts = [layer.base_layer]
    parts += [layer._modules[of]._modules[name] for of in _PARTS for name in names if name in getattr(layer, of, ())]
    parameters = [p for part in parts for p in part.parameters()]
    known = layer._external_params
    new = [p for p in parameters if id(p) not in known]
    if not new or not all(_only_gathers(part) for part in parts) or not all(hasattr(p, "ds_status") for p in new):
        return False
    deepspeed: Any = sys.modules["deepspeed"]
    for parameter in new:
        deepspeed.zero.register_external_parameter(layer, parameter)
        if parameter.ds_status.name == "NOT_AVAILABLE":
            parameter.all_gather()
    return True


def _reader() -> Any:
    """The innermost module whose forward is running under ZeRO-3, if any is."""
    running = getattr(sys.modules.get(_OFFLOAD), "FWD_MODULE_STACK", None)
    return running[-1] if running else None


def _only_gathers(module: nn.Module) -> bool:
    hooks = (hook for kind in _HOOKS for hook in getattr(module, kind).values())
    return all(str(getattr(hook, "__module__", "")).startswith("deepspeed.") for hook in hooks)


def _is_whole(parameter: Any) -> bool:
    return getattr(getattr(parameter, "ds_status", None), "name", None) == "AVAILABLE"
