"""``prompt_embedding``: arguments are checked here, then dispatched, as in ``lora.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import eager
from ..ops import prompt_embedding as _op
from ..ops.prompt_embedding import PromptEmbeddingFunction
from ..plain import FLOATS, INDICES
from .checks import check_dense
from .why import explains

_OP = "prompt_embedding"
_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)


class PromptEmbeddingOutput(NamedTuple):
    """What a model takes: ``model(**output._asdict())``, or without ``labels`` where none were given."""

    inputs_embeds: Tensor
    """[batch, prompt rows + tokens, hidden]."""
    attention_mask: Tensor
    """[batch, prompt rows + tokens], dtype of the given mask; int64 where none was given."""
    position_ids: Tensor
    """int64 [batch, prompt rows + tokens]."""
    labels: Tensor | None
    """[batch, prompt rows + tokens], dtype of the given labels; None where none were given."""


def prompt_embedding(
    input_ids: Tensor | None,
    weight: Tensor | None,
    prompt: Tensor,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    task_ids: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    padding_side: str = "right",
) -> PromptEmbeddingOutput:
    """Token embeddings with trainable rows in front of the text, and the mask, positions and labels that go with them.

    Prompt tuning is from Lester et al., EMNLP 2021. With right padding, one task and full lengths it is equivalent to::

        batch, rows = input_ids.shape[0], prompt.shape[0]
        embeds = torch.cat([prompt.to(weight.dtype).expand(batch, -1, -1), F.embedding(input_ids, weight)], dim=1)
        mask = torch.cat([attention_mask.new_ones(batch, rows), attention_mask], dim=1)
        labels = torch.cat([labels.new_full((batch, rows), -100), labels], dim=1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)

    but each output is written once. A sample's row is

    - right padding: [prompt, tokens, unused];
    - left padding: [unused, pads, prompt, text], where the text starts at the first non-zero entry of the mask, so that
      prompt and text touch. All tokens are pads if there is none. Pads keep their token's embedding, mask and label.

    Unused slots exist where ``prompt_lengths`` is below P: zero embedding, mask 0, label -100.

    Saved for backward are 24 bytes per sample, and the ids where ``weight`` trains. The gradient of ``prompt`` reads
    only the prompt's rows and sums over the batch in float32 (float64 for float64) in the order of the samples: it is
    bitwise reproducible, whatever the number of threads, and so is the (dense) gradient of ``weight``.

    Args:
        input_ids: [batch, tokens], int64 or int32. Any strides, as for all arguments. None with ``inputs_embeds``.
        weight: the embedding table [vocabulary, hidden]; float32, bfloat16, float16 or float64. Not looked at with
            ``inputs_embeds``.
        prompt: [P, hidden], or [tasks, P, hidden] with ``task_ids``; any of these dtypes, cast in registers.
        inputs_embeds: [batch, tokens, hidden], instead of ``input_ids``.
        attention_mask: [batch, tokens], non-zero where a token is real; bool, an integer or a floating-point dtype,
            which is kept. None means that all tokens are real.
        labels: [batch, tokens], int64 or int32.
        task_ids: [batch], int64 or int32: the row of ``prompt`` for each sample.
        prompt_lengths: [batch], int64 or int32, in [0, P]: a sample takes the first rows of its prompt. None means P.
        padding_side: "right" or "left".

    Returns:
        PromptEmbeddingOutput (inputs_embeds, attention_mask, position_ids, labels) of [batch, P + tokens, ...].
        inputs_embeds has the dtype of ``weight``, or of the given ``inputs_embeds``. position_ids counts the non-zero
        entries of the mask: their running sum minus 1, at least 0.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has a dtype that does not fit.
        ValueError: shapes, devices or padding_side do not fit, or, on the CPU, an id, task or length is out of range.
            On a GPU an id or task out of range gives rows of NaN, and a length is clamped; or the kernel stops, if the
            environment has ``LORA_KERNELS_DEVICE_ASSERT=1`` (CUDA) or ``TRITON_DEBUG=1`` (Triton).
    """
    args = arguments(
        input_ids, weight, prompt, inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels,
        task_ids=task_ids, prompt_lengths=prompt_lengths, padding_side=padding_side,
    )  # fmt: skip
    output = eager.call(_op.SPEC, PromptEmbeddingFunction, args)
    embeds, mask, positions, out_labels, *_ = output
    return PromptEmbeddingOutput(embeds, mask, positions, None if labels is None else out_labels)


@explains(_OP, _op.SPEC, example=lambda zeros: (zeros(4, 128, dtype=torch.int64), zeros(1536, 576), zeros(16, 576)))
def arguments(
    input_ids: Any, weight: Any, prompt: Any, *, inputs_embeds: Any = None, attention_mask: Any = None,
    labels: Any = None, task_ids: Any = None, prompt_lengths: Any = None, padding_side: str = "right",
) -> tuple:  # fmt: skip
    """The op's positional arguments from those of ``prompt_embedding``, checked."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"{_OP}: exactly one of input_ids and inputs_embeds must be given, got {given}")
    if padding_side not in ("left", "right"):
        raise ValueError(f'{_OP}: padding_side must be "left" or "right", got {padding_side!r}')
    _check_prompt(prompt, task_ids)
    hidden, device = prompt.shape[-1], prompt.device

    if inputs_embeds is not None:
        weight = None
        _check_tensor("inputs_embeds", inputs_embeds, FLOATS, device)
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden:
            expected = f"[batch, tokens, {hidden}] to fit prompt {tuple(prompt.shape)}"
            raise ValueError(f"{_OP}: inputs_embeds must be {expected}, got shape {tuple(inputs_embeds.shape)}")
        shape = inputs_embeds.shape[:2]
    else:
        _check_tensor("input_ids", input_ids, INDICES, device)
        if input_ids.dim() != 2:
            raise ValueError(f"{_OP}: input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
        _check_tensor("weight", weight, FLOATS, device)
        if weight.dim() != 2 or weight.shape[1] != hidden:
            expected = f"[vocabulary, {hidden}] to fit prompt {tuple(prompt.shape)}"
            raise ValueError(f"{_OP}: weight must be {expected}, got shape {tuple(weight.shape)}")
        shape = input_ids.shape

    for name, t, dtypes, size in (
        ("attention_mask", attention_mask, _MASKS, shape),
        ("labels", labels, INDICES, shape),
        ("task_ids", task_ids, INDICES, shape[:1]),
        ("prompt_lengths", prompt_lengths, INDICES, shape[:1]),
    ):
        if t is None:
            continue
        _check_tensor(name, t, dtypes, device)
        if t.shape != size:
            raise ValueError(f"{_OP}: {name} must be {list(size)} to fit the tokens, got shape {tuple(t.shape)}")
    return (
        prompt, input_ids, weight, inputs_embeds, attention_mask, labels, task_ids, prompt_lengths,
        padding_side == "left",
    )  # fmt: skip


def _check_prompt(prompt: Any, task_ids: Any) -> None:
    if not isinstance(prompt, Tensor):
        raise TypeError(f"{_OP}: prompt must be a tensor, got {type(prompt).__name__}")
    _check_tensor("prompt", prompt, FLOATS, prompt.device)
    if task_ids is None:
        if prompt.dim() != 2:
            raise ValueError(f"{_OP}: prompt must be [rows, hidden] without task_ids, got shape {tuple(prompt.shape)}")
    elif prompt.dim() != 3 or prompt.shape[0] < 1:
        raise ValueError(f"{_OP}: prompt must be [tasks, rows, hidden] with task_ids, got shape {tuple(prompt.shape)}")


def _check_tensor(name: str, t: Any, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{_OP}: {name} must be a tensor, got {type(t).__name__}")
    check_dense(_OP, name, t)
    if t.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{_OP}: {name} must have one of the dtypes {names}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{_OP}: {name} must be on {device} like prompt, got {t.device}")
