"""What PEFT writes we read, what we write PEFT reads: embeddings beside an adapter, names that are ends of others."""

import json
import re

import pytest
import torch
from adapter_models import as_peft_reads, assert_unchanged, injected, logits, randomise, snapshot, twin, with_peft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from torch import nn

import lora_kernels as lk

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


@pytest.fixture
def base():
    return tiny_llama().eval()


def resized(model):
    """With eight more tokens, whose rows are those of nobody else."""
    model.resize_token_embeddings(69, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        nn.init.normal_(module.weight)
    return model


def larger(base):
    """``base`` with room for the tokens, as a user makes it before loading."""
    model = twin(base)
    model.resize_token_embeddings(69, mean_resizing=False)
    return model.eval()


def saved_with_embeddings(base, directory, tie=False):
    """An adapter of a model whose vocabulary was resized; the logits with it."""
    peft = with_peft(resized(twin(base)))
    if tie:
        llama = peft.get_base_model()
        llama.lm_head.weight = llama.model.embed_tokens.weight
    peft.save_pretrained(directory, save_embedding_layers=True)
    assert {f"{EMBED}.weight", f"{HEAD}.weight"} <= load_file(directory / WEIGHTS).keys()
    return logits(peft)


MODELS = {
    "plain": lambda model: model,
    "injected": injected,
    "peft": with_peft,
    "patched": lambda model: lk.patch(peft := with_peft(model)) and peft,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_resized_vocabulary(base, tmp_path, kind):
    expected = saved_with_embeddings(base, tmp_path)
    model = MODELS[kind](larger(base))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    embedding = model.get_input_embeddings().weight
    lk.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-5, atol=1e-5)
    assert model.get_input_embeddings().weight is embedding
    if kind != "plain":
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not embedding.requires_grad
    reference = PeftModel.from_pretrained(larger(base), tmp_path).eval()
    torch.testing.assert_close(logits(reference), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_vocabulary_that_was_not_resized_here(base, tmp_path, kind):
    saved_with_embeddings(base, tmp_path)
    model = MODELS[kind](base)
    before = snapshot(model)
    message = rf"{WEIGHTS}: \S+ has shape \(69, 24\), the model needs \(61, 24\); resize its vocabulary first"
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", MODELS)
def test_tied_embeddings(base, tmp_path, kind):
    """One weight under two keys: two values for it cannot both be right."""
    expected = saved_with_embeddings(base, tmp_path, tie=True)
    plain = larger(base)
    plain.lm_head.weight = plain.model.embed_tokens.weight
    model = MODELS[kind](plain)
    lk.load_adapter(model, tmp_path)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-5, atol=1e-5)

    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {f"{HEAD}.weight": tensors[f"{HEAD}.weight"] + 1}, tmp_path / WEIGHTS)
    before = snapshot(model)
    with pytest.raises(ValueError, match="differ, and are one tied weight in the model"):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", MODELS)
def test_a_targeted_head(base, tmp_path, kind):
    """PEFT saves the head's base weight, too: lm_head.base_layer.weight."""
    options = {"target_modules": ["q_proj", "lm_head"]}
    peft = with_peft(twin(base), **options)
    nn.init.normal_(peft.get_base_model().lm_head.base_layer.weight)
    peft.save_pretrained(tmp_path)
    assert f"{HEAD}.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    model = MODELS[kind](twin(base)) if kind == "plain" else (
        injected(twin(base), **options) if kind == "injected" else with_peft(twin(base), **options)
    )  # fmt: skip
    if kind == "patched":
        lk.patch(model)
    lk.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model.eval()), logits(peft), rtol=1e-5, atol=1e-5)
    lk.save_adapter(model, tmp_path / "ours")
    other = twin(base)
    other.lm_head.weight.data.copy_(peft.get_base_model().lm_head.base_layer.weight)
    torch.testing.assert_close(as_peft_reads(other, tmp_path / "ours"), logits(peft), rtol=1e-5, atol=1e-5)


