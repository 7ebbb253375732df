"""``prompt_embedding``: trainable rows put into token embeddings, with mask, positions and labels.

Prompt tuning is from Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..plain import FLOATS, are_indices
from ..reasons import Reason
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cuda, fits, triton
from . import eager
from .eager import EagerFunction
from .prompt_embedding_backward import SPEC as BACKWARD

IGNORED_LABEL = -100

_GATHER = Verdict("gather", "tokens and prompt written in one pass")
_REFUSED_DTYPE = Verdict(None, Reason.DTYPE)

# ---------------------------------------------------------------------------------------------------- indices


def _check_range(name: str, index: Tensor | None, limit: int) -> None:
    """``ValueError`` that names the first element of ``index`` outside [0, limit)."""
    if index is None:
        return
    bad = ((index < 0) | (index >= limit)).nonzero()
    if bad.numel():
        where = bad[0].tolist()
        raise ValueError(
            f"prompt_embedding: {name}[{', '.join(map(str, where))}] is {index[tuple(where)].item()}, "
            f"expected at least 0 and less than {limit}"
        )


def _check_indices(
    prompt: Tensor, input_ids: Tensor | None, weight: Any, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
    labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None, left: bool,
) -> None:  # fmt: skip
    if input_ids is not None:
        _check_range("input_ids", input_ids, weight.shape[0])
    _check_range("task_ids", task_ids, prompt.shape[0])
    _check_range("prompt_lengths", prompt_lengths, prompt.shape[-2] + 1)


# ---------------------------------------------------------------------------------------------------- forward


def _token_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    given: Any = inputs_embeds if input_ids is None else input_ids
    batch, tokens = given.shape[:2]
    return batch, tokens


def _layout(
    prompt: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
    prompt_lengths: Tensor | None, left: bool,
) -> Tensor:  # fmt: skip
    """int64 [B, 3], one (first, split, length) per sample.

    From row ``first`` of the output on there are ``split`` tokens, ``length`` prompt rows and the other tokens; the
    rows before and behind these are zero.
    """
    batch, rows = _token_shape(input_ids, inputs_embeds)[0], prompt.shape[-2]
    length = torch.full((batch,), rows, device=prompt.device) if prompt_lengths is None else prompt_lengths.long()
    zero = torch.zeros_like(length)
    if not left:
        return torch.stack((zero, zero, length), dim=1)
    split = zero if attention_mask is None else (attention_mask != 0).long().cumsum(1).eq(0).sum(1)
    return torch.stack((rows - length, split, length), dim=1)


def _reference(
    prompt: Tensor, input_ids: Tensor | None, weight: Tensor | None, inputs_embeds: Tensor | None,
    attention_mask: Tensor | None, labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if prompt.device.type == "cpu":
        _check_indices(prompt, input_ids, weight, inputs_embeds, attention_mask, labels, task_ids, prompt_lengths, left)
    embeds = F.embedding(input_ids, weight) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
    batch, tokens, hidden = embeds.shape
    rows, device = prompt.shape[-2], prompt.device
    layout = _layout(prompt, input_ids, inputs_embeds, attention_mask, prompt_lengths, left)
    first, split, length = layout.unsqueeze(2).unbind(1)

    # Every output row is one of T tokens, P prompt rows and one zero row.
    r = torch.arange(rows + tokens, device=device) - first
    token = torch.where(r < split, r, r - length)
    index = torch.where((r >= split) & (r < split + length), tokens + r - split, token)
    index = torch.where((r < 0) | (r >= tokens + length), tokens + rows, index)

    def insert(tokens_part: Tensor, prompt_part: Tensor, unused: Any) -> Tensor:
        parts = (tokens_part, prompt_part, prompt_part.new_full((batch, 1, *prompt_part.shape[2:]), unused))
        source = torch.cat([part.to(tokens_part.dtype) for part in parts], dim=1)
        at = index.view(*index.shape, *(1,) * (source.dim() - 2)).expand(*index.shape, *source.shape[2:])
        return source.gather(1, at)

    prompts = prompt.expand(batch, rows, hidden) if task_ids is None else prompt[task_ids]
    if attention_mask is None:
        attention_mask = torch.ones((batch, tokens), dtype=torch.int64, device=device)
    mask = insert(attention_mask, attention_mask.new_ones((batch, rows)), 0)
    positions = ((mask != 0).long().cumsum(1) - 1).clamp(min=0)
    if labels is None:
        out_labels = torch.empty(0, dtype=torch.int64, device=device)
    else:
        out_labels = insert(labels, labels.new_full((batch, rows), IGNORED_LABEL), IGNORED_LABEL)
    return insert(embeds, prompts, 0), mask, positions, out_labels, layout


def _fake(
    prompt: Tensor, input_ids: Tensor | None, weight: Any, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
    labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None, left: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, tokens = _token_shape(input_ids, inputs_embeds)
    rows = prompt.shape[-2] + tokens
    embeds = weight if inputs_embeds is None else inputs_embeds
    return (
        embeds.new_empty((batch, rows, prompt.shape[-1])),
        prompt.new_empty((batch, rows), dtype=torch.int64 if attention_mask is None else attention_mask.dtype),
        prompt.new_empty((batch, rows), dtype=torch.int64),
        prompt.new_empty(0, dtype=torch.int64) if labels is None else labels.new_empty((batch, rows)),
        prompt.new_empty((batch, 3), dtype=torch.int64),
    )


def _cpu_supports(
    prompt: Tensor, input_ids: Tensor | None, weight: Any, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
    labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None, left: bool,
) -> Verdict:  # fmt: skip
    embeds = weight if inputs_embeds is None else inputs_embeds
    served = prompt.dtype in FLOATS and embeds.dtype in FLOATS
    return _GATHER if served and are_indices(input_ids, task_ids, prompt_lengths) else _REFUSED_DTYPE


def _cuda_supports(
    prompt: Tensor, input_ids: Tensor | None, weight: Any, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
    labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None, left: bool,
) -> Verdict:  # fmt: skip
    embeds = weight if inputs_embeds is None else inputs_embeds
    if not are_indices(input_ids, task_ids, prompt_lengths):
        return _REFUSED_DTYPE
    batch, tokens = _token_shape(input_ids, inputs_embeds)
    rows, hidden = prompt.shape[-2:]
    return cuda.prompt_refusal(prompt.device, embeds.dtype, prompt.dtype, batch * (rows + tokens), hidden) or _GATHER


def _run_cpu(schedule: str, *args: Any) -> tuple[Tensor, ...]:
    try:
        return _native(*args, schedule)
    except RuntimeError:
        _check_indices(*args)  # the kernel found an index out of range: this says which
        raise


def _triton_supports(
    prompt: Tensor, input_ids: Tensor | None, weight: Any, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
    labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None, left: bool,
) -> Verdict:  # fmt: skip
    embeds = weight if inputs_embeds is None else inputs_embeds
    batch, tokens = _token_shape(input_ids, inputs_embeds)
    size = batch, prompt.shape[-2] + tokens, prompt.shape[-1]
    return triton.rows_refusal(prompt.device, (prompt.dtype, embeds.dtype), *size) or _GATHER


def _triton_run(schedule: str, *args: Any) -> tuple[Tensor, ...]:
    fits.check_prompt_embedding(*args[:8])
    from ..triton_kernels import prompt_embedding

    if args[0].device.type == "cpu":
        _check_indices(*args)
    return prompt_embedding.forward(*args)


def _bytes(
    prompt: Tensor, input_ids: Tensor | None, weight: Any, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
    labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None, left: bool,
) -> int:  # fmt: skip
    batch, tokens = _token_shape(input_ids, inputs_embeds)
    rows, hidden = prompt.shape[-2:]
    embeds = weight if inputs_embeds is None else inputs_embeds
    columns = [t for t in (attention_mask, labels) if t is not None]
    per_token = sum(t.element_size() for t in columns) + (0 if input_ids is None else input_ids.element_size())
    per_row = sum(t.element_size() for t in columns) + 8 + (8 if attention_mask is None else 0)
    total = (batch * tokens + batch * (rows + tokens)) * hidden * embeds.element_size()
    return total + prompt.numel() * prompt.element_size() + batch * (tokens * per_token + (rows + tokens) * per_row)


# --------------------------------------------------------------------------------------------------- autograd

_INPUTS = 9


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    prompt, input_ids, weight, _, attention_mask, _, task_ids, prompt_lengths, left = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.tasks = prompt.shape[0] if prompt.dim() == 3 else 0
    ctx.prompt_rows, ctx.prompt_dtype = prompt.shape[-2], prompt.dtype
    ctx.vocabulary = 0 if weight is None else weight.shape[0]
    # The prompt is then in front of every sample, and the gradient of inputs_embeds is a view.
    ctx.prompt_first = prompt_lengths is None and (not left or attention_mask is None)
    ctx.save_for_backward(output[4], input_ids if ctx.needs_input_grad[2] else None, task_ids)


def _gradients(ctx: Any, grad: Tensor | None, backward: Callable[..., Any]) -> tuple:
    """Gradients of the op's inputs; ``backward`` calls the op."""
    need_prompt, _, need_weight, need_embeds, *_ = ctx.needs_input_grad
    if grad is None:
        return (None,) * _INPUTS
    layout, input_ids, task_ids = ctx.saved_tensors
    grad_prompt = grad_weight = grad_embeds = None
    if need_embeds and ctx.prompt_first:
        grad_embeds = grad.narrow(1, ctx.prompt_rows, grad.shape[1] - ctx.prompt_rows)
    needs = need_prompt, need_weight, need_embeds and not ctx.prompt_first
    if any(needs):
        grads = backward(
            grad, layout, input_ids, task_ids, ctx.tasks, ctx.prompt_rows, ctx.prompt_dtype, ctx.vocabulary, *needs
        )
        grad_prompt, grad_weight = (g if need else None for g, need in zip(grads[:2], needs[:2]))
        grad_embeds = grads[2] if needs[2] else grad_embeds
    return grad_prompt, None, grad_weight, grad_embeds, *(None,) * (_INPUTS - 4)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    return _gradients(ctx, grad, torch.ops.lora_kernels.prompt_embedding_backward.default)


SPEC = dispatch.register(
    OpSpec(
        name="prompt_embedding",
        schema=(
            "(Tensor prompt, Tensor? input_ids, Tensor? weight, Tensor? inputs_embeds, Tensor? attention_mask, "
            "Tensor? labels, Tensor? task_ids, Tensor? prompt_lengths, bool left) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports, _run_cpu),
        },
        autograd=Autograd(_setup_context, _backward),
        flops=lambda *_: 0,
        bytes=_bytes,
    )
)

_native = torch.ops.lora_kernels_native.prompt_embedding.default


class PromptEmbeddingFunction(EagerFunction):
    """``prompt_embedding`` for eager autograd: one dispatch forward, one backward.

    Saves 24 bytes per sample (where its prompt went), the task ids, and the token ids if the embedding weight trains;
    never the weight, the prompt or the output. Call it through ``lk.prompt_embedding``, which checks the arguments.
    """

    differentiable = (0, 1, 2, 3)

    @staticmethod
    def results(output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return output[:4]

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return eager.forward(ctx, SPEC, args, _setup_context)[:4]

    @staticmethod
    @eager.backward
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:  # type: ignore[override]
        return _gradients(ctx, grad, lambda *args: dispatch.run(BACKWARD, *args))
