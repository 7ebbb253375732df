"""A fused prompt beside the one that PEFT puts in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..integrations.peft import patching as integration
from ..report import PROMPT_MODULE
from .results import DIFFERS, KEPT, OK, SEED, UNCOUNTED, Check, Results, badness, max_error

_ENCODER_ULPS = 64
"""What a few layers of a prompt encoder may differ by between one batch size and another."""


def check_prompt(model: nn.Module, tokens: int) -> Check:
    """The worst of what reaches the base model with the active prompt, or why that is PEFT's."""
    reason = integration.prompt_reason(model)
    if reason is not None:
        return Check("", "", KEPT, detail=str(reason))
    with dispatch.own_stats():
        ours = _base_inputs(model, tokens)
        stats = dispatch.stats()
    if not stats["served"]:
        return Check("", "", KEPT, detail=next((reason for _, reason in stats["fallback"]), UNCOUNTED))
    with integration.original_prompts(model):
        theirs = _base_inputs(model, tokens)
    if model._left_padding_fixed:
        ours.pop("position_ids", None)  # PEFT leaves them to the base model
    op = next(iter(stats["served"]))[0]
    if ours.keys() != theirs.keys():
        return Check("", op, DIFFERS, math.inf, 0.0, f"{sorted(ours.keys() ^ theirs.keys())[0]}: only one has it")
    worst = Check("", op, OK)
    for name, expected in theirs.items():
        allowed = 0.0
        if expected.is_floating_point() and expected.numel():
            allowed = _ENCODER_ULPS * torch.finfo(expected.dtype).eps * expected.abs().max().item()
        error = max_error(ours[name], expected.double()) if expected.numel() else 0.0
        worst = max(worst, Check("", op, OK if error <= allowed else DIFFERS, error, allowed, name), key=badness)
    return worst


class _Reached(Exception):
    """Ends a call where the base model begins."""


def _base_inputs(model: Any, tokens: int) -> Results:
    """What the base model gets for two texts, and the gradients of what makes the prompt."""
    vocabulary, device = model.word_embeddings.num_embeddings, model.word_embeddings.weight.device
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary, (2, tokens), generator=generator).to(device)
    caught: dict[str, Any] = {}

    def catch(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _Reached

    config = model.active_peft_config
    extra = {"decoder_input_ids": ids} if config.num_transformer_submodules == 2 else {}
    if getattr(config, "num_tasks", None):
        extra["task_ids"] = torch.zeros(2, dtype=torch.int64, device=device)
    was_training = model.training
    handle = model.base_model.register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
    try:
        model.eval()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    except _Reached:
        pass
    finally:
        handle.remove()
        model.train(was_training)
    results = dict(_tensors(caught))
    made = [t for t in results.values() if t.requires_grad]
    if made:
        wanted = {n: p for n, p in model.named_parameters() if p.requires_grad and PROMPT_MODULE in n}
        cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in made]
        gradients = torch.autograd.grad(made, list(wanted.values()), cotangents, allow_unused=True)
        results |= {name: g for name, g in zip(wanted, gradients) if g is not None}
    return {name: t.detach() for name, t in results.items()}


def _tensors(inputs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in inputs.items():
        cache = getattr(value, "self_attention_cache", value)
        if isinstance(value, Tensor):
            yield name, value
        for i, layer in enumerate(getattr(cache, "layers", ())):
            yield from ((f"keys of layer {i}", layer.keys), (f"values of layer {i}", layer.values))
