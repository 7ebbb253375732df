"""Packed models as files: transformers and bitsandbytes load what we write, we read what they write."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes loads what we write")
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])


def tiny(tie=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("name", "options"), [("nf4", {}), ("fp4", {"double_quant": False}), ("int8", {})], ids=str)
def test_there_and_back(tmp_path, name, options, tie):
    model = tiny(tie)
    lk.quantize_(model, name, **options)
    expected = logits(model)
    lk.save_pretrained(model, tmp_path)
    assert not hasattr(model.config, "quantization_config")
    model.generation_config.eos_token_id = 17
    model.generation_config.save_pretrained(tmp_path)
    again = lk.load_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.generation_config.eos_token_id == 17
    if tie:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    half = lk.load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_transformers_loads_what_we_write(tmp_path, name):
    """Kills: a name, a shape or a JSON that bitsandbytes does not know; a layer that is packed and named as skipped."""
    model = tiny()
    lk.quantize_(model, name, exclude_modules=["k_proj", "lm_head"])
    expected = logits(model)
    lk.save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = {n: type(m) for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {kind for n, kind in kinds.items() if not n.endswith(("k_proj", "lm_head"))} == {bnb.nn.Linear4bit}
    assert {kind for n, kind in kinds.items() if n.endswith("k_proj")} == {torch.nn.Linear}
    torch.testing.assert_close(logits(theirs.train()), expected)


def test_we_load_what_transformers_writes(tmp_path):
    tiny().save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    theirs.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert (tmp_path / "packed" / "model.safetensors.index.json").is_file()
    ours = lk.load_pretrained(tmp_path / "packed")
    assert sum(isinstance(m, lk.QuantizedLinear) for m in ours.modules()) == 14
    torch.testing.assert_close(logits(ours), logits(theirs.train()))


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        lk.save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="must be of one of nf4, fp4, int8, got none"):
        lk.save_pretrained(tiny(), tmp_path)
    mixed = tiny()
    lk.quantize_(mixed, "nf4", modules=["q_proj"])
    lk.quantize_(mixed, "fp4", modules=["k_proj"])
    with pytest.raises(ValueError, match="got fp4, nf4"):
        lk.save_pretrained(mixed, tmp_path)
    adapted = tiny()
    lk.quantize_(adapted)
    lk.inject(adapted, ["q_proj"], r=2, alpha=4)
    with pytest.raises(ValueError, match=r"save those with lk\.save_adapter"):
        lk.save_pretrained(adapted, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_damaged_are_refused(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no packed layer"):
        lk.load_pretrained(tmp_path / "plain")
    lk.quantize_(model)
    lk.save_pretrained(model, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    entries = load_file(file)

    def saved(change):
        changed = dict(entries)
        change(changed)
        save_file(changed, file, metadata={"format": "pt"})

    layer = "model.layers.0.mlp.up_proj.weight"
    saved(lambda e: e.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"does not hold this model's weights: model\.norm\.weight"):
        lk.load_pretrained(tmp_path / "packed")
    saved(lambda e: e.update({f"{layer}.absmax": entries[f"{layer}.absmax"][:-1].clone()}))
    with pytest.raises(ValueError, match="do not fit together"):
        lk.load_pretrained(tmp_path / "packed")
    saved(lambda e: e.update({"foreign": torch.zeros(1)}))
    with pytest.raises(ValueError, match="foreign"):
        lk.load_pretrained(tmp_path / "packed")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        lk.load_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
