"""PEFT models of prompt learning, with the prompt put in by one op. Importing this module imports PEFT.

The class of the ``PeftModel`` is swapped for one below. What PEFT does before and after the prompt is put in is done
the same way here; whatever differs from the plain case goes to PEFT's own method for the whole call, and is counted.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
    PrefixEncoder,
    PromptEmbedding,
    PromptEncoder,
)
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from peft.utils import shift_tokens_right
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as SPECIAL_CACHES
from peft.utils.integrations import map_cache_to_layer_device_map
from torch import Tensor, nn
from torch.autograd import forward_ad as _forward_ad
from transformers import Cache

from ... import class_swaps, dispatch
from ...functional.prefix import KeysAndValues, prefix_kv
from ...functional.prompt import PromptEmbeddingOutput, prompt_embedding
from ...modules import caches as _cache
from ...modules.prompt import all_rows, encoded_rows, plain_weight
from ...ops.prompt_embedding import FLOATS, INDICES
from ...plain import has_hooks
from ...reasons import Reason

_ENCODERS = {
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
    PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptEmbedding,
    PeftType.PREFIX_TUNING: PrefixEncoder,
}
_PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)
_HYBRID_CACHES = ("gemma2", "gemma3_text", "gemma4")
"""Parts of model types whose prefix PEFT cuts to measure, layer by layer."""
_PLAIN_TENSORS = (Tensor, nn.Parameter)

original_setup_prompt_encoder = PeftModel._setup_prompt_encoder
"""What ``PeftModel`` had when ``patch_peft`` was called last."""


# -------------------------------------------------------------------------------------------- which and why not


def model_reason(model: PeftModel) -> Reason | None:
    """Why the calls of a model would not reach ours if its class were swapped; None if they would, or do."""
    if class_swaps.our_class(model, PLAIN) is not None:
        return None
    if type(model) not in FUSED:
        return Reason.LAYER_TYPE
    is_replaced = "forward" in model.__dict__ and "forward" not in _own_methods(model)
    return Reason.INSTANCE_FORWARD if is_replaced else None


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


def _call_reason(model: PeftModel, **tensors: Tensor | None) -> Reason | None:
    """Why a call with these [batch, tokens, ...] tensors, or task_ids [batch], is not served; None if it is."""
    ids, embeds = tensors.pop("input_ids"), tensors.pop("inputs_embeds")
    text = ids if embeds is None else embeds
    task_ids = tensors.pop("task_ids")
    given = [t for t in (text, task_ids, *tensors.values()) if t is not None]
    if text is None or any(type(t) not in _PLAIN_TENSORS for t in given):
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
    return _transform_reason()


def _transform_reason() -> Reason | None:
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or _forward_ad._current_level >= 0:
        return Reason.TRANSFORM
    return None


# ------------------------------------------------------------------------------------------------ what they share


class _FusedPrompts:
    """Mixed into a class of ``PeftModel``: prompts by ``prompt_embedding``, prefixes by ``prefix_kv``."""

    _left_padding_fixed = False
    """Set on an instance by ``patch(model, left_padding="fixed")``."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's, which leaves bound methods on the instance: they would outlive this class in ``unpatch``."""
        try:
            with super().disable_adapter():
                yield
        finally:
            _drop_own_methods(self)

    def get_prompt(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """PEFT's method; a prefix is computed once for the batch, and is the cache without being copied into it."""
        config = self.active_peft_config
        if config.peft_type != PeftType.PREFIX_TUNING:
            return super().get_prompt(batch_size, *args, **kwargs)
        pairs = self._keys_and_values(batch_size)
        if isinstance(pairs, Reason):
            _count("prefix_kv", pairs)
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
        reason = adapter_reason(self, self.active_adapter) or _transform_reason()
        if reason is not None:
            return reason
        rows = self._rows(self.prompt_encoder[self.active_adapter])
        if type(rows) not in _PLAIN_TENSORS:
            return Reason.DTENSOR
        dtype = self.base_model_torch_dtype or rows.dtype
        if rows.dtype not in FLOATS or dtype not in FLOATS:
            return Reason.DTYPE
        config = self.active_peft_config
        return prefix_kv(rows, config.num_layers, config.num_attention_heads, batch_size=batch_size, dtype=dtype)

    def _rows(self, encoder: nn.Module) -> Tensor:
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

    def _prompt(
        self, batch_size: int, task_ids: Tensor | None, of_decoder: bool = False
    ) -> tuple[Tensor, Tensor | None]:
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
        reason = adapter_reason(self, self.active_adapter) or _call_reason(
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
        batch_size = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]
        prompt, task_ids = self._prompt(batch_size, task_ids)
        return prompt_embedding(
            input_ids, weight, prompt, inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels,
            task_ids=task_ids, padding_side="left" if self._left_padding_fixed else "right",
        )  # fmt: skip

    def _decline(self, reason: Reason) -> None:
        """PEFT's own code serves the call, unless its layout is not wanted."""
        if self._left_padding_fixed:
            raise RuntimeError(f'patch(left_padding="fixed"): PEFT would use its own layout for this call: {reason}')
        _count("prompt_embedding", reason)

    def _place(self, kwargs: dict[str, Any], fused: PromptEmbeddingOutput, has_mask: bool) -> None:
        """Embeddings, mask and, in the fixed layout, positions, as the base model takes them."""
        kwargs["inputs_embeds"] = fused.inputs_embeds
        kwargs["attention_mask"] = fused.attention_mask if has_mask else None
        if self._left_padding_fixed and self._takes_positions():
            kwargs["position_ids"] = fused.position_ids

    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.get_base_model().forward).parameters


