"""Small random models of many families: patched equals unpatched, and every LoRA layer is accounted for."""

import copy
from collections import Counter

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lora_kernels as lk
from lora_kernels.reasons import Reason

IDS = torch.arange(2, 16).view(2, 7)
SMALL = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
# (family, head, its config's options, LoRA layers of the two blocks that "all-linear" finds, and other targets)
ZOO = {
    "Llama": ("Llama", "ForCausalLM", SMALL, 14),
    "Llama, biased": ("Llama", "ForCausalLM", SMALL | {"attention_bias": True, "mlp_bias": True}, 14),
    "Qwen2": ("Qwen2", "ForCausalLM", SMALL, 14),
    "Qwen3": ("Qwen3", "ForCausalLM", SMALL, 14),
    "Mistral": ("Mistral", "ForCausalLM", SMALL, 14),
    "Gemma": ("Gemma", "ForCausalLM", SMALL, 14),
    "Phi": ("Phi", "ForCausalLM", SMALL | {"num_key_value_heads": 2}, 12),
    "GPT2": ("GPT2", "LMHeadModel", {"vocab_size": 41, "n_embd": 24, "n_layer": 2, "n_head": 2}, 8),
    "OPT": (
        "OPT",
        "ForCausalLM",
        {"vocab_size": 41, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16},
        14,  # and the two projections of the embeddings
    ),
    "BERT": ("Bert", "ForMaskedLM", SMALL | {"max_position_embeddings": 32}, 13),  # and the head's transform
    "T5": (
        "T5",
        "ForConditionalGeneration",
        {"vocab_size": 41, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2,
         "decoder_start_token_id": 0},
        32,
    ),
    "Mixtral": ("Mixtral", "ForCausalLM", SMALL | {"num_local_experts": 3}, 12),  # with two parameters of experts each
}  # fmt: skip


def make_base(family, head, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    config._attn_implementation = "eager"
    return getattr(transformers, family + head)(config).eval()


def make(base, **options):
    """Stock PEFT and its patched twin, with the report."""
    stock = get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | options)))
    for name, parameter in stock.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.2)
    patched = copy.deepcopy(stock)
    return stock, patched, lk.patch(patched)


def outputs_and_gradients(model):
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach()} | gradients


def assert_same(patched, stock):
    ours, expected = outputs_and_gradients(patched), outputs_and_gradients(stock)
    assert ours.keys() == expected.keys()
    trained = [name for name, p in stock.named_parameters() if p.requires_grad]
    assert set(trained) <= ours.keys()
    for name, value in expected.items():  # rounding adds up over the layers
        assert (ours[name] - value).abs().max() <= 5e-4 * value.abs().max() + 1e-7, name


def assert_all_reported(model, report):
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert sorted(name for name, _ in report.fused + report.kept) == sorted(layers)


@pytest.mark.parametrize(("family", "head", "options", "count"), ZOO.values(), ids=ZOO.keys())
def test_every_linear_layer_of_a_family(family, head, options, count):
    stock, patched, report = make(make_base(family, head, options))
    assert_all_reported(patched, report)
    # PEFT makes a mixture's router and experts target_parameters: they are no linear layers.
    experts, routers = (4, 2) if family == "Mixtral" else (0, 0)
    assert sum(type(module) is ParamWrapper for module in stock.modules()) == experts + routers
    assert [reason for _, reason in report.kept] == [Reason.TARGET_PARAMETERS] * routers
    assert len(report.fused) == count
    assert str(report).splitlines()[0] == f"{count} of {count + routers} LoRA layers fused"
    assert_same(patched, stock)
    stats = lk.stats()
    assert [key for key in stats["fallback"] if key[0] == "lora_linear"] == [
        ("lora_linear", Reason.TARGET_PARAMETERS)
    ] * bool(routers)
    served = Counter()
    for (op, _), calls in stats["served"].items():
        served[op] += calls
    assert served["lora_linear"] == count - experts
    assert served["grouped_lora_linear"] == experts


@pytest.mark.parametrize("family", ["Llama", "GPT2", "T5"])
def test_dora_of_a_family(family):
    stock, patched, report = make(make_base(*ZOO[family][:3]), use_dora=True)
    assert {op for _, op in report.fused} == {"dora_linear"}
    assert report.kept == []
    assert_same(patched, stock)
    assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("family", "embedding", "head"),
    [("Llama", "embed_tokens", "lm_head"), ("Qwen2", "embed_tokens", "lm_head"), ("GPT2", "wte", "lm_head")],
)
def test_embeddings_and_lm_head(family, embedding, head, tied):
    base = make_base(*ZOO[family][:2], ZOO[family][2] | {"tie_word_embeddings": tied})
    assert (base.get_input_embeddings().weight is base.get_output_embeddings().weight) == tied
    stock, patched, report = make(base, target_modules=[embedding, head])
    assert sorted(op for _, op in report.fused) == ["lora_embedding", "lora_linear"]
    assert report.kept == []
    assert_same(patched, stock)
    assert lk.stats()["fallback"] == {}


def test_scaled_embeddings_are_counted():
    """Where transformers' Gemma multiplies its embeddings itself, that layer is PEFT's own."""
    stock, patched, report = make(make_base(*ZOO["Gemma"][:3]), target_modules=["embed_tokens", "q_proj"])
    assert_all_reported(patched, report)
    assert_same(patched, stock)
    is_plain = type(stock.get_input_embeddings().get_base_layer()) is nn.Embedding
    assert [reason for _, reason in report.kept] == ([] if is_plain else [Reason.BASE_LAYER])
    assert lk.stats()["fallback"] == ({} if is_plain else {("lora_embedding", Reason.BASE_LAYER): 1})
