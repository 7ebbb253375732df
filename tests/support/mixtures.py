"""Small mixtures of experts of the families that transformers declares, with PEFT's adapters on their experts."""

from __future__ import annotations

import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

SMALL = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": {"num_experts": 5, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 20, "head_dim": 12},
    "DeepseekV3": {
        "n_routed_experts": 4, "moe_intermediate_size": 20, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 12},  # transposed, biased, interleaved, a gate of its own
    "Olmoe": {"num_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
IDS = torch.arange(2, 30).view(2, 14)


def make_base(family: str, implementation: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES[family])
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation(implementation)
    for name, parameter in model.named_parameters():
        if "experts" in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the experts, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter)}


def make_peft(
    base: nn.Module, parameters: tuple[str, ...] = ("gate_up_proj", "down_proj"), also: tuple[str, ...] = (), **options
) -> nn.Module:
    """PEFT's model with an adapter on these parameters of all experts, and on other layers, none of it zero."""
    targets = [f"{name}.{parameter}" for name in experts_of(base) for parameter in parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=3, target_modules=list(also), target_parameters=targets, **options))
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def outputs_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return {"logits": output.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same results; rounding adds up over the layers."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 2e-4 * value.abs().max() + 1e-7, name
