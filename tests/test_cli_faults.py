"""What the commands say about models, files, disks and sizes that are no good: one line, and an exit status."""
# ruff: noqa: F811  fixtures are imported

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors
import torch
from cli_runs import ADAPTER_FILES, TRAIN, adapter_dir, copy_adapter, finetune, model_dir, text_file  # noqa: F401
from safetensors.torch import load_file, save_file

from lora_kernels.cli import _training, main


def one_line(capsys):
    """What the command wrote to stderr, which must be one line."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@contextlib.contextmanager
def small_files(size):
    """A disk on which no file can be longer; safetensors has an error of its own for that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def edited_model(model_dir, folder, weights=lambda tensors: tensors, **config):
    """A copy of the model with other weights, or with another config."""
    shutil.copytree(model_dir, folder)
    save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def merging(model, adapter, out, *more):
    return ["merge", "--model", str(model), "--adapter", str(adapter), "--out", str(out), *more]


def finetuning(model, text, out, *more):
    return ["finetune", "--model", str(model), "--text", str(text), "--out", str(out), *TRAIN, *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------- base models that do not fit

UP = "model.layers.1.mlp.up_proj.weight"
MISFITS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != UP}, {}, f"1 missing ({UP})"),
    "unexpected": (lambda t: t | {"extra.weight": torch.ones(2)}, {}, "1 unexpected (extra.weight)"),
    "both": (
        lambda t: {k + "s" if k == UP else k: v for k, v in t.items()},
        {},
        f"1 missing ({UP}); 1 unexpected ({UP}s)",
    ),
    "shape": (
        lambda t: t | {UP: torch.ones(47, 32)}, {}, f"1 of another shape ({UP} is [47, 32] instead of [48, 32])",
    ),
    "a layer more": (lambda t: t, {"num_hidden_layers": 3}, "9 missing (model.layers.2."),
    "a layer less": (lambda t: t, {"num_hidden_layers": 1}, "9 unexpected (model.layers.1."),
}  # fmt: skip


