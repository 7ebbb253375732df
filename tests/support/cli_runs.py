"""Fixtures of the command line's tests: a tiny random Llama, a text, and an adapter trained on it."""

import json

import pytest
import torch
import transformers

from lora_kernels.cli import main

SEQ = 16
TRAIN = ["--rank", "4", "--alpha", "8", "--steps", "6", "--warmup", "2", "--batch", "2", "--seq", str(SEQ)]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A Llama with tied embeddings, and a character-level tokenizer."""
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder, hidden_size=32, intermediate_size=48):
    """Into ``folder``, which is returned."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = ["<unk>", *"abcdefghijklmnopqrstuvwxyz .\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 20)
    return path


@pytest.fixture
def finetune(model_dir, text_file, tmp_path):
    """Runs ``finetune`` into tmp_path / name."""

    def run(name, *extra):
        out = str(tmp_path / name)
        return main(["finetune", "--model", str(model_dir), "--text", str(text_file), "--out", out, *TRAIN, *extra])

    return run


@pytest.fixture(scope="module")
def adapter_dir(model_dir, text_file, tmp_path_factory):
    """A trained adapter."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    arguments = ["--model", str(model_dir), "--text", str(text_file), "--out", str(out), *TRAIN, "--lr", "0.05"]
    assert main(["finetune", *arguments]) == 0
    return out


def log(folder):
    return json.loads((folder / "training_log.json").read_text())


def copy_adapter(source, target):
    target.mkdir()
    for name in ADAPTER_FILES:
        (target / name).write_bytes((source / name).read_bytes())
    return target
