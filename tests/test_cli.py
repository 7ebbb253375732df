"""The command line, on a tiny random Llama."""
# ruff: noqa: F811  fixtures are imported

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from cli_runs import ADAPTER_FILES, TRAIN, adapter_dir, copy_adapter, finetune, log, model_dir, text_file  # noqa: F401
from safetensors.torch import load_file, save_file

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.cli import _training, info, main


def interrupt_after(monkeypatch, steps):
    """Sends SIGINT to this process once ``steps`` training steps are done."""
    original = _training.Trainer.step

    def step(self):
        loss = original(self)
        if self.done == steps:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(_training.Trainer, "step", step)


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


# ---------------------------------------------------------------------------------------------------- finetune


def test_finetune_learns_and_saves_an_adapter_for_peft(finetune, model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    assert finetune("out", "--lr", "0.05", "--steps", "20", "--eval-every", "10") == 0
    record = log(tmp_path / "out")
    assert len(record["losses"]) == 20
    assert [step for step, _ in record["held_out"]] == [0, 10, 20]
    assert record["held_out"][-1][1] < record["held_out"][0][1] - 0.1

    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    state = load_file(tmp_path / "out" / _training.STATE_FILE)
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(trained) == 2 * 7 * 2
    name = "model.layers.1.mlp.down_proj.lora_B"
    assert torch.equal(trained[f"base_model.model.{name}.default.weight"], state[f"parameter.{name}"])
    assert state[f"parameter.{name}"].abs().max() > 0


def test_fused_and_peft_runs_have_the_same_losses(finetune, tmp_path):
    pytest.importorskip("peft")
    assert finetune("fused") == 0
    assert finetune("peft", "--peft") == 0
    assert log(tmp_path / "fused")["losses"] == pytest.approx(log(tmp_path / "peft")["losses"], abs=1e-5)


@pytest.mark.parametrize("extra", [[], ["--peft"], ["--dtype", "bf16", "--frozen-linears"]], ids=" ".join)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(finetune, tmp_path, monkeypatch, capsys, extra):
    if "--peft" in extra:
        pytest.importorskip("peft")
    settings = ["--dropout", "0.2", "--eval-every", "2", *extra]
    assert finetune("whole", *settings) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert finetune("parts", *settings) == 130
    out = tmp_path / "parts"
    assert f"finetune --resume {out}" in capsys.readouterr().err
    assert len(log(out)["losses"]) == 3
    assert all((out / name).is_file() for name in ADAPTER_FILES)

    torch.manual_seed(1234)  # the generator's state must come from the file
    assert main(["finetune", "--resume", str(out)]) == 0
    assert log(out)["losses"] == log(tmp_path / "whole")["losses"]
    assert log(out)["held_out"] == log(tmp_path / "whole")["held_out"]
    for a, b in zip(*(load_file(tmp_path / d / ADAPTER_FILES[1]).values() for d in ("whole", "parts")), strict=True):
        assert torch.equal(a, b)


def test_resume_extends_a_finished_run(finetune, tmp_path):
    assert finetune("long", "--steps", "8") == 0
    assert finetune("short", "--steps", "5") == 0
    assert main(["finetune", "--resume", str(tmp_path / "short"), "--steps", "8"]) == 0
    assert log(tmp_path / "short")["losses"] == log(tmp_path / "long")["losses"]


def test_interrupt_before_the_first_step_leaves_nothing(finetune, tmp_path, monkeypatch):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lora_kernels.cli.finetune.held_out_loss", interrupted)
    assert finetune("out") == 130
    assert not (tmp_path / "out").exists()


def test_failed_save_keeps_the_older_checkpoint(finetune, tmp_path, monkeypatch, capsys):
    assert finetune("out") == 0
    out = tmp_path / "out"
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full_disk(tensors, path, metadata=None):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_training, "save_file", full_disk)
    assert main(["finetune", "--resume", str(out), "--steps", "8"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_divergence_stops_and_saves_nothing(finetune, tmp_path, capsys):
    assert finetune("out", "--lr", "1e30") == 1
    assert "learning rate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_finetune_without_peft(finetune, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert finetune("out") == 0
    assert finetune("other", "--peft") == 2
    assert "pip install peft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rank", "-4"], "--rank: must be at least 1"),
        (["--rank", "four"], "not an integer"),
        (["--alpha", "nan"], "--alpha: must be a finite number above 0"),
        (["--dropout", "1.0"], "--dropout: must lie in [0, 1)"),
        (["--lr", "inf"], "--lr: must be a finite number"),
        (["--targets", "q_proj,w_proj"], "no linear layer is called w_proj"),
        (["--targets", " , "], "--targets: expected at least one name"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--model", "./nowhere"], "./nowhere is not a model directory"),
        (["--seq", "65"], "longer than the model's context of 64"),
        (["--seq", "2000"], "too short"),
        (["--peft", "--frozen-linears"], "no meaning with --peft"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", ""], "--device : "),
        (["--device", "meta"], "--device meta: it has no memory"),
        (["--device", "privateuseone"], "--device privateuseone"),
        (["--rank", str(10**9)], "--rank 1000000000 is larger than every layer (48 features at most)"),
        (["--rank", "49", "--peft"], "--rank 49 is larger than every layer"),
        (["--threads", "0"], "--threads: must be at least 1, got 0"),
        (["--threads", "-1"], "--threads: must be at least 1, got -1"),
        (["--threads", str(10**9)], "--threads: must be at most"),
        (["--model", ""], "--model: is empty"),
        (["--text", " "], "--text: is empty"),
        (["--out", ""], "--out: is empty"),
        (["--out", "/dev/null/out"], "--out /dev/null/out: "),
        (["--out", "x" * 300], "File name too long"),
        (["--backend", "cuda"], "--backend cuda is not available"),
    ],
)
def test_finetune_refuses_in_one_line(finetune, tmp_path, capsys, extra, message):
    if "cuda" in extra and torch.cuda.is_available():
        pytest.skip("cuda is available")
    assert finetune("out", *extra) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_finetune_asks_the_backend_before_it_trains(finetune, tmp_path, monkeypatch, capsys):
    def declines(*args):
        raise RuntimeError("lora_linear: backend 'reference' was asked for but cannot serve this call: rank")

    monkeypatch.setattr("lora_kernels.why", declines)
    assert finetune("out", "--backend", "reference") == 2
    assert "cannot serve this call: rank" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_finetune_refuses_a_used_directory_and_another_run(
    finetune, adapter_dir, model_dir, text_file, tmp_path, capsys
):
    def fails(message, *arguments):
        assert main(["finetune", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err

    fresh = ["--model", model_dir, "--text", text_file, *TRAIN]
    fails("is not empty", *fresh, "--out", adapter_dir)
    fails("must be a directory", *fresh, "--out", text_file, "--overwrite")
    fails("needs --model, --text, --out")
    fails("--rank 8 differs from the 4", "--resume", adapter_dir, "--rank", "8", "--steps", "9")
    fails("has 6 steps already", "--resume", adapter_dir)
    fails("nothing to resume", "--resume", model_dir)
    fails("is not a directory", "--resume", tmp_path / "nowhere")

    other = tmp_path / "other.txt"
    other.write_text("a different text altogether. " * 20)
    fails("is not the text of the saved run", "--resume", adapter_dir, "--text", other, "--steps", "9")

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    content = (adapter_dir / _training.STATE_FILE).read_bytes()
    (damaged / _training.STATE_FILE).write_bytes(content[: len(content) // 2])
    fails("damaged", "--resume", damaged)
    assert finetune("out") == 0
    assert finetune("out", "--overwrite") == 0


# ------------------------------------------------------------------------------------------------------- merge


def test_merge_equals_base_plus_adapter(model_dir, adapter_dir, tmp_path, capsys):
    out = tmp_path / "merged"
    arguments = ["merge", "--model", str(model_dir), "--adapter", str(adapter_dir), "--out", str(out), "--check"]
    assert main(arguments) == 0
    assert "merged 14 layers" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err

    tokens = torch.arange(20).view(1, 20)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    plain = logits(base, tokens)
    weights, config = (
        load_file(adapter_dir / ADAPTER_FILES[1]),
        json.loads((adapter_dir / ADAPTER_FILES[0]).read_text()),
    )
    for name, module in base.named_modules():
        key = f"base_model.model.{name}.lora_%s.weight"
        if key % "A" in weights:
            module.weight.data += config["lora_alpha"] / config["r"] * weights[key % "B"] @ weights[key % "A"]
    expected = logits(base, tokens)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out)("cat", add_special_tokens=False)["input_ids"] == [3, 1, 20]


def test_merge_refuses_a_tied_weight_or_unties_it(finetune, model_dir, tmp_path, capsys):
    assert finetune("head", "--targets", "q_proj,lm_head", "--lr", "0.05") == 0
    out = tmp_path / "merged"
    arguments = ["merge", "--model", str(model_dir), "--adapter", str(tmp_path / "head"), "--out", str(out), "--check"]
    assert main(arguments) == 2
    assert "--untie" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--untie"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_merge_refuses_bad_adapters(model_dir, adapter_dir, tmp_path, capsys):
    def fails(adapter, message):
        out = tmp_path / "out"
        assert main(["merge", "--model", str(model_dir), "--adapter", str(adapter), "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not out.exists()

    fails(tmp_path / "nowhere", "does not exist")
    weights = load_file(adapter_dir / ADAPTER_FILES[1])

    bad = copy_adapter(adapter_dir, tmp_path / "nan")
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(weights, bad / ADAPTER_FILES[1])
    fails(bad, "q_proj would not be finite")

    bad = copy_adapter(adapter_dir, tmp_path / "truncated")
    (bad / ADAPTER_FILES[1]).write_bytes((adapter_dir / ADAPTER_FILES[1]).read_bytes()[:1000])
    fails(bad, "corrupt")

    bad = copy_adapter(adapter_dir, tmp_path / "json")
    (bad / ADAPTER_FILES[0]).write_text("{")
    fails(bad, "not JSON")


def test_merge_check_failure_keeps_nothing(model_dir, adapter_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lora_kernels.cli.merge._LOGITS_LIMIT", {torch.float32: -1.0})
    out = tmp_path / "out"
    assert main(["merge", "--model", str(model_dir), "--adapter", str(adapter_dir), "--out", str(out), "--check"]) == 1
    assert "was not kept" in capsys.readouterr().err
    assert not list(out.iterdir())


# ------------------------------------------------------------------------------------------------- info, help


def test_info_names_backends_and_choices(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"]["available"] is True
    assert (
        facts["packages"]["torch"] == torch.__version__.split("+")[0] or facts["packages"]["torch"] == torch.__version__
    )
    choice = next(
        row for row in facts["ops"] if (row["op"], row["device"], row["dtype"]) == ("lora_linear", "cpu", "fp32")
    )
    assert choice["backend"] in ("cpu", "reference")
    assert choice["reason"]
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_info_says_on_which_gpus_the_extension_works(monkeypatch):
    problems = [None, (lk.Reason.NOT_COMPILED, "what CUDA says")]
    monkeypatch.setattr(_native, "cuda", object())
    monkeypatch.setattr(_native, "cuda_problem", lambda device: problems[device.index])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(problems))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    found = info.machine()["gpus"]
    assert found == ["GPU 0 (sm_80)", f"GPU 1 (sm_81, {lk.Reason.NOT_COMPILED})"]


def test_help_and_mistakes(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--help"])
    assert stopped.value.code == 0
    assert "default: 16" in capsys.readouterr().out
    assert main(["frobnicate"]) == 2
    assert main([]) == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"lora-kernels {lk.__version__}\n"


def test_output_that_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    command = subprocess.run([sys.executable, "-m", "lora_kernels", "info"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (command.returncode, command.stderr) == (141, b"")
