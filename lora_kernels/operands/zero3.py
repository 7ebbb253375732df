"""Layers under DeepSpeed's ZeRO-3, which cuts every parameter over the processes: hooks make those of a module whole
around its forward and its backward.

A fused layer reads the parameters of parts that it does not call, whose hooks then do not run. For this DeepSpeed has
"external parameters": once named to it, they are made whole with those of the module that reads them, by its hooks.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.compiler import is_compiling

_ZERO3 = "deepspeed.runtime.zero.parameter_offload"
_TIMED = "deepspeed.utils.nvtx"
"""Where the wrapper is that some hooks are in."""
_PARTS = ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")


def is_whole_for_reader(module: nn.Module) -> bool:
    """Whether the hooks on ``module`` are ZeRO-3's, and its parameters are whole now and in backward, because they are
    external ones of the module that is running.
    """
    reader = reader_under_zero3()
    if reader is None or not _is_only_gathered(module):
        return False
    external = reader.__dict__.get("_external_params", {})
    return all(id(parameter) in external and _status(parameter) == "AVAILABLE" for parameter in module.parameters())


def gather_parts(layer: Any) -> bool:
    """Makes the parameters of ``layer``'s base and active adapters external ones of it, and whole now.

    To be called by every process, in the layer's forward.

    Returns:
        Whether anything was done, so that the layer may be asked for its operands again.
    """
    if reader_under_zero3() is not layer or not has_gathered_parts(layer):
        return False
    known = layer._external_params
    new: list[Any] = [p for part in _parts(layer) for p in part.parameters() if id(p) not in known]
    if any(_status(parameter) == "INFLIGHT" for parameter in new):
        return False  # on its way to a part, whose call is in DeepSpeed's plan of the step
    deepspeed: Any = sys.modules["deepspeed"]
    for parameter in new:
        deepspeed.zero.register_external_parameter(layer, parameter)
        if _status(parameter) == "NOT_AVAILABLE":
            parameter.all_gather()
    return bool(new)


def has_gathered_parts(layer: Any) -> bool:
    """Whether ``gather_parts`` is for this layer: of PEFT's, over a plain base, with ZeRO-3's hooks and no others."""
    if _ZERO3 not in sys.modules or type(layer.base_layer) is not nn.Linear:
        return False
    parts = _parts(layer)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    return all(map(_is_only_gathered, parts)) and None not in map(_status, parameters)


def reader_under_zero3() -> Any:
    """The innermost module whose forward is running under ZeRO-3, if any is."""
    zero3: Any = None if is_compiling() else sys.modules.get(_ZERO3)
    return zero3.FWD_MODULE_STACK[-1] if zero3 is not None and zero3.FWD_MODULE_STACK else None


def _parts(layer: Any) -> list[nn.Module]:
    """The modules that PEFT's forward calls."""
    of_adapters = [layer._modules[of] for of in _PARTS if of in layer._modules]
    adapters = [part[name] for part in of_adapters for name in layer.active_adapters if name in part]
    return [layer.base_layer, *adapters]


def _is_only_gathered(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if not all(_home(hook) == _ZERO3 for hook in hooks):
        return False
    return not module._backward_hooks and not module._backward_pre_hooks


def _home(hook: Any) -> str | None:
    """The module in which a hook was written."""
    home: str | None = getattr(hook, "__module__", None)
    if home != _TIMED:
        return home
    wrapped = [cell.cell_contents for cell in hook.__closure__ or () if callable(cell.cell_contents)]
    return getattr(wrapped[0], "__module__", None) if len(wrapped) == 1 else home


def _status(parameter: Any) -> str | None:
    """Whether a parameter is whole in this process; None if ZeRO-3 has not cut it."""
    status = getattr(parameter, "ds_status", None)
    return None if status is None else status.name
