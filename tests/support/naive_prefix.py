"""prefix_kv as its definition reads, element by element of the batch, and the problems to try it on."""

from __future__ import annotations

import torch
from torch import Tensor

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LAYERS, HEADS, TOKENS, BATCH = 3, 2, 5, 3


def make(dtype=FP32, head_dim=3, layers=LAYERS, heads=HEADS, tokens=TOKENS):
    return torch.randn(tokens, layers * 2 * heads * head_dim).to(dtype)


def forward(prefix: Tensor, layers: int, heads: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values in turn, layer by layer, each [batch, heads, tokens, head_dim]."""
    per_head = prefix.tensor_split(2 * layers * heads, dim=1)
    parts = [torch.stack(per_head[i : i + heads]).to(dtype) for i in range(0, len(per_head), heads)]
    return [torch.stack([part] * batch) if batch else part.new_empty(0, *part.shape) for part in parts]


def backward(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The gradient of prefix: summed sample by sample in float32, rounded once."""
    wide = FP64 if FP64 in (grads[0].dtype, dtype) else FP32
    columns = []
    for grad in grads:
        total = torch.zeros(grad.shape[1:], dtype=wide)
        for sample in grad:
            total += sample.to(wide)
        columns += total.unbind(0)
    return torch.cat(columns, dim=1).to(dtype)


def grads_of(parts, dtype=None):
    return [torch.randn(part.shape).to(dtype or part.dtype) for part in parts]


def inside_longer(grads, text=4):
    """The gradients as concatenation with a text leaves them: rows of longer tensors."""
    longer = [
        torch.cat([g, torch.full((*g.shape[:2], text, g.shape[3]), float("nan"), dtype=g.dtype)], 2) for g in grads
    ]
    return [g[:, :, : g.shape[2] - text] for g in longer]
