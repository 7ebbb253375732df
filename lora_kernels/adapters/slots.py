"""Where a model keeps a tensor: in its own memory, in accelerate's map of offloaded weights, in shards, or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..plain import is_dtensor


def slots_of(model: nn.Module) -> Slots:
    """The slots of ``model``, whose sharded parts are put into the state in which a write lasts."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in model.modules():
        if isinstance(module, sharded):
            module.reshard()  # until then the parameters may be gathered copies
    return Slots(dict(model.named_modules(remove_duplicate=False)))


class Slots:
    """The tensors of a model by name. ``modules``: its modules by name, the model itself under ""."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules

    def __iter__(self) -> Iterator[str]:
        """Names of all parameters and saved buffers."""
        for prefix, module in self.modules.items():
            kept = [name for name, p in module._parameters.items() if p is not None]
            kept += [
                n for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set
            ]
            yield from (f"{prefix}.{name}" if prefix else name for name in kept)

    def __getitem__(self, name: str) -> Slot:
        prefix, _, attribute = name.rpartition(".")
        return Slot(name, attribute, self.modules[prefix], self)

    def enclosing(self, name: str) -> Iterator[tuple[nn.Module, str]]:
        """The modules around a tensor from the inside out, each with the tensor's name in it."""
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            yield self.modules[".".join(parts[:end])], ".".join(parts[end:])

    def replace(self, old: Tensor, new: nn.Parameter) -> None:
        """``new`` for the parameter ``old`` wherever the model has it."""
        for module in self.modules.values():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new


@dataclass(frozen=True)
class Slot:
    """One tensor's place: the attribute of ``module`` that the forward reads."""

    name: str
    attribute: str
    module: nn.Module
    model: Slots

    @property
    def tensor(self) -> Any:
        """The tensor, plain or not, that stands in the module; its values may be elsewhere."""
        return getattr(self.module, self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's."""
        tensor = self.tensor
        return tuple(getattr(tensor, "ds_shape", tensor.shape))

    def misfit(self, *, writing: bool) -> str | None:
        """Why the values cannot be read, or replaced such that they stay so; None if they can."""
        tensor = self.tensor
        if nn.parameter.is_lazy(tensor):
            return "has no size yet; run the model once"
        if hasattr(tensor, "ds_id") and tuple(tensor.shape) != self.shape:
            return (
                "is partitioned by DeepSpeed ZeRO-3; call this inside deepspeed.zero.GatheredParameters(parameters, "
                "modifier_rank=0)"
            )
        if not self._is_plain():
            return f"is a {type(tensor).__name__}, which is not understood"
        if not self._owned():
            computed = self.attribute in getattr(self.module, "parametrizations", ()) or any(
                name.startswith(f"{self.attribute}_") for name in self.module._parameters
            )
            if not computed:
                return (
                    "is not a parameter of its layer, as under FullyShardedDataParallel; call this inside "
                    "FullyShardedDataParallel.summon_full_params"
                )
            if writing:
                return "is computed from other parameters (pruned or parametrized); make it plain first"
        offloaded = self._offloaded()
        if writing and offloaded is not None and offloaded.memory is None:
            return f"is offloaded to a {type(offloaded.weights).__name__}, whose entries cannot be replaced"
        if tensor.is_meta and offloaded is None and not writing:
            return "is on the meta device and has no values"
        return None

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy of the whole tensor on the CPU. For shards every process of their mesh must call this."""
        tensor, offloaded = self.tensor, self._offloaded()
        if tensor.is_meta and offloaded is not None:
            tensor = offloaded.read()
        elif is_dtensor(tensor):
            tensor = tensor.full_tensor()
        return tensor.detach().to("cpu", copy=True).contiguous()

    @torch.no_grad()
    def prepare(self, value: Tensor) -> Tensor:
        """``value`` in the slot's dtype, on its device and with its sharding: all that can fail of a write."""
        tensor = self.tensor
        if is_dtensor(tensor):
            from torch.distributed.tensor import distribute_tensor

            # Each process has read the whole value, so nobody needs to send any.
            local = value.to(tensor.device_mesh.device_type, tensor.dtype)
            return distribute_tensor(local, tensor.device_mesh, tensor.placements, src_data_rank=None)
        if not tensor.is_meta:
            return value.to(tensor.device, tensor.dtype)
        device = torch.device("cpu") if self._offloaded() is not None else self._device_around()
        return value.to(device, tensor.dtype)

    def write(self, prepared: Tensor) -> None:
        """Puts what ``prepare`` returned in the place of the values. A parameter with memory stays the same object."""
        tensor, offloaded = self.tensor, self._offloaded()
        if offloaded is not None:
            offloaded.write(prepared)
        if not tensor.is_meta:
            with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                tensor.copy_(prepared)
        elif offloaded is None:
            self.model.replace(tensor, nn.Parameter(prepared.clone(), requires_grad=tensor.requires_grad))

    def _is_plain(self) -> bool:
        kind = type(self.tensor)
        dispatches = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
        return not dispatches or is_dtensor(self.tensor)

    def _owned(self) -> bool:
        return self.attribute in self.module._parameters or self.attribute in self.module._buffers

    def _device_around(self) -> torch.device:
        """The device of the nearest values: an adapter's base layer's, as a rule."""
        for module, _ in self.model.enclosing(self.name):
            for parameter in module.parameters():
                if not parameter.is_meta:
                    return parameter.device
        return torch.device("cpu")

    def _offloaded(self) -> _Offloaded | None:
        """The entry of the hook that brings the values in for a forward, if there is one."""
        for module, name in self.model.enclosing(self.name):
            hook = getattr(module, "_hf_hook", None)
            for each in getattr(hook, "hooks", (hook,)):
                weights = getattr(each, "weights_map", None)
                if getattr(each, "offload", False) and weights is not None and name in weights:
                    return _Offloaded(weights, name)
        return None


@dataclass(frozen=True)
class Part:
    """One entry along the first dimension of a slot's tensor, in a slot's place: an adapter in a pool of them."""

    slot: Slot
    index: int

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slot.shape[1:]

    def misfit(self, *, writing: bool) -> str | None:
        return self.slot.misfit(writing=writing)

    def read(self) -> Tensor:
        return self.slot.read()[self.index].clone()

    @torch.no_grad()
    def prepare(self, value: Tensor) -> Tensor:
        """The whole tensor, with ``value`` in its place."""
        whole = self.slot.read()
        whole[self.index] = value.to(whole)
        return self.slot.prepare(whole)

    def write(self, prepared: Tensor) -> None:
        self.slot.write(prepared)


class _Offloaded:
    """An entry of a weights map of accelerate's: a dict, or a dict in front of files, behind prefixes."""

    def __init__(self, weights: Any, key: str) -> None:
        while hasattr(weights, "prefix"):
            weights, key = weights.dataset, weights.prefix + key
        self.weights, self.key = weights, key
        memory = getattr(weights, "state_dict", weights)  # what a loader of files has in memory comes before them
        self.memory: Any = memory if isinstance(memory, MutableMapping) else None

    def read(self) -> Tensor:
        return self.weights[self.key]

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        if self.key in self.memory:
            self.memory[self.key].copy_(value)  # in place: tied weights are told by their memory
        else:
            self.memory[self.key] = value.clone()
