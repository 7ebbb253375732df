"""Wrappers: modules that hold a part of a model and put a name of their own into every name below them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

DDP, FSDP1, DEEPSPEED = "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeed"

_WRAPPERS = {
    "torch.compile": ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    "DataParallel": ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    DDP: ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    FSDP1: (
        "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module",
    ),
    "activation checkpointing": (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    "AveragedModel": ("torch.optim.swa_utils", "AveragedModel", "module"),
    "QuantWrapper": ("torch.ao.quantization.stubs", "QuantWrapper", "module"),
    DEEPSPEED: ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
}  # fmt: skip
"""Kind of wrapper -> where its class is defined, the class, and the name under which it holds what it wraps.

A wrapper is known by its class, never by that name: a model's own part may be called ``module``.
"""


def wrapper_kind(module: nn.Module) -> str | None:
    """Which kind of wrapper ``module`` is; None if it is none."""
    for kind, (home, name, _) in _WRAPPERS.items():
        # A class whose file nobody has imported has no instances.
        if isinstance(module, getattr(sys.modules.get(home), name, ())):
            return kind
    return None


def without_wrappers(module: nn.Module) -> nn.Module:
    """What ``module`` wraps, however often; ``module`` itself if it is no wrapper."""
    inner: Any = module
    while (kind := wrapper_kind(inner)) is not None:
        inner = inner._modules[_WRAPPERS[kind][2]]
    return inner


def wrapper_kinds(model: nn.Module) -> set[str]:
    """The kinds of wrappers in and around ``model``."""
    return {kind for module in model.modules() if (kind := wrapper_kind(module)) is not None}


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its wrappers, at any depth, so that its names are those that it had before it was wrapped.

    Inside the block each wrapper's place is taken by what it wraps; afterwards all are back. The modules themselves
    are the same, and what is done to them stays.
    """
    bare = without_wrappers(model)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        pending, seen = [bare], {bare}
        while pending:
            parent = pending.pop()
            for name, child in list(parent._modules.items()):
                if child is None:
                    continue
                inner = without_wrappers(child)
                if inner is not child:
                    replaced.append((parent, name, child))
                    parent._modules[name] = inner
                if inner not in seen:
                    seen.add(inner)
                    pending.append(inner)
        yield bare
    finally:
        for parent, name, wrapper in replaced:
            parent._modules[name] = wrapper


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class of ``model``, without the one that torch's ``fully_shard`` puts in front of it."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, sharded))


def check_may_grow(op: str, kinds: Collection[str]) -> None:
    """ValueError if a wrapper of one of these kinds knows only the parameters that it was made with."""
    for kind in (DDP, FSDP1, DEEPSPEED):
        if kind in kinds:
            raise ValueError(
                f"{op}: the model is wrapped in {kind}, which would not train parameters added to it now; "
                "wrap it afterwards"
            )


def mentions_wrapper(text: str, kinds: Collection[str]) -> bool:
    """Whether ``text`` has the name under which a wrapper of one of these kinds holds what it wraps."""
    return any(_WRAPPERS[kind][2] in text for kind in kinds)
