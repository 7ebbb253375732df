"""Merging PEFT's adapters into a weight that is spread over processes, one factor of whose update is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ...plain import is_dtensor


def is_on_shards(layer: Any) -> bool:
    """Whether merging plain LoRA into this layer adds to a DTensor."""
    return is_dtensor(getattr(layer.get_base_layer(), "weight", None)) and not layer.lora_variant


@contextmanager
def spread_factors(layer: Any, adapter: str) -> Iterator[None]:
    """Inside, the factors of a DTensor's update are DTensors, too, so that torch multiplies them: each process its
    shards, without communication. PEFT leaves the factor plain that every process has, and its merge raises.
    """
    plain: list[tuple[nn.Module, nn.Parameter]] = []
    if is_on_shards(layer):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = layer.get_base_layer().weight.device_mesh
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            own = factor.weight
            if not is_dtensor(own):
                plain.append((factor, own))
                copies = DTensor.from_local(own.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
                factor._parameters["weight"] = nn.Parameter(copies, requires_grad=False)
    try:
        yield
    finally:
        for factor, own in plain:
            factor._parameters["weight"] = own


@torch.no_grad()
def check_finite(layer: Any, adapter_names: list[str] | None) -> None:
    """What PEFT's ``safe_merge`` asks first. PEFT then gives the sum to ``weight.data``, which a DTensor does not take.

    Raises:
        ValueError: the sum with an adapter is not finite, in whichever process; in all of them, and nothing is merged.
    """
    weight = layer.get_base_layer().weight
    for name in check_adapters_to_merge(layer, adapter_names):
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name)
            is_finite = torch.isfinite(weight.to_local()).all().int()
            for dimension in range(weight.device_mesh.ndim):
                dist.all_reduce(is_finite, dist.ReduceOp.MIN, group=weight.device_mesh.get_group(dimension))
            if not is_finite:
                raise ValueError(f"merge: the merged weight would not be finite; the adapter {name} seems to be broken")
