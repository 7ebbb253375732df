"""``verify``: does every fused layer of a model compute what the layer that it replaced computes, and does it train?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from .. import dispatch
from ..integrations.loss import FusedLoss
from ..integrations.peft import patching as integration
from ..report import PROMPT_MODULE
from .layers import check_layer
from .prompts import check_prompt
from .results import KEPT, RAISED, Check, Verification

__all__ = ["Check", "Verification", "verify"]


def verify(model: nn.Module, rows: int = 8) -> Verification:
    """Runs every fused layer of ``model`` and its original on the same random rows, forward and backward.

    Each layer is copied, the copies run alone: the original's in float64, which is taken for exact, the original's with
    its adapters in the base's dtype, and ours. Our error, of the output and of each gradient (x's and those of the
    parameters that require grad), may be twice the original's plus four ulp. Where lora_B is zero, as at the start,
    the copies get a random one, or nothing of the adapter would be seen; the same goes for an embedding's lora_A.
    Dropout is off, and then, where there is one adapter on a linear layer, on, with our mask given to the original.
    Of a prompt, what reaches the base model is compared, and the gradients of what makes it. ``model``, its
    gradients, random generators and ``lk.stats()`` are left as they were.

    Args:
        model: a patched PEFT model, or one with ``LoRALinear``, ``LoRAEmbedding`` or ``FrozenLinear`` layers.
        rows: rows of x per layer, at least 1; a batch of so many tokens for prompts.

    Returns:
        A row per layer that is fused, or that PEFT keeps.

    Raises:
        ValueError: ``rows`` is not positive, or the model has nothing to verify.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"verify: rows must be a positive int, got {rows!r}")
    found = Verification()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), dispatch.own_stats(), torch.enable_grad():
        for name, module in integration.prompt_models(model):
            found.checks.append(_guarded(f"{name}.{PROMPT_MODULE}".lstrip("."), module, check_prompt, rows))
        layers = dict(integration.tuner_layers(model))
        of_fused: set[nn.Module] = set()
        for name, module in model.named_modules():
            if PROMPT_MODULE in module._modules or isinstance(module, FusedLoss) or module in of_fused:
                continue
            if integration.is_fused(module):
                of_fused.update(module.modules())
                found.checks.append(_guarded(name, module, check_layer, rows))
            elif name in layers:
                reason = integration.why_not_swapped(module) or "not patched"
                found.checks.append(Check(name, "", KEPT, detail=str(reason), trains=_trains(module)))
    if not found.checks:
        raise ValueError(f"verify: {type(model).__name__} holds no fused layer and no PEFT layer; call lk.patch first")
    return found


def _guarded(name: str, module: nn.Module, check: Callable[[nn.Module, int], Check], rows: int) -> Check:
    """What ``check`` says, under the module's name; what it raises is a verdict."""
    try:
        found = check(module, rows)
    except Exception as error:  # whatever goes wrong in one layer, the others are worth a look
        found = Check("", "", RAISED, detail=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return replace(found, name=name, trains=_trains(module))


def _trains(module: nn.Module) -> bool:
    """True for modules without an adapter, too."""
    adapter = [p for n, p in module.named_parameters() if "lora_" in n or PROMPT_MODULE in n]
    return not adapter or any(p.requires_grad for p in adapter)
