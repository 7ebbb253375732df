"""verify: every mistake of a fused layer is seen, and nothing else is touched."""

import copy

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_models import tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels import cli, dispatch, verification
from lora_kernels.functional import dora
from lora_kernels.functional import lora as functional
from lora_kernels.integrations.peft import linear as _peft_linear
from lora_kernels.ops import lora_linear
from lora_kernels.reasons import Reason

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def patched(dtype=torch.float32, **options) -> nn.Module:
    model = get_peft_model(tiny_llama().to(dtype), LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options)))
    lk.patch(model)
    return model


def verdicts(found: lk.Verification) -> set[tuple[str, str]]:
    return {(check.verdict, check.op) for check in found.checks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"use_rslora": True, "lora_bias": True}], ids=str
)
def test_patched_models_are_right(options, dtype):
    found = lk.verify(patched(dtype, **options))
    assert found.ok
    assert verdicts(found) == {("ok", "lora_linear")}
    assert len(found.checks) == 21
    assert all(0 < check.error < check.allowed and check.trains for check in found.checks)


def test_embeddings_several_adapters_and_layers_of_the_own_kind():
    model = patched(target_modules=["q_proj", "embed_tokens"], lora_dropout=0.1)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    found = lk.verify(model.eval())
    assert found.ok
    assert verdicts(found) == {("ok", "lora_embedding"), ("ok", "lora_linear")}

    own = nn.Sequential(lk.LoRAEmbedding(9, 6, r=2, alpha=3), lk.LoRALinear(6, 5, r=2, alpha=3, dropout=0.2))
    found = lk.verify(own)
    assert found.ok
    assert verdicts(found) == {("ok", "lora_embedding"), ("ok", "lora_linear")}
    lk.merge_adapter(own)
    assert {check.verdict for check in lk.verify(own).checks} == {"kept"}


def test_conv1d():
    model = get_peft_model(nn.Sequential(Conv1D(5, 6)), LoraConfig(target_modules=["0"], fan_in_fan_out=True))
    lk.patch(model)
    assert verdicts(lk.verify(model)) == {("ok", "lora_linear")}


def test_convolutions():
    net = nn.ModuleDict({"one": nn.Conv1d(4, 6, 2, groups=2), "two": nn.Conv2d(4, 6, 3, padding=1)})
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["one", "two"], lora_dropout=0.1))
    lk.patch(model)
    found = lk.verify(model)
    assert found.ok
    assert verdicts(found) == {("ok", "lora_conv")}


PROMPTS = {
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=5),
    "P-tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "multitask": MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=2),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
    "projected prefix": PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8),
}


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("left_padding", ["peft", "fixed"])
def test_prompts(config, left_padding):
    config = copy.copy(config)
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_llama(), config)
    lk.patch(model, left_padding=left_padding)
    kind, was_fixed = type(model), model._left_padding_fixed
    found = lk.verify(model)
    assert found.ok
    assert [check.name for check in found.checks] == ["prompt_encoder"]
    assert found.checks[0].op == ("prefix_kv" if config.peft_type == "PREFIX_TUNING" else "prompt_embedding")
    assert type(model) is kind
    assert model._left_padding_fixed is was_fixed


# ---------------------------------------------------------------------------------------------------- mistakes


def gradients_off_by(factors):
    """``_run_backward`` whose (dX, dA, dB) are scaled."""

    def backward(*args):
        return tuple(g * factor for g, factor in zip(dispatch.run(lora_linear.BACKWARD, *args), factors))

    return backward


@pytest.mark.parametrize(
    ("factors", "seen"),
    [((1.001, 1, 1), "dx"), ((1, 1.001, 1), "lora_A.default.weight"), ((1, 1, 1.001), "lora_B.default.weight")],
)
def test_a_wrong_gradient_is_named(factors, seen, monkeypatch):
    """One per mille, on adapters whose B is zero: without a random B nothing of it would show."""
    model = patched(target_modules=["q_proj"])
    monkeypatch.setattr(lora_linear, "run_backward", gradients_off_by(factors))
    found = lk.verify(model)
    assert not found.ok
    assert {(check.verdict, check.detail) for check in found.checks} == {("differs", seen)}