def test_targeted_embeddings(base, tmp_path):
    """A PEFT model takes them as PEFT does; a plain one would need an embedding with an adapter, and is told."""
    options = {"target_modules": ["q_proj", "embed_tokens"]}
    peft = with_peft(twin(base), **options)
    nn.init.normal_(peft.get_base_model().model.embed_tokens.base_layer.weight)
    peft.save_pretrained(tmp_path)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert {f"{EMBED}.base_layer.weight", f"{EMBED}.lora_embedding_A"} <= keys
    other = with_peft(twin(base), **options)
    lk.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(peft), rtol=1e-5, atol=1e-5)
    lk.save_adapter(other, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == keys

    for model in (twin(base), injected(twin(base), target_modules=["q_proj"])):
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"load_adapter: .*embed_tokens"):
            lk.load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_other_base_weights_have_no_place(base, tmp_path):
    lk.save_adapter(injected(twin(base)), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {key: torch.zeros(12, 24)}, tmp_path / WEIGHTS)
    for make in MODELS.values():
        model = make(twin(base))
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"{key} has no place in the model"):
            lk.load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_embeddings_of_a_model_that_names_them_otherwise(tmp_path):
    """They are known by what the model says they are, not only by the names that PEFT lists."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        config = GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        config.pad_token_id = config.eos_token_id = config.bos_token_id = 0
        return GPT2LMHeadModel(config).eval()

    first, second = gpt2(), gpt2()
    second.load_state_dict(first.state_dict())
    peft = with_peft(first, target_modules=["c_attn"], fan_in_fan_out=True)
    nn.init.normal_(first.transformer.wte.weight)
    peft.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.transformer.wte.weight" in load_file(tmp_path / WEIGHTS)
    other = with_peft(second, target_modules=["c_attn"], fan_in_fan_out=True)
    lk.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(peft), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- names of layers


def linear():
    return nn.Linear(4, 4)


TREES = {
    "end of another": (lambda: nn.ModuleDict({"foo": linear(), "bar": nn.ModuleDict({"foo": linear()})}), ["foo"]),
    "end of a deeper one": (
        lambda: nn.ModuleDict({
            "a": nn.ModuleDict({"q": linear()}),
            "b": nn.ModuleDict({"a": nn.ModuleDict({"q": linear()}), "q": linear()}),
        }),
        ["a.q"],
    ),
    "several": (
        lambda: nn.ModuleDict({
            "x1": linear(), "x-1": linear(), "deep": nn.ModuleDict({"x1": linear(), "x-1": linear()}),
        }),
        ["x1", "x-1"],
    ),
    "end of a module that is no layer": (
        lambda: nn.ModuleDict({"q": linear(), "w": nn.ModuleDict({"q": nn.ModuleDict({"v": linear()})})}), ["q"],
    ),
    "signs of expressions": (
        lambda: nn.ModuleDict({"a+b": linear(), "aab": linear(), "c": nn.ModuleDict({"a+b": linear()})}), ["a+b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_exactly_the_layers_that_were_saved(tmp_path, tree):
    make, names = TREES[tree]
    model = make()
    for number, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        layer = lk.LoRALinear.from_linear(model.get_submodule(name), r=2 + number, alpha=3 - number)
        model.get_submodule(parent)._modules[child] = layer
    randomise(model)
    lk.save_adapter(model, tmp_path)
    chosen = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert chosen == "|".join(re.escape(name) for name in sorted(names))

    peft = PeftModel.from_pretrained(make(), tmp_path).get_base_model()
    theirs = {n: (m.r["default"], m.scaling["default"]) for n, m in peft.named_modules() if hasattr(m, "base_layer")}
    ours = {n: (m.rank, m.scaling) for n, m in model.named_modules() if isinstance(m, lk.LoRALinear)}
    assert theirs == ours
    for name in names:
        layer = peft.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, model.get_submodule(name).lora_A)
    other = make()
    lk.load_adapter(other, tmp_path)
    assert {n: (m.rank, m.scaling) for n, m in other.named_modules() if isinstance(m, lk.LoRALinear)} == ours


def test_whole_names_where_they_are_enough(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": linear()}), "b": nn.ModuleDict({"q": linear()})})
    lk.inject(model, ["a.q"], r=2, alpha=2)
    lk.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["a.q"]


def test_a_layer_under_two_names_is_not_saved(tmp_path):
    """PEFT would give the first an adapter and leave the second plain."""
    shared = lk.LoRALinear(4, 4, r=2, alpha=2)
    model = nn.ModuleDict({"one": shared, "two": shared})
    with pytest.raises(ValueError, match="save_adapter: one is also two; PEFT"):
        lk.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
