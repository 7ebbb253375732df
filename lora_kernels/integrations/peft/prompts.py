"""What PEFT models of prompt learning share whose prompt is put in by one op (``prompt_models.py``): which calls are
served, the rows of a prompt, the keys and values of a prefix. Importing this module imports PEFT.

What PEFT does before and after the prompt is put in is done the same way here; whatever differs from the plain case
goes to PEFT's own method for the whole call, and is counted.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    PeftModel,
    PeftType,
    PrefixEncoder,
    PromptEmbedding,
    PromptEncoder,
)
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as SPECIAL_CACHES
from peft.utils.integrations import map_cache_to_layer_device_map
from torch import Tensor

from ... import dispatch
from ...functional.prefix import KeysAndValues, prefix_kv
from ...functional.prompt import PromptEmbeddingOutput, prompt_embedding
from ...modules import caches as _cache
from ...modules.prompt import all_rows, encoded_rows, plain_weight
from ...plain import FLOATS, INDICES, PLAIN_TENSORS, has_hooks, inside_transform
from ...reasons import Reason

_ENCODERS = {
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
    PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptEmbedding,
    PeftType.PREFIX_TUNING: PrefixEncoder,
}
PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)
_HYBRID_CACHES = ("gemma2", "gemma3_text", "gemma4")
"""Parts of model types whose prefix PEFT cuts to measure, layer by layer."""


# -------------------------------------------------------------------------------------------- which and why not


def adapter_reason(model: PeftModel, adapter: str) -> Reason | None:
    """Why no call with this adapter is served, whatever its inputs; None if its plain calls are."""
    config = model.peft_config[adapter]
    encoder = model.prompt_encoder[adapter]
    if type(encoder) is not _ENCODERS.get(config.peft_type):
        return Reason.LAYER_TYPE
    if config.peft_type == PeftType.PREFIX_TUNING:
        model_type = getattr(getattr(model.get_base_model(), "config", None), "model_type", "")
        special = model_type in SPECIAL_CACHES or any(name in model_type for name in _HYBRID_CACHES)
        return Reason.MODEL_CACHE if special else None
    is_multitask = config.peft_type == PeftType.MULTITASK_PROMPT_TUNING
    return Reason.ADAPTER_HOOKS if is_multitask and has_hooks(encoder) else None


def call_reason(model: PeftModel, **tensors: Tensor | None) -> Reason | None:
    """Why a call with these [batch, tokens, ...] tensors, or task_ids [batch], is not served; None if it is."""
    ids: Any = tensors.pop("input_ids")
    embeds = tensors.pop("inputs_embeds")
    text = ids if embeds is None else embeds
    task_ids = tensors.pop("task_ids")
    given = [t for t in (text, task_ids, *tensors.values()) if t is not None]
    if text is None or any(type(t) not in PLAIN_TENSORS for t in given):
        return Reason.DTENSOR
    weight = model.word_embeddings.weight
    if any(t.device != text.device for t in (*given, weight)):
        return Reason.DEVICES
    table = weight if embeds is None else embeds
    if table.dtype not in FLOATS or (embeds is None and ids.dtype not in INDICES):
        return Reason.DTYPE
    if text.dim() != (2 if embeds is None else 3) or any(
        t is not None and t.shape != text.shape[:2] for t in tensors.values()
    ):
        return Reason.LAYOUT
    labels = tensors.get("labels")
    if labels is not None and labels.dtype not in INDICES:
        return Reason.DTYPE
    is_multitask = model.active_peft_config.peft_type == PeftType.MULTITASK_PROMPT_TUNING
    if is_multitask and (task_ids is None or task_ids.shape != text.shape[:1] or task_ids.dtype not in INDICES):
        return Reason.TASK_IDS
    return Reason.TRANSFORM if inside_transform() else None


# ------------------------------------------------------------------------------------------------ what they share


class FusedPrompts(PeftModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixed into a class of ``PeftModel``: prompts by ``prompt_embedding``, prefixes by ``prefix_kv``."""

    _left_padding_fixed = False
    """Set on an instance by ``patch(model, left_padding="fixed")``."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's, which leaves bound methods on the instance: they would outlive this class in ``unpatch``."""
        ours = type(self)  # until someone calls unpatch inside
        try:
            with super().disable_adapter():
                yield
        finally:
            drop_own_methods(self, ours)

    def get_prompt(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """PEFT's method; a prefix is computed once for the batch, and is the cache without being copied into it."""
        config = self.active_peft_config
        if config.peft_type != PeftType.PREFIX_TUNING:
            return super().get_prompt(batch_size, *args, **kwargs)
        pairs = self._keys_and_values(batch_size)
        if isinstance(pairs, Reason):
            count("prefix_kv", pairs)
            return super().get_prompt(batch_size, *args, **kwargs)
        if config.num_transformer_submodules == 2:
            # PEFT deals the keys and values out in fours, twice round; of each four, the decoder attends to two.
            pairs = tuple(pairs[2 * layer % len(pairs)] for layer in range(len(pairs)))
            cache = _cache.encoder_decoder_cache(pairs)
        else:
            cache = _cache.dynamic_cache(pairs)
        map_cache_to_layer_device_map(self.get_base_model(), cache)
        return cache

    def _keys_and_values(self, batch_size: int) -> KeysAndValues | Reason:
        """Of the active prefix, or why PEFT must make them."""
        reason = adapter_reason(self, self.active_adapter)
        if reason is not None:
            return reason
        if inside_transform():
            return Reason.TRANSFORM
        rows = self._rows(self.prompt_encoder[self.active_adapter])
        if type(rows) not in PLAIN_TENSORS:
            return Reason.DTENSOR
        dtype = self.base_model_torch_dtype or rows.dtype
        if rows.dtype not in FLOATS or dtype not in FLOATS:
            return Reason.DTYPE
        config = self.active_peft_config
        return prefix_kv(rows, config.num_layers, config.num_attention_heads, batch_size=batch_size, dtype=dtype)

    def _rows(self, encoder: Any) -> Tensor:
        """What the encoder makes of all of its tokens, once: [tokens, width]."""
        if self.active_peft_config.inference_mode:
            return encoder.embedding.weight
        if has_hooks(encoder):
            tokens = self.prompt_tokens[self.active_adapter].to(encoder.embedding.weight.device)
            if type(encoder) is PrefixEncoder:
                tokens = tokens[: self.active_peft_config.num_virtual_tokens]
            return encoder(tokens.unsqueeze(0))[0]
        if type(encoder) is PromptEncoder:
            return encoded_rows(encoder)
        rows = all_rows(encoder.embedding)
        return encoder.transform(rows) if type(encoder) is PrefixEncoder and encoder.prefix_projection else rows

    def _prompt(self, batch_size: int, task_ids: Any, of_decoder: bool = False) -> tuple[Tensor, Tensor | None]:
        """``prompt`` and ``task_ids`` of the op; a decoder's prompt comes behind the encoder's."""
        config = self.active_peft_config
        encoder = self.prompt_encoder[self.active_adapter]
        first = config.num_virtual_tokens if of_decoder else 0
        part = slice(first, first + config.num_virtual_tokens)
        if config.peft_type != PeftType.MULTITASK_PROMPT_TUNING:
            return self._rows(encoder)[part], None
        rows, columns = all_rows(encoder.embedding)[part], encoder.prefix_task_cols[:, part]
        factors = encoder.prefix_task_rows
        if len(columns) > batch_size:  # those of the batch only
            columns, factors = columns[task_ids], factors[task_ids]
            task_ids = torch.arange(batch_size, device=task_ids.device)
        return rows * (columns @ factors), task_ids

    def _fuse(
        self, *, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None,
        task_ids: Tensor | None, labels: Tensor | None = None,
    ) -> PromptEmbeddingOutput | None:  # fmt: skip
        """The text with the prompt in front; None, counted, where PEFT must do it."""
        reason = adapter_reason(self, self.active_adapter) or call_reason(
            self, input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels,
            task_ids=task_ids,
        )  # fmt: skip
        if reason is not None:
            self._decline(reason)
            return None
        weight = plain_weight(self.word_embeddings) if inputs_embeds is None else None
        if inputs_embeds is None and weight is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if inputs_embeds is not None:
            input_ids = None
        text: Any = input_ids if inputs_embeds is None else inputs_embeds
        batch_size = text.shape[0]
        prompt, task_ids = self._prompt(batch_size, task_ids)
        return prompt_embedding(
            input_ids, weight, prompt, inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels,
            task_ids=task_ids, padding_side="left" if self._left_padding_fixed else "right",
        )  # fmt: skip

    def _decline(self, reason: Reason) -> None:
        """PEFT's own code serves the call, unless its layout is not wanted."""
        if self._left_padding_fixed:
            raise RuntimeError(f'patch(left_padding="fixed"): PEFT would use its own layout for this call: {reason}')
        count("prompt_embedding", reason)

    def _place(self, kwargs: dict[str, Any], fused: PromptEmbeddingOutput, has_mask: bool) -> None:
        """Embeddings, mask and, in the fixed layout, positions, as the base model takes them."""
        kwargs["inputs_embeds"] = fused.inputs_embeds
        kwargs["attention_mask"] = fused.attention_mask if has_mask else None
        if self._left_padding_fixed and self._takes_positions():
            kwargs["position_ids"] = fused.position_ids

    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.get_base_model().forward).parameters


