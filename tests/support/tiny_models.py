"""Randomly initialised models that are small enough for a test."""

from torch import nn
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)


def tiny_llama(kind: type[PreTrainedModel] = LlamaForCausalLM, **options) -> PreTrainedModel:
    """``kind``: which model of the family."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, **options,
    )  # fmt: skip
    return kind(config)


def tiny_bert(kind: type[PreTrainedModel], **options) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return kind(config)


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=61, d_model=24, d_kv=12, d_ff=40, num_layers=3, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class Experts(nn.Module):
    """Numbered parts inside numbered parts, and names that are ends of other names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), "up": nn.Linear(4, 4)})
            for _ in range(3)
        )
        self.block = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "gate_up": nn.Linear(4, 4)}) for _ in range(2))
        self.up = nn.Linear(4, 4)
