"""prompt_embedding as its definition reads, one sample and one column at a time, and the problems to try it on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import lora_kernels as lk

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
UNUSED = ("unused", 0)


class Problem(NamedTuple):
    """Arguments of ``lk.prompt_embedding`` without padding_side."""

    input_ids: Tensor | None
    weight: Tensor | None
    prompt: Tensor
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    task_ids: Tensor | None = None
    prompt_lengths: Tensor | None = None

    def keywords(self) -> dict:
        return dict(list(self._asdict().items())[3:])


def task_of(p: Problem, b: int) -> int:
    return 0 if p.task_ids is None else int(p.task_ids[b])


def columns(p: Problem, b: int, padding_side: str) -> list[tuple[str, int]]:
    """What each output column of sample b is: ("token", t), ("prompt", row) or UNUSED."""
    tokens = (p.input_ids if p.inputs_embeds is None else p.inputs_embeds).shape[1]
    rows = p.prompt.shape[-2]
    length = rows if p.prompt_lengths is None else int(p.prompt_lengths[b])
    prompt = [("prompt", j) for j in range(length)]
    text = [("token", t) for t in range(tokens)]
    unused = [UNUSED] * (rows - length)
    if padding_side == "right":
        return prompt + text + unused
    real = [True] * tokens if p.attention_mask is None else [bool(m) for m in p.attention_mask[b]]
    first = real.index(True) if any(real) else tokens
    return unused + text[:first] + prompt + text[first:]


def forward(p: Problem, padding_side: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(inputs_embeds, attention_mask, position_ids, labels)."""
    source = p.weight if p.inputs_embeds is None else p.inputs_embeds
    batch, tokens = (p.input_ids if p.inputs_embeds is None else p.inputs_embeds).shape[:2]
    rows = p.prompt.shape[-2] + tokens
    mask_dtype = torch.int64 if p.attention_mask is None else p.attention_mask.dtype
    embeds = torch.zeros(batch, rows, p.prompt.shape[-1], dtype=source.dtype)
    mask, positions = torch.zeros(batch, rows, dtype=mask_dtype), torch.zeros(batch, rows, dtype=torch.int64)
    labels = None if p.labels is None else torch.full((batch, rows), -100, dtype=p.labels.dtype)
    for b in range(batch):
        prompt = p.prompt if p.task_ids is None else p.prompt[task_of(p, b)]
        real = 0
        for r, (kind, i) in enumerate(columns(p, b, padding_side)):
            if kind == "token":
                embeds[b, r] = p.inputs_embeds[b, i] if p.weight is None else p.weight[p.input_ids[b, i]]
                mask[b, r] = 1 if p.attention_mask is None else p.attention_mask[b, i]
                if labels is not None:
                    labels[b, r] = p.labels[b, i]
            elif kind == "prompt":
                embeds[b, r] = prompt[i].to(source.dtype)
                mask[b, r] = 1
            real += bool(mask[b, r])
            positions[b, r] = max(real - 1, 0)
    return embeds, mask, positions, labels


def backward(p: Problem, padding_side: str, grad: Tensor) -> dict[str, Tensor]:
    """Gradients of prompt, weight and inputs_embeds: summed sample by sample in float32, rounded once."""
    wide = torch.float64 if torch.float64 in (grad.dtype, p.prompt.dtype) else torch.float32
    tasks = 1 if p.task_ids is None else p.prompt.shape[0]
    prompt = torch.zeros((tasks, *p.prompt.shape[-2:]), dtype=wide)
    tokens = None if p.inputs_embeds is None else torch.zeros_like(p.inputs_embeds)
    weight = None
    if p.weight is not None:
        weight = torch.zeros(p.weight.shape, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
    for b in range(grad.shape[0]):
        for r, (kind, i) in enumerate(columns(p, b, padding_side)):
            if kind == "prompt":
                prompt[task_of(p, b), i] += grad[b, r].to(wide)
            elif kind == "token" and weight is not None:
                weight[p.input_ids[b, i]] += grad[b, r].to(weight.dtype)
            elif kind == "token":
                tokens[b, i] = grad[b, r]
    gradients = {"prompt": prompt.view(p.prompt.shape).to(p.prompt.dtype)}
    if weight is not None:
        gradients["weight"] = weight.to(grad.dtype)
    if tokens is not None:
        gradients["inputs_embeds"] = tokens
    return gradients


# --------------------------------------------------------------------------------------------------- problems

BATCH, TOKENS, ROWS, HIDDEN, VOCABULARY, TASKS = 4, 5, 3, 11, 17, 3
# Left and right pads, a hole in the text, and no real token at all.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
LENGTHS = torch.tensor([3, 1, 0, 2])


def make(
    source=torch.int64, dtype=FP32, prompt_dtype=FP32, mask=None, labels=False, tasks=False, ragged=False, hidden=HIDDEN
):
    """``source`` is the dtype of the ids, or "embeds"."""
    index = torch.int64 if source == torch.int32 else torch.int32
    prompt = torch.randn(*((TASKS,) if tasks else ()), ROWS, hidden).to(prompt_dtype)
    by_ids = source != "embeds"
    return Problem(
        torch.randint(VOCABULARY, (BATCH, TOKENS)).to(source) if by_ids else None,
        torch.randn(VOCABULARY, hidden).to(dtype) if by_ids else None,
        prompt,
        None if by_ids else torch.randn(BATCH, TOKENS, hidden).to(dtype),
        None if mask is None else MASK.to(mask),
        torch.randint(VOCABULARY, (BATCH, TOKENS)) if labels else None,
        torch.tensor([2, 0, 2, 2]).to(index) if tasks else None,
        LENGTHS.to(index) if ragged else None,
    )


def call(problem, padding_side="right", **changes):
    problem = problem._replace(**changes)
    return lk.prompt_embedding(*problem[:3], **problem.keywords(), padding_side=padding_side)


def trainable(problem):
    """The same with gradients wanted wherever there can be some."""
    wanted = ("weight", "prompt", "inputs_embeds")
    fresh = {name: getattr(problem, name) for name in wanted}
    fresh = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in fresh.items()}
    return problem._replace(**fresh), {name: t for name, t in fresh.items() if t is not None}