def output_options(output_attentions: Any, output_hidden_states: Any, return_dict: Any) -> dict[str, Any]:
    """What the caller wants back, for the base model as for PEFT's forward."""
    return {
        "output_attentions": output_attentions,
        "output_hidden_states": output_hidden_states,
        "return_dict": return_dict,
    }


def count(op: str, reason: Reason) -> None:
    """Records that PEFT's own code serves a call."""
    if not torch.compiler.is_compiling():  # a counter in traced code would recompile on every call
        dispatch.count_fallback(op, reason)


def ignore(kwargs: dict[str, Any], *names: str) -> None:
    """Drops arguments that make no sense once a prompt is in front, as PEFT does."""
    for name in names:
        if kwargs.get(name) is not None:
            warnings.warn(f"{name} does not count the prompt and is ignored", stacklevel=3)
            kwargs[name] = None


def inserted(column: Tensor, mask: Tensor | None, rows: int, value: int, behind_pads: bool) -> Tensor:
    """[batch, tokens] -> [batch, rows + tokens]: ``value`` for the prompt, in front or behind the pads on the left."""
    if mask is None or not behind_pads:
        return torch.nn.functional.pad(column, (rows, 0), value=value)
    pads = (mask != 0).long().cumsum(1).eq(0).sum(1, keepdim=True)
    at = torch.arange(rows + mask.shape[1], device=mask.device).expand(mask.shape[0], -1)
    longer = column.gather(1, torch.where(at < pads, at, at - rows).clamp(min=0))
    return longer.masked_fill((at >= pads) & (at < pads + rows), value)


def own_methods(model: PeftModel, *also: type) -> list[str]:
    """Names under which the instance keeps what its class, or one of ``also``, has anyway."""
    kinds = [base for kind in (type(model), *also) for base in kind.__mro__]
    return [
        name
        for name, value in model.__dict__.items()
        if isinstance(value, MethodType)
        and value.__self__ is model
        and any(value.__func__ is vars(kind).get(name) for kind in kinds)
    ]


def drop_own_methods(model: PeftModel, *also: type) -> None:
    """``disable_adapter`` of PEFT leaves such methods behind, which would hide those of another class."""
    for name in own_methods(model, *also):
        del model.__dict__[name]
