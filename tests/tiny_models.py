"""Randomly initialised models that are small enough for a test."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


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