@pytest.mark.parametrize("command", ["finetune", "merge"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_base_weights_that_do_not_fit(command, misfit, model_dir, adapter_dir, text_file, tmp_path, capsys):
    """transformers draws or drops them and goes on, with a report that a quiet command must not swallow."""
    weights, config, message = MISFITS[misfit]
    model, out = edited_model(model_dir, tmp_path / "model", weights, **config), tmp_path / "out"
    arguments = merging(model, adapter_dir, out) if command == "merge" else finetuning(model, text_file, out)
    assert main(arguments) == 2
    err = one_line(capsys)
    assert f"does not hold this model's weights: {message}" in err
    assert "--allow-missing" in err
    assert not out.exists()
    if command == "merge" and misfit == "a layer less":
        return  # the adapter does not fit either
    if command == "merge" and misfit == "a layer more":
        return
    assert main([*arguments, "--allow-missing"]) == 0
    assert f"note: {model} does not hold this model's weights: {message}" in capsys.readouterr().out
    assert out.exists()


def test_a_tied_weight_is_not_missing(model_dir):
    """All other tests load this model, whose head is its embedding, and not in its file."""
    assert "lm_head.weight" not in load_file(model_dir / "model.safetensors")


def test_a_resumed_run_remembers_what_was_allowed(model_dir, text_file, tmp_path, capsys):
    model = edited_model(model_dir, tmp_path / "model", MISFITS["missing"][0])
    assert main(finetuning(model, text_file, tmp_path / "out", "--allow-missing")) == 0
    assert main(["finetune", "--resume", str(tmp_path / "out"), "--steps", "7"]) == 0
    assert capsys.readouterr().out.count("note: ") == 2


CONFIGS = [
    {"hidden_size": "x"}, {"num_attention_heads": 0}, {"hidden_act": "zzz"}, {"model_type": "nonsense"},
    {"dtype": "float99"}, {"dtype": 5}, {"dtype": "int64"}, {"dtype": "float8_e4m3fn"}, {"dtype": "load"},
    {"rope_parameters": 5},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_that_nobody_can_use(config, model_dir, adapter_dir, tmp_path, capsys):
    model, out = edited_model(model_dir, tmp_path / "model", **config), tmp_path / "out"
    assert main(merging(model, adapter_dir, out)) == 2
    assert f"cannot load the model '{model}': " in one_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_damaged_files_of_a_model(name, model_dir, text_file, tmp_path, capsys):
    model, out = edited_model(model_dir, tmp_path / "model"), tmp_path / "out"
    for content in ('{"model": 5}', "{", "[" * 100_000, "5", "null", "\x00"):
        (model / name).write_text(content)
        assert main(finetuning(model, text_file, out)) == 2, content[:20]
        assert "cannot load " in one_line(capsys)
        assert not out.exists()


def test_a_float64_model_is_merged(model_dir, adapter_dir, tmp_path):
    model = edited_model(model_dir, tmp_path / "model", dtype="float64")
    assert main(merging(model, adapter_dir, tmp_path / "out", "--check")) == 0


def test_an_adapter_that_cannot_be_read(model_dir, adapter_dir, tmp_path, capsys):
    bad = copy_adapter(adapter_dir, tmp_path / "bad")
    (bad / ADAPTER_FILES[1]).unlink()
    (bad / ADAPTER_FILES[1]).mkdir()
    assert main(merging(model_dir, bad, tmp_path / "out")) == 2
    assert "adapter_model.safetensors is a directory" in one_line(capsys)


# -------------------------------------------------------------------------------------------------------- disks


def test_merge_replaces_all_files_or_none(model_dir, adapter_dir, tmp_path, capsys):
    out = tmp_path / "merged"
    arguments = merging(model_dir, adapter_dir, out, "--overwrite")
    before = os.umask(0o027)
    try:
        assert main(arguments) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    before = contents(out)
    with small_files(20_000):
        assert main(arguments) == 1
    err = one_line(capsys)
    assert "could not save to" in err
    assert "File too large" in err
    assert contents(out) == before


@pytest.mark.parametrize("size", [3000, 60_000])
def test_finetune_on_a_full_disk(finetune, tmp_path, capsys, size):
    assert finetune("out") == 0
    out = tmp_path / "out"
    assert size < (out / _training.STATE_FILE).stat().st_size
    before = contents(out)
    with small_files(size):
        assert main(["finetune", "--resume", str(out), "--steps", "8"]) == 1
    err = one_line(capsys)
    assert "could not save to" in err
    assert "File too large" in err
    assert contents(out) == before


def test_a_checkpoint_is_saved_as_a_whole(finetune, tmp_path, monkeypatch, capsys):
    """The adapter is written after the trainer's state: if it fails, the state must not be of another step."""
    assert finetune("out") == 0
    before = contents(tmp_path / "out")

    def full(model, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_kernels.save_adapter", full)
    assert main(["finetune", "--resume", str(tmp_path / "out"), "--steps", "8"]) == 1
    assert "No space left on device" in one_line(capsys)
    assert contents(tmp_path / "out") == before


def test_a_run_that_was_killed_while_its_files_moved_is_resumed(finetune, tmp_path):
    """Its state may be among those that have not moved yet."""
    assert finetune("out") == 0
    out = tmp_path / "out"
    (out / ".saved").mkdir()
    for name in (_training.STATE_FILE, "adapter_config.json"):
        (out / name).rename(out / ".saved" / name)
    assert main(["finetune", "--resume", str(out), "--steps", "8"]) == 0
    assert len(json.loads((out / "training_log.json").read_text())["losses"]) == 8
    assert not (out / ".saved").exists()


def test_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        command = subprocess.run(
            [sys.executable, "-m", "lora_kernels", "info"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (command.returncode, command.stderr) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    "header",
    ["[]", "5", "[" * 100_000, "{}", '{"version": 1}', '{"version": 1, "losses": [], "extra": {}}',
     '{"version": 1, "losses": 5, "extra": {"settings": {}, "held_out": [[0, 1]], "data": ""}}',
     '{"version": 1, "losses": [], "extra": {"settings": 5, "held_out": [[0, 1]], "data": ""}}',
     '{"version": 1, "losses": [], "extra": {"settings": {}, "held_out": [], "data": ""}}'],
    ids=lambda text: text[:80],
)  # fmt: skip
def test_a_trainer_state_that_says_anything(header, tmp_path, capsys):
    save_file({"rng.cpu": torch.zeros(1)}, tmp_path / _training.STATE_FILE, {"trainer": header})
    assert main(["finetune", "--resume", str(tmp_path)]) == 2
    assert str(tmp_path / _training.STATE_FILE) in one_line(capsys)


def test_a_trainer_state_without_moments(adapter_dir, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(adapter_dir, out)
    state = out / _training.STATE_FILE
    with safetensors.safe_open(state, "pt") as file:
        metadata = file.metadata()
    save_file({k: v for k, v in load_file(state).items() if not k.startswith("exp_avg.")}, state, metadata)
    assert main(["finetune", "--resume", str(out), "--steps", "9"]) == 2
    assert "is damaged: exp_avg.model.layers.0" in one_line(capsys)


# -------------------------------------------------------------------------------------------------------- sizes


def test_out_of_memory_is_one_line(capsys):
    """torch's allocator for CPUs has no exception of its own."""
    huge = str(10**9)
    assert main(["bench", "--m", "1", "--n", huge, "--k", huge, "--rank", "1", "--device", "cpu"]) == 1
    assert one_line(capsys).startswith("error: out of memory: ")


def test_other_errors_are_not_hidden(monkeypatch):
    def broken(options):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("lora_kernels.cli.info.run", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["info"])


def test_bench_refuses_a_directory_before_it_measures(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, message in (("", "--out: is empty"), (str(tmp_path / "file"), "is a file")):
        assert main(["bench", "--out", out]) == 2
        assert message in one_line(capsys)


@pytest.mark.parametrize("command", ["finetune", "merge", "verify"])
def test_an_empty_name_is_not_the_current_directory(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {"finetune": ["--out", "--text", "--resume"], "merge": ["--out", "--adapter"], "verify": ["--adapter"]}
    for flag in ("--model", *flags[command]):
        assert main([command, flag, ""]) == 2
        assert f"{flag}: is empty" in one_line(capsys)
    assert not list(tmp_path.iterdir())