def _output_options(output_attentions: Any, output_hidden_states: Any, return_dict: Any) -> dict[str, Any]:
    """What the caller wants back, for the base model as for PEFT's forward."""
    return {
        "output_attentions": output_attentions,
        "output_hidden_states": output_hidden_states,
        "return_dict": return_dict,
    }


def _count(op: str, reason: Reason) -> None:
    if not torch.compiler.is_compiling():  # a counter in traced code would recompile on every call
        dispatch.count_fallback(op, reason)


def _ignore(kwargs: dict[str, Any], *names: str) -> None:
    """Drops arguments that make no sense once a prompt is in front, as PEFT does."""
    for name in names:
        if kwargs.get(name) is not None:
            warnings.warn(f"{name} does not count the prompt and is ignored", stacklevel=3)
            kwargs[name] = None


def _inserted(column: Tensor, mask: Tensor | None, rows: int, value: int, behind_pads: bool) -> Tensor:
    """[batch, tokens] -> [batch, rows + tokens]: ``value`` for the prompt, in front or behind the pads on the left."""
    if mask is None or not behind_pads:
        return torch.nn.functional.pad(column, (rows, 0), value=value)
    pads = (mask != 0).long().cumsum(1).eq(0).sum(1, keepdim=True)
    at = torch.arange(rows + mask.shape[1], device=mask.device).expand(mask.shape[0], -1)
    longer = column.gather(1, torch.where(at < pads, at, at - rows).clamp(min=0))
    return longer.masked_fill((at >= pads) & (at < pads + rows), value)


# ------------------------------------------------------------------------------------------------- the models


