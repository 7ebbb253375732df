"""The classes that a ``PeftModel`` with a prompt is swapped for. Importing this module imports PEFT."""

from __future__ import annotations

from types import MethodType
from typing import Any

from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
)
from peft.utils import shift_tokens_right
from torch import Tensor
from transformers import Cache

from ... import class_swaps
from ...functional.prompt import prompt_embedding
from ...reasons import Reason
from .prompts import (
    PROMPTS,
    FusedPrompts,
    drop_own_methods,
    ignore,
    inserted,
    output_options,
    own_methods,
)

original_setup_prompt_encoder = PeftModel._setup_prompt_encoder
"""What ``PeftModel`` had when ``patch_peft`` was called last."""


class FusedCausalLM(FusedPrompts, PeftModelForCausalLM):
    """``PeftModelForCausalLM`` with fused prompts."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None, task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        outputs = output_options(output_attentions, output_hidden_states, return_dict)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        fused = None
        if self.active_peft_config.peft_type in PROMPTS:
            fused = self._fuse(**text, labels=labels, task_ids=task_ids)
        if fused is None:
            return super().forward(**text, labels=labels, task_ids=task_ids, **outputs, **kwargs)
        ignore(kwargs, "position_ids", "token_type_ids")
        self._place(kwargs, fused, attention_mask is not None)
        return self.base_model(labels=fused.labels, **outputs, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if self.active_peft_config.peft_type in PROMPTS:
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
        ignore(inputs, "token_type_ids")
        inputs["input_ids"] = None
        self._place(inputs, fused, mask is not None)
        return inputs

    def _fixed_inputs(self, args: tuple, task_ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Of any step: [pads, prompt, text], and positions that count prompt and text."""
        inputs: dict[str, Any] = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        cache: Any = inputs.get("cache", inputs.get("past_key_values"))
        if _is_empty(cache):
            return self._first_inputs(inputs, task_ids)
        for name in ("position_ids", "cache_position", "token_type_ids"):
            inputs.pop(name, None)
        ids = inputs["input_ids"]
        if cache.get_seq_length() >= ids.shape[1]:
            ids = inputs["input_ids"] = ids[:, -1:]
        mask = inputs.get("attention_mask")
        if mask is not None:
            mask = inputs["attention_mask"] = inserted(mask, mask, self.active_peft_config.num_virtual_tokens, 1, True)
            if self._takes_positions():
                inputs["position_ids"] = ((mask != 0).long().cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        return inputs


def _is_empty(cache: Any) -> bool:
    return cache is None or (isinstance(cache, Cache) and not cache.get_seq_length())


class _FusedClassification(FusedPrompts):
    """What the classification models share: labels are not of the tokens that the prompt comes in front of."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None, task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        outputs = output_options(output_attentions, output_hidden_states, return_dict)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        fused = None
        if self.active_peft_config.peft_type in PROMPTS:
            fused = self._fuse(**text, task_ids=task_ids)
        if fused is None:
            return super().forward(**text, labels=labels, task_ids=task_ids, **outputs, **kwargs)
        ignore(kwargs, "position_ids")
        types, rows = kwargs.get("token_type_ids"), self.active_peft_config.num_virtual_tokens
        if types is not None:
            kwargs["token_type_ids"] = inserted(types, attention_mask, rows, 0, self._left_padding_fixed).long()
        self._place(kwargs, fused, attention_mask is not None)
        return self.base_model(labels=labels, **outputs, **kwargs)


class FusedSequenceClassification(_FusedClassification, PeftModelForSequenceClassification):
    """``PeftModelForSequenceClassification`` with fused prompts."""


class FusedTokenClassification(_FusedClassification, PeftModelForTokenClassification):
    """``PeftModelForTokenClassification`` with fused prompts."""


class FusedFeatureExtraction(FusedPrompts, PeftModelForFeatureExtraction):
    """``PeftModelForFeatureExtraction`` with fused prompts."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None, task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        outputs = output_options(output_attentions, output_hidden_states, return_dict)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        fused = None
        if self.active_peft_config.peft_type in PROMPTS:
            fused = self._fuse(**text, task_ids=None)  # PEFT's model does not pass tasks on
        if fused is None:
            return super().forward(**text, task_ids=task_ids, **outputs, **kwargs)
        ignore(kwargs, "position_ids", "token_type_ids")
        self._place(kwargs, fused, attention_mask is not None)
        return self.base_model(**outputs, **kwargs)


class FusedSeq2SeqLM(FusedPrompts, PeftModelForSeq2SeqLM):
    """``PeftModelForSeq2SeqLM`` with fused prompts, which are the encoder's."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None, decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, task_ids: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        outputs = output_options(output_attentions, output_hidden_states, return_dict)
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
        elif config.peft_type in PROMPTS:
            fused = self._fuse(**text, task_ids=task_ids)
        if fused is None:
            return super().forward(**text, **decoder, labels=labels, task_ids=task_ids, **outputs, **kwargs)
        ignore(kwargs, "position_ids", "token_type_ids")
        self._place(kwargs, fused, attention_mask is not None)
        if is_multitask and config.num_transformer_submodules == 2:
            ids = shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)
            prompt, task_ids = self._prompt(len(ids), task_ids, of_decoder=True)
            behind = prompt_embedding(
                None, None, prompt, inputs_embeds=self.word_embeddings(ids), labels=labels, task_ids=task_ids
            )
            labels, decoder = behind.labels, {"decoder_inputs_embeds": behind.inputs_embeds}
        return self.base_model(**decoder, labels=labels, **outputs, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        if self.active_peft_config.peft_type not in PROMPTS:
            return super().generate(**kwargs)
        mask = kwargs.get("attention_mask")
        if "input_ids" in kwargs and "encoder_outputs" not in kwargs:
            fused = self._fuse(
                input_ids=kwargs["input_ids"], inputs_embeds=None, attention_mask=mask, task_ids=kwargs.get("task_ids")
            )
        else:
            self._decline(Reason.EXTRA_ARGUMENTS)
            fused = None
        if fused is None:
            return super().generate(**kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input_ids", "task_ids")}
        ignore(kwargs, "position_ids", "token_type_ids")
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


def model_reason(model: PeftModel) -> Reason | None:
    """Why the calls of a model would not reach ours if its class were swapped; None if they would, or do."""
    if class_swaps.our_class(model, PLAIN) is not None:
        return None
    if type(model) not in FUSED:
        return Reason.LAYER_TYPE
    is_replaced = "forward" in model.__dict__ and "forward" not in own_methods(model, FUSED[type(model)])
    return Reason.INSTANCE_FORWARD if is_replaced else None


def fuse(model: PeftModel) -> Reason | None:
    """Swaps the class of a model; the reason where its calls would not reach ours."""
    reason = model_reason(model)
    if reason is None and type(model) in FUSED:
        model.__class__ = FUSED[type(model)]
        drop_own_methods(model)
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


def setup_in_patched_peft(model: PeftModel, adapter_name: str) -> Any:
    """Stands in for ``PeftModel._setup_prompt_encoder``, which every prompt is made by."""
    result = original_setup_prompt_encoder(model, adapter_name)
    fuse(model)
    return result
