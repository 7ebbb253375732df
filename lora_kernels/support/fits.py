"""What kernels take for granted about their operands, for those that are launched from Python.

``csrc/bind/`` has the same checks for the others. The package's functions check more and say what is wrong with which
argument; the registered ops can be called without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import LAYOUTS


def check_lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None
) -> None:
    """``RuntimeError`` unless the operands of ``lora_linear`` fit together."""
    _check(x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1], "x must be [..., k] and weight [n, k]")
    _check(weight.dtype == x.dtype, "weight must have x's dtype")
    _check(bias is None or bias.shape == weight.shape[:1], "bias must be [n]")
    _check(bias is None or bias.dtype == x.dtype, "bias must have x's dtype")
    (n, k), rank = weight.shape, lora_A.shape[0] if lora_A.dim() else 0
    _check(rank >= 1 and lora_A.shape == (rank, k), "lora_A must be [rank, k], with a rank of at least 1")
    _check(lora_B.shape == (n, rank), "lora_B must be [n, rank]")
    _check(lora_B.dtype == lora_A.dtype, "lora_B must have lora_A's dtype")
    if seed is not None:
        check_seed(seed)
    _check_beside(x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, seed=seed)


def check_lora_linear_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None
) -> None:
    """``RuntimeError`` unless the operands of ``lora_linear_backward`` fit together."""
    check_lora_linear(x, weight, lora_A, lora_B, None, seed)
    _check_gradient(grad_y, x, s, weight.shape[0], lora_A.shape[0])


def check_grouped_lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, bias: Tensor | None, seed: Tensor | None
) -> None:
    """``RuntimeError`` unless the operands of ``grouped_lora_linear`` fit together."""
    _check(offsets.dim() == 1 and len(offsets) >= 1 and offsets.dtype == torch.int32, "offsets must be [groups], int32")
    groups = len(offsets)
    _check(weight.dim() == 2 or weight.shape[:-2] == (groups,), "weight must be [n, k] or [groups, n, k]")
    (n, k), rank = weight.shape[-2:], lora_A.shape[1] if lora_A.dim() == 3 else 0
    _check(x.dim() == 2 and x.shape[1] == k, "x must be [rows, k] and weight [n, k] or [groups, n, k]")
    _check(weight.dtype == x.dtype, "weight must have x's dtype")
    _check(bias is None or bias.shape in ((n,), (groups, n)), "bias must be [n] or [groups, n]")
    _check(bias is None or bias.dtype == x.dtype, "bias must have x's dtype")
    _check(
        rank >= 1 and lora_A.shape == (groups, rank, k), "lora_A must be [groups, rank, k], with a rank of at least 1"
    )
    _check(lora_B.shape == (groups, n, rank), "lora_B must be [groups, n, rank]")
    _check(lora_B.dtype == lora_A.dtype, "lora_B must have lora_A's dtype")
    if seed is not None:
        check_seed(seed)
    _check_beside(x, weight=weight, lora_A=lora_A, lora_B=lora_B, offsets=offsets, bias=bias, seed=seed)


def check_grouped_lora_linear_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """``RuntimeError`` unless the operands of ``grouped_lora_linear_backward`` fit together."""
    check_grouped_lora_linear(x, weight, lora_A, lora_B, offsets, None, seed)
    _check_gradient(grad_y, x, s, weight.shape[-2], lora_A.shape[1])


def check_lora_pack(
    x: Tensor, weights: list[Tensor], lora_As: list[Tensor], lora_Bs: list[Tensor], biases: list[Tensor],
    seed: Tensor | None, scalings: list[float], dropout_p: list[float],
) -> None:  # fmt: skip
    """``RuntimeError`` unless the operands of ``lora_pack`` fit together."""
    lists = (lora_As, lora_Bs, scalings, dropout_p)
    _check(
        len(weights) >= 1 and all(len(given) == len(weights) for given in lists),
        "weights, lora_As, lora_Bs, scalings and dropout_p must be of as many members, at least one",
    )
    _check(len(biases) in (0, len(weights)), "biases must be of no member or of each")
    for i, (weight, A, B) in enumerate(zip(weights, lora_As, lora_Bs)):
        bias = biases[i] if biases and biases[i].numel() else None
        if A.dim() == 2 and len(A) == 0:
            _check(A.shape == (0, weight.shape[1]), "lora_A must be [0, k]")
            _check(B.shape == (weight.shape[0], 0), "lora_B must be [n, 0]")
            A, B = weight[:1], weight[:, :1]  # of a rank that the check takes
        check_lora_linear(x, weight, A, B, bias, seed)


def check_lora_pack_backward(
    grad_ys: list[Tensor], x: Tensor, s: Tensor, weights: list[Tensor], lora_As: list[Tensor], lora_Bs: list[Tensor],
    seed: Tensor | None, scalings: list[float], dropout_p: list[float], need_A: list[bool], need_B: list[bool],
) -> None:  # fmt: skip
    """``RuntimeError`` unless the operands of ``lora_pack_backward`` fit together."""
    check_lora_pack(x, weights, lora_As, lora_Bs, [], seed, scalings, dropout_p)
    fits = len(grad_ys) == len(need_A) == len(need_B) == len(weights)
    _check(fits, "grad_ys, need_A and need_B must be of as many members as weights")
    lead, rank = x.shape[:-1], sum(A.shape[0] for A in lora_As)
    _check(s.shape == (lead.numel() * rank,), "s must be [rows of x times all ranks]")
    _check(s.dtype == x.dtype, "s must have x's dtype")
    for grad_y, weight in zip(grad_ys, weights):
        _check(grad_y.shape == (*lead, weight.shape[0]), "grad_y must be [..., n], with x's leading sizes")
        _check(grad_y.dtype == x.dtype, "grad_y must have x's dtype")
        _check_beside(x, grad_y=grad_y, s=s)


def check_seed(seed: Tensor) -> None:
    """``RuntimeError`` unless this is the seed of a dropout mask."""
    _check(seed.dtype == torch.int64 and seed.numel() == 1, "seed must be one int64 number")


def check_prompt_embedding(
    prompt: Tensor, input_ids: Tensor | None, weight: Tensor | None, inputs_embeds: Tensor | None,
    attention_mask: Tensor | None, labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None,
) -> None:  # fmt: skip
    """``RuntimeError`` unless the operands of ``prompt_embedding`` fit together."""
    source: Any = weight if inputs_embeds is None else inputs_embeds
    text: Any = input_ids if inputs_embeds is None else inputs_embeds
    columns, batch = text.shape[:2], text.shape[:1]
    _check(
        source.shape[-1] == prompt.shape[-1]
        and (prompt.dim() == 3) == (task_ids is not None)
        and all(t is None or t.shape == columns for t in (input_ids, attention_mask, labels))
        and all(t is None or t.shape == batch for t in (task_ids, prompt_lengths)),
        "prompt_embedding: shapes do not fit",
    )
    tensors = (input_ids, source, attention_mask, labels, task_ids, prompt_lengths)
    _check(_are_beside(prompt, *tensors), "prompt_embedding: tensors are on several devices")


def check_prompt_embedding_backward(
    grad: Tensor, layout: Tensor, input_ids: Tensor | None, task_ids: Tensor | None, prompt_rows: int, need_weight: bool
) -> None:
    """``RuntimeError`` unless the operands of ``prompt_embedding_backward`` fit together."""
    batch, tokens = grad.shape[0], grad.shape[1] - prompt_rows
    _check(
        tokens >= 0
        and layout.shape == (batch, 3)
        and (input_ids is not None or not need_weight)
        and (input_ids is None or input_ids.shape == (batch, tokens))
        and (task_ids is None or task_ids.shape == (batch,)),
        "prompt_embedding_backward: shapes do not fit",
    )
    _check(_are_beside(grad, layout, input_ids, task_ids), "prompt_embedding_backward: tensors are on several devices")


def check_prefix_kv(prefix: Tensor, layers: int, heads: int, batch: int) -> None:
    """``RuntimeError`` unless the prefix has the keys and values of so many heads."""
    fits = layers > 0 and heads > 0 and batch >= 0 and prefix.shape[1] % (2 * layers * heads) == 0
    _check(fits, "prefix_kv: shapes do not fit")


def check_prefix_kv_backward(grads: list[Tensor]) -> None:
    """``RuntimeError`` unless the gradients of all keys and values are alike."""
    first = grads[0]
    _check(
        all(g.shape == first.shape and g.dtype == first.dtype and g.device == first.device for g in grads),
        "prefix_kv_backward: the gradients differ in shape, dtype or device",
    )


def check_packed(parts: list[Tensor], layout: str, n: int, k: int, block: int) -> None:
    """``RuntimeError``, ``TypeError`` or ``ValueError`` unless these are the parts of a packed [n, k] weight."""
    LAYOUTS[layout].check(parts, n, k, block)
    _check(all(part.is_contiguous() for part in parts), "dequantize: the parts of the weight must be contiguous")
    _check(_are_beside(*parts), "dequantize: the parts of the weight are on several devices")


def check_alike(first: Tensor, *others: Tensor) -> None:
    """``RuntimeError`` unless all are of one shape and dtype, on one device."""
    _check(all(t.shape == first.shape and t.dtype == first.dtype for t in others), "tensors differ in shape or dtype")
    _check(_are_beside(first, *others), "tensors are on several devices")


def _check_gradient(grad_y: Tensor, x: Tensor, s: Tensor, n: int, rank: int) -> None:
    lead = x.shape[:-1]
    _check(grad_y.shape == (*lead, n), "grad_y must be [..., n], with x's leading sizes")
    _check(s.shape == (*lead, rank), "s must be [..., rank], with x's leading sizes")
    _check(grad_y.dtype == x.dtype and s.dtype == x.dtype, "grad_y and s must have x's dtype")
    _check_beside(x, grad_y=grad_y, s=s)


def _check(fits: bool, message: str) -> None:
    if not fits:
        raise RuntimeError(message)


def _are_beside(x: Tensor, *others: Tensor | None) -> bool:
    return all(t is None or t.device == x.device for t in others)


def _check_beside(x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        _check(t is None or t.device == x.device, f"{name} must be on x's device")