def test_a_mask_that_gradients_do_not_share_is_seen(monkeypatch):
    """dA from another mask than the forward's: right without dropout, wrong with it."""
    model = patched(target_modules=["q_proj"], lora_dropout=0.4)

    def backward(grad_y, x, s, weight, A, B, seed, *rest):
        return dispatch.run(lora_linear.BACKWARD, grad_y, x, s, weight, A, B, None if seed is None else seed + 1, *rest)

    monkeypatch.setattr(lora_linear, "run_backward", backward)
    found = lk.verify(model)
    assert {check.verdict for check in found.checks} == {"differs"}
    assert all(check.detail.endswith("under dropout") for check in found.checks)


def test_a_lost_gradient_and_nan(monkeypatch):
    model = patched(target_modules=["q_proj"])
    with monkeypatch.context() as patch:
        detached = functional.lora_linear_of_layer
        patch.setattr(_peft_linear, "lora_linear_of_layer", lambda *args: detached(*args).detach())
        assert {check.verdict for check in lk.verify(model).checks} == {"differs"}
    model = patched(target_modules=["q_proj"], use_dora=True)
    monkeypatch.setattr(dora, "norm", lambda weight, *_: weight.norm(dim=1) * float("nan"))
    assert {check.verdict for check in lk.verify(model).checks} == {"differs"}


def test_what_raises_is_a_row(monkeypatch):
    model = patched(target_modules=["q_proj", "embed_tokens"])

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a\nkernel")

    monkeypatch.setattr(_peft_linear, "lora_linear_of_layer", broken)
    found = lk.verify(model)
    assert not found.ok
    assert [c.verdict for c in found.checks] == ["ok", "raised", "raised", "raised"]
    assert found.checks[1].detail == "ZeroDivisionError: a kernel"
    assert "raised  " + Q0 in str(found)


def test_a_prompt_in_the_wrong_place(monkeypatch):
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    lk.patch(model)
    place = type(model)._place

    def reversed_prompt(self, kwargs, fused, has_mask):
        place(self, kwargs, fused._replace(inputs_embeds=fused.inputs_embeds.flip(1)), has_mask)

    monkeypatch.setattr(type(model), "_place", reversed_prompt)
    found = lk.verify(model)
    assert [(c.verdict, c.detail) for c in found.checks] == [("differs", "prompt_encoder.default.embedding.weight")]


# ------------------------------------------------------------------------------------------- rows that are not fused


def test_kept_layers_have_their_reason():
    model = patched(target_modules=["q_proj"], target_parameters=["embed_tokens.weight"])
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_A.register_forward_hook(lambda *_: None)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    found = lk.verify(model)
    assert found.ok
    kept = {check.name: check.detail for check in found.checks if check.verdict == "kept"}
    assert kept.pop(Q0) == Reason.BASE_REQUIRES_GRAD
    assert set(kept.values()) == {Reason.TARGET_PARAMETERS}
    other = get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"]))
    assert {check.detail for check in lk.verify(other).checks} == {Reason.LAYER_TYPE}


def test_adapters_that_do_not_train_are_named():
    model = patched(target_modules=["q_proj"])
    for parameter in model.base_model.model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    found = lk.verify(model)
    assert found.ok
    assert [check.trains for check in found.checks] == [False, True, True]
    assert "1 whose adapter does not train" in str(found)


def test_nothing_is_left_behind():
    model = patched(lora_dropout=0.5)
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model(torch.arange(4)[None])
    stats, random = lk.stats(), torch.get_rng_state()
    with torch.inference_mode():
        assert lk.verify(model).ok
    assert lk.stats() == stats
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"verify: rows must be a positive int, got 0"):
        lk.verify(patched(), rows=0)
    with pytest.raises(ValueError, match=r"verify: rows must be a positive int, got True"):
        lk.verify(patched(), rows=True)
    with pytest.raises(ValueError, match=r"verify: LlamaForCausalLM holds no fused layer and no PEFT layer"):
        lk.verify(tiny_llama())


def test_command(tmp_path, capsys, monkeypatch):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    patched(target_modules=["q_proj"]).save_pretrained(adapter)
    arguments = ["verify", "--model", str(base), "--adapter", str(adapter), "--device", "cpu"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 LoRA layers fused" in printed
    assert "3 ok" in printed
    monkeypatch.setattr(lora_linear, "run_backward", gradients_off_by((2, 1, 1)))
    assert cli.main(arguments) == 1
    assert "3 differs" in capsys.readouterr().out
    assert cli.main([*arguments, "--rows", "0"]) == 2
    assert cli.main([*arguments[:-4], "--adapter", str(tmp_path)]) == 2
    assert verification.verify is lk.verify