class FusedCausalLM(_FusedPrompts, PeftModelForCausalLM):
    """``PeftModelForCausalLM`` with fused prompts."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        outputs = _output_options(output_attentions, output_hidden_states, return_dict)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        fused = None
        if self.active_peft_config.peft_type in _PROMPTS:
            fused = self._fuse(**text, labels=labels, task_ids=task_ids)
        if fused is None:
            return super().forward(**text, labels=labels, task_ids=task_ids, **outputs, **kwargs)
        _ignore(kwargs, "position_ids", "token_type_ids")
        self._place(kwargs, fused, attention_mask is not None)
        return self.base_model(labels=fused.labels, **outputs, **kwargs)

    def prepare_inputs_for_generation(self, *args, task_ids=None, **kwargs):
        if self.active_peft_config.peft_type in _PROMPTS:
            if self._left_padding_fixed:
                return self._fixed_inputs(args, task_ids, kwargs)
            # Where PEFT looks for the cache. transformers that calls it `cache` lets PEFT put the prompt in at every
            # step: PEFT's own layout, which this class keeps.
            if _is_empty(kwargs.get("past_key_values")):
                inputs = self._first_inputs(self.base_model_prepare_inputs_for_generation(*args, **kwargs), task_ids)
                if inputs is not None:
                    return inputs
        return super().prepare_inputs_for_generation(*args, task_ids=task_ids, **kwargs)

    def _first_inputs(self, inputs: dict[str, Any], task_ids: Tensor | None) -> dict[str, Any] | None:
        """Of the step that fills the cache; None where PEFT must do it."""
        mask = inputs.get("attention_mask")
        fused = self._fuse(
            input_ids=inputs.get("input_ids"), inputs_embeds=None, attention_mask=mask, task_ids=task_ids
        )
        if fused is None:
            return None
        inputs.pop("position_ids", None)  # transformers' own, which do not count the prompt
        inputs.pop("cache_position", None)
        _ignore(inputs, "token_type_ids")
        inputs["input_ids"] = None
        self._place(inputs, fused, mask is not None)
        return inputs

    def _fixed_inputs(self, args: tuple, task_ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Of any step: [pads, prompt, text], and positions that count prompt and text."""
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("cache", inputs.get("past_key_values"))
        if _is_empty(cache):
            return self._first_inputs(inputs, task_ids)
        for name in ("position_ids", "cache_position", "token_type_ids"):
            inputs.pop(name, None)
        ids = inputs["input_ids"]
        if cache.get_seq_length() >= ids.shape[1]:
            ids = inputs["input_ids"] = ids[:, -1:]
        mask = inputs.get("attention_mask")
        if mask is not None:
            mask = inputs["attention_mask"] = _inserted(mask, mask, self.active_peft_config.num_virtual_tokens, 1, True)
            if self._takes_positions():
                inputs["position_ids"] = ((mask != 0).long().cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        return inputs


def _is_empty(cache: Any) -> bool:
    return cache is None or (isinstance(cache, Cache) and not cache.get_seq_length())


class _FusedClassification(_FusedPrompts):
    """What the classification models share: labels are not of the tokens that the prompt comes in front of."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        outputs = _output_options(output_attentions, output_hidden_states, return_dict)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        fused = None
        if self.active_peft_config.peft_type in _PROMPTS:
            fused = self._fuse(**text, task_ids=task_ids)
        if fused is None:
            return super().forward(**text, labels=labels, task_ids=task_ids, **outputs, **kwargs)
        _ignore(kwargs, "position_ids")
        types, rows = kwargs.get("token_type_ids"), self.active_peft_config.num_virtual_tokens
        if types is not None:
            kwargs["token_type_ids"] = _inserted(types, attention_mask, rows, 0, self._left_padding_fixed).long()
        self._place(kwargs, fused, attention_mask is not None)
        return self.base_model(labels=labels, **outputs, **kwargs)


class FusedSequenceClassification(_FusedClassification, PeftModelForSequenceClassification):
    """``PeftModelForSequenceClassification`` with fused prompts."""


class FusedTokenClassification(_FusedClassification, PeftModelForTokenClassification):
    """``PeftModelForTokenClassification`` with fused prompts."""


class FusedFeatureExtraction(_FusedPrompts, PeftModelForFeatureExtraction):
    """``PeftModelForFeatureExtraction`` with fused prompts."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        outputs = _output_options(output_attentions, output_hidden_states, return_dict)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        fused = None
        if self.active_peft_config.peft_type in _PROMPTS:
            fused = self._fuse(**text, task_ids=None)  # PEFT's model does not pass tasks on
        if fused is None:
            return super().forward(**text, task_ids=task_ids, **outputs, **kwargs)
        _ignore(kwargs, "position_ids", "token_type_ids")
        self._place(kwargs, fused, attention_mask is not None)
        return self.base_model(**outputs, **kwargs)


class FusedSeq2SeqLM(_FusedPrompts, PeftModelForSeq2SeqLM):
    """``PeftModelForSeq2SeqLM`` with fused prompts, which are the encoder's."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, decoder_input_ids=None,
        decoder_attention_mask=None, decoder_inputs_embeds=None, labels=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        outputs = _output_options(output_attentions, output_hidden_states, return_dict)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        decoder = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
        }
        config, fused = self.active_peft_config, None
        is_multitask = config.peft_type == PeftType.MULTITASK_PROMPT_TUNING
        if is_multitask and (labels is None or any(t is not None for t in decoder.values())):
            self._decline(Reason.EXTRA_ARGUMENTS)  # PEFT drops or lengthens them
        elif config.peft_type in _PROMPTS:
            fused = self._fuse(**text, task_ids=task_ids)
        if fused is None:
            return super().forward(**text, **decoder, labels=labels, task_ids=task_ids, **outputs, **kwargs)
        _ignore(kwargs, "position_ids", "token_type_ids")
        self._place(kwargs, fused, attention_mask is not None)
        if is_multitask and config.num_transformer_submodules == 2:
            ids = shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)
            prompt, task_ids = self._prompt(len(ids), task_ids, of_decoder=True)
            behind = prompt_embedding(
                None, None, prompt, inputs_embeds=self.word_embeddings(ids), labels=labels, task_ids=task_ids
            )
            labels, decoder = behind.labels, {"decoder_inputs_embeds": behind.inputs_embeds}
        return self.base_model(**decoder, labels=labels, **outputs, **kwargs)

    def generate(self, **kwargs):
        if self.active_peft_config.peft_type not in _PROMPTS:
            return super().generate(**kwargs)
        mask = kwargs.get("attention_mask")
        if "input_ids" in kwargs and "encoder_outputs" not in kwargs:
            fused = self._fuse(
                input_ids=kwargs["input_ids"], inputs_embeds=None, attention_mask=mask, task_ids=kwargs.get("task_ids")
            )
        else:
            fused = self._decline(Reason.EXTRA_ARGUMENTS)
        if fused is None:
            return super().generate(**kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input_ids", "task_ids")}
        _ignore(kwargs, "position_ids", "token_type_ids")
        self._place(kwargs, fused, mask is not None)
        return self.base_model.generate(**kwargs)


FUSED = {
    PeftModelForCausalLM: FusedCausalLM,
    PeftModelForSeq2SeqLM: FusedSeq2SeqLM,
    PeftModelForSequenceClassification: FusedSequenceClassification,
    PeftModelForTokenClassification: FusedTokenClassification,
    PeftModelForFeatureExtraction: FusedFeatureExtraction,
}
"""PEFT's class to ours."""
PLAIN = {fused: plain for plain, fused in FUSED.items()}

for _plain, _fused in FUSED.items():
    class_swaps.in_place_of(_plain)(_fused)


def fuse(model: PeftModel) -> Reason | None:
    """Swaps the class of a model; the reason where its calls would not reach ours."""
    reason = model_reason(model)
    if reason is None and type(model) in FUSED:
        _drop_own_methods(model)
        model.__class__ = FUSED[type(model)]
    return reason


def unfuse(model: PeftModel) -> None:
    """Gives a model PEFT's class back, and what is bound to it on the instance PEFT's methods."""
    swapped = class_swaps.give_back(model, PLAIN)
    if swapped is None:
        return
    ours, plain = swapped
    model.__dict__.pop("_left_padding_fixed", None)
    for name, value in list(model.__dict__.items()):
        # An accelerate hook keeps the method that it wraps on the instance, by another name.
        if isinstance(value, MethodType) and value.__self__ is model:
            method = value.__func__.__name__
            if value.__func__ is getattr(ours, method, None) and hasattr(plain, method):
                model.__dict__[name] = MethodType(getattr(plain, method), model)


def _own_methods(model: PeftModel) -> list[str]:
    """Names under which the instance keeps what its class, as PEFT made it or swapped, has anyway."""
    kinds = [kind for kind in (type(model), FUSED.get(type(model)), PLAIN.get(type(model))) if kind is not None]
    return [
        name
        for name, value in model.__dict__.items()
        if isinstance(value, MethodType)
        and value.__self__ is model
        and any(value.__func__ is getattr(kind, name, None) for kind in kinds)
    ]


def _drop_own_methods(model: PeftModel) -> None:
    """``disable_adapter`` of PEFT leaves such methods behind, which would hide those of another class."""
    for name in _own_methods(model):
        del model.__dict__[name]


def setup_in_patched_peft(model: PeftModel, adapter_name: str) -> Any:
    """Stands in for ``PeftModel._setup_prompt_encoder``, which every prompt is made by."""
    result = original_setup_prompt_encoder(model, adapter_name)
    fuse(model)
    return result
