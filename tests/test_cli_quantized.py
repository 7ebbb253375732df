"""The command line over packed bases: training on one, and merging into one."""
# ruff: noqa: F811  fixtures are imported

import pytest
import torch
import transformers
from cli_runs import finetune, log, text_file, write_model  # noqa: F401

import lora_kernels as lk
from lora_kernels.cli import main

bnb = pytest.importorskip("bitsandbytes", reason="--peft packs by it, and merge loads what it has packed")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """As ``cli_runs.model_dir``, of whole blocks of 64."""
    return write_model(tmp_path_factory.mktemp("model"), 64, 128)


def test_training_over_a_packed_base(finetune, tmp_path, capsys):
    """The steps' losses are those of stock PEFT on bitsandbytes, which packs into the same bits. The first run's
    held-out loss is asked for in eval mode, where bitsandbytes may repack: that one is not compared."""
    assert finetune("fused", "--quantize", "nf4", "--lr", "0.05") == 0
    printed = capsys.readouterr().out
    assert "14 of 14 linear layers packed" in printed
    assert "fp32 over nf4" in printed
    ours = log(tmp_path / "fused")
    assert ours["losses"][-1] < ours["losses"][0]
    assert finetune("peft", "--quantize", "nf4", "--lr", "0.05", "--peft") == 0
    assert log(tmp_path / "peft")["losses"][0] == pytest.approx(ours["losses"][0], abs=2e-3)


@pytest.mark.parametrize("name", ["int8", "float8", "mxfp4", "nvfp4"])
def test_every_format_trains(finetune, tmp_path, name):
    assert finetune(name, "--quantize", name, "--lr", "0.05") == 0
    losses = log(tmp_path / name)["losses"]
    assert losses[-1] < losses[0]


def test_what_peft_cannot_pack_is_refused(finetune, capsys):
    assert finetune("peft", "--quantize", "mxfp4", "--peft") == 2
    assert "bitsandbytes has nf4 and fp4" in capsys.readouterr().err


def test_a_resumed_run_packs_again(finetune, tmp_path, capsys):
    assert finetune("whole", "--quantize", "nf4") == 0
    assert finetune("parts", "--quantize", "nf4", "--steps", "3") == 0
    assert main(["finetune", "--resume", str(tmp_path / "parts"), "--steps", "6"]) == 0
    assert log(tmp_path / "parts")["losses"] == pytest.approx(log(tmp_path / "whole")["losses"], abs=1e-6)
    assert main(["finetune", "--resume", str(tmp_path / "parts"), "--steps", "8", "--quantize", "fp4"]) == 2
    assert "--quantize fp4 differs from the nf4" in capsys.readouterr().err


def test_merging_into_a_packed_base(finetune, model_dir, tmp_path, capsys):
    """Kills: a check against the base before it was quantised again; a result that bitsandbytes does not load."""
    assert finetune("adapter", "--quantize", "nf4", "--lr", "0.05") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    lk.quantize_(model)
    lk.save_pretrained(model, tmp_path / "packed")
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "packed")
    out = tmp_path / "merged"
    arguments = ["--model", str(tmp_path / "packed"), "--adapter", str(tmp_path / "adapter"), "--out", str(out)]
    assert main(["merge", *arguments, "--check"]) == 0
    printed = capsys.readouterr().out
    assert "14 quantised weights were quantised again" in printed
    assert "merged 14 layers; quantised model saved" in printed
    merged = lk.load_pretrained(out)
    lk.load_adapter(model, tmp_path / "adapter")
    lk.merge_adapter(model, unload=True)
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
