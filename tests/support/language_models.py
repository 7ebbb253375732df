"""Causal language models that are small enough for a test, with and without what happens to their logits."""

from __future__ import annotations

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "head_dim": 12}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**_GROUPED, **options))


def gemma2():
    """Its head is its embedding, its logits are bounded."""
    return Gemma2ForCausalLM(Gemma2Config(**_GROUPED, query_pre_attn_scalar=12, final_logit_softcapping=2.0))


def cohere():
    return CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=0.25))


def granite():
    return GraniteForCausalLM(GraniteConfig(**_SIZES, logits_scaling=3.0))


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def phi():
    """Its head has a bias."""
    return PhiForCausalLM(PhiConfig(**_SIZES, resid_pdrop=0.0, embd_pdrop=0.0))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**_GROUPED, num_local_experts=4))


MODELS = {f.__name__: f for f in (llama, gemma2, cohere, granite, gpt2, phi, mixtral)}


def batch(rows=2, tokens=11):
    """Ids and labels, some of which count for nothing."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def spread_out(model):
    """The model with logits that a bound or a factor shows in."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model
