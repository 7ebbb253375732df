"""LoRA linears by others: a short autograd Function of addmm, and the kernels of projects that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""x [batch, tokens, K], weight, lora_A, lora_B, scaling -> [batch, tokens, N]; without dropout."""


class AddmmLoRA(torch.autograd.Function):
    """What a user can write in a few lines: no temporary of y's size, x and s saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:  # type: ignore[override]
        rows = x.view(-1, x.shape[-1])
        s = rows @ lora_A.t()
        y = (rows @ weight.t()).addmm_(s, lora_B.t(), alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(rows, s, weight, lora_A, lora_B)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:  # type: ignore[override]
        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        grad_s = (rows @ lora_B).mul_(ctx.scaling)
        grad_x = (rows @ weight).addmm_(grad_s, lora_A)
        grad_B = (rows.t() @ s).mul_(ctx.scaling)
        return grad_x.view(*grad_y.shape[:-1], -1), None, grad_s.t() @ x, grad_B, None


def installed(device: torch.device) -> dict[str, Linear]:
    """The peers that can be imported, by name. Theirs are GPU kernels; a CPU gets none."""
    if device.type != "cuda":
        return {}
    found: dict[str, Linear] = {}
    unsloth = _import("unsloth.kernels.fast_lora")
    if unsloth is not None:
        found["Unsloth"] = lambda x, weight, A, B, scaling: unsloth.LoRA_W.apply(x, weight, None, A, B, scaling)
    lorafusion = _import("lorafusion.ops.lora_v1")
    if lorafusion is not None:
        found["LoRAFusion"] = lorafusion.fused_linear_lora
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
