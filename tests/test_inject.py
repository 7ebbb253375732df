"""inject: chooses the layers that PEFT chooses, changes nothing else, and refuses clearly."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import Experts, tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_kernels as lk
from lora_kernels.reasons import Reason

# LoraConfig's arguments; inject takes the same but for lora_alpha, which is alpha.
SELECTIONS = [
    (tiny_llama, {"target_modules": ["q_proj", "v_proj"]}),
    (tiny_llama, {"target_modules": ["model.layers.1.self_attn.k_proj", "down_proj"]}),
    (tiny_llama, {"target_modules": r".*layers\.[02]\..*(q|gate)_proj"}),
    (tiny_llama, {"target_modules": "all-linear"}),
    (tiny_llama, {"target_modules": "ALL-LINEAR", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]}),
    (tiny_llama, {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.1\..*"}),
    (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    (tiny_llama, {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    (
        tiny_llama,
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3, "mlp.*": 5, r"^model\.layers\.1.*": 7}},
    ),
    (tiny_llama, {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 32}}),
    (tiny_llama, {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, "model.*": 9}, "use_rslora": True}),
    (Experts, {"target_modules": ["up"]}),
    (Experts, {"target_modules": "up"}),
    (Experts, {"target_modules": ["0", "1"], "exclude_modules": ["layers.0", "layers.1", "block.0", "block.1"]}),
    (Experts, {"target_modules": ["up", "1"], "layers_to_transform": [1], "exclude_modules": ["layers.1", "block.1"]}),
    (Experts, {"target_modules": ["up", "gate_up"], "layers_to_transform": 1, "layers_pattern": ["block"]}),
    (Experts, {"target_modules": "all-linear", "rank_pattern": {"up": 3}}),
]


@pytest.mark.parametrize(("make", "options"), SELECTIONS, ids=lambda o: str(o) if isinstance(o, dict) else None)
def test_same_layers_ranks_and_scalings_as_peft(make, options):
    model = make()
    names = set(model.state_dict())
    report = lk.inject(model, r=4, alpha=16, **options)
    ours = {name: (m.rank, m.scaling) for name, m in model.named_modules() if isinstance(m, lk.LoRALinear)}
    peft = get_peft_model(make(), LoraConfig(r=4, lora_alpha=16, **options))
    theirs = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in peft.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert ours == theirs
    assert report.fused == [(name, "lora_linear") for name in ours]
    assert not report.kept
    added = {f"{name}.{part}" for name in ours for part in ("lora_A", "lora_B")}
    assert set(model.state_dict()) == names | added
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


def test_starts_as_the_model_and_trains():
    model = tiny_llama().eval()
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    lk.inject(model, "all-linear", r=4, alpha=8)
    assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    model(ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_layer_object_and_hooks_stay():
    model, seen = tiny_llama(), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: seen.append(1))
    lk.inject(model, ["q_proj"], r=4, alpha=8)
    assert model.model.layers[0].self_attn.q_proj is layer
    model(torch.arange(4)[None])
    assert seen


def test_mode_is_kept():
    model = tiny_llama().eval()
    lk.inject(model, ["q_proj"], r=4, alpha=8, dropout=0.1)
    assert not model.model.layers[0].self_attn.q_proj.training


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["query"]}, ValueError, r"\['query'\] match no linear layer; names .*: q_proj, k_proj"),
        ({"target_modules": "q_proj"}, ValueError, "'q_proj' match no linear layer"),
        ({"target_modules": []}, ValueError, "match no linear layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ValueError, r"exclude_modules \['q_proj'\]"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, TypeError, "model.embed_tokens: expected a plain nn.Linear"),
        ({"target_modules": ["q_proj", "mlp"]}, TypeError, "model.layers.0.mlp: expected a plain nn.Linear"),
        ({"target_modules": "*q"}, ValueError, "no regular expression"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 2}}, ValueError, r"rank_pattern: '\(' is no regular"),
        ({"target_modules": None}, TypeError, "target_modules must be a string or a list of names, got None"),
        ({"target_modules": [3]}, TypeError, "target_modules must be a string or a list of names"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, ValueError, "layers_to_transform needs"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, ValueError, "layers_pattern needs"),
        ({"target_modules": ["q_proj"], "r": 0}, ValueError, "inject: r must be at least 1"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}}, ValueError, "q_proj: r must be at least 1"),
        ({"target_modules": ["q_proj"], "alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"target_modules": ["q_proj"], "dropout": 1.5}, ValueError, "dropout must be in"),
    ],
)
def test_refused_and_unchanged(options, error, message):
    model = tiny_llama()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(error, match=message):
        lk.inject(model, **({"r": 4, "alpha": 8} | options))
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_second_adapter_is_refused():
    model = tiny_llama()
    lk.inject(model, ["q_proj"], r=4, alpha=8)
    with pytest.raises(ValueError, match=r"already has an adapter, on model\.layers\.0\.self_attn\.q_proj"):
        lk.inject(model, ["k_proj"], r=4, alpha=8)
    peft = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for stock in (peft, peft.base_model.model):
        with pytest.raises(ValueError, match=r"is a PEFT model|already has an adapter"):
            lk.inject(stock, "all-linear", r=4, alpha=8)


def test_all_linear_reports_what_it_cannot_serve():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(TypeError, match=r"transformer\.h\.0\.attn\.c_attn: expected a plain nn\.Linear.*Conv1D"):
        lk.inject(model, ["c_attn"], r=4, alpha=8)
    model.transformer.h[0].mlp.c_fc = nn.Linear(16, 64)
    report = lk.inject(model, "all-linear", r=4, alpha=8)
    assert report.fused == [("transformer.h.0.mlp.c_fc", "lora_linear")]
    assert report.kept == [
        (f"transformer.h.0.{name}", Reason.FAN_IN_FAN_OUT) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    ]


def test_replaced_forward_is_refused():
    model = tiny_llama()
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = layer.forward  # as accelerate's hooks do
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: forward replaced on the instance"):
        lk.inject(model, ["q_proj"], r=4, alpha=8)
    report = lk.inject(model, "all-linear", r=4, alpha=8)
    assert report.kept == [("model.layers.1.self_attn.q_proj", Reason.INSTANCE_FORWARD)]


def test_injected_model_survives_deepcopy():
    model = tiny_llama().eval()
    lk.inject(model, ["q_proj"], r=4, alpha=8)
    ids = torch.arange(5)[None]
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
