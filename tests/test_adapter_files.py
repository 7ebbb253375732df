"""Files of adapters and what becomes of them: configs that say anything, disks that are full, processes that die."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch
import torch
from adapter_models import (
    MAKERS,
    as_peft_reads,
    assert_unchanged,
    injected,
    logits,
    randomise,
    snapshot,
    twin,
    with_peft,
)
from peft import LoraConfig, PeftModel
from tiny_models import tiny_llama

import lora_kernels as lk
from lora_kernels.adapters import CONFIG_FILE as CONFIG
from lora_kernels.adapters import WEIGHTS_FILE as WEIGHTS
from lora_kernels.adapters import config as adapter_config
from lora_kernels.adapters import files

BOTH = [CONFIG, WEIGHTS]


@pytest.fixture
def base():
    return tiny_llama().eval()


@pytest.fixture
def saved(base, tmp_path):
    """A directory with an adapter."""
    lk.save_adapter(injected(twin(base)), tmp_path / "adapter")
    return tmp_path / "adapter"


def contents(directory):
    return {path.name: path.read_bytes() if path.is_file() else None for path in directory.iterdir()}


def edit(directory, **changes):
    config = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(config))


def error_of(function):
    """The exception that it raises, or None."""
    try:
        function()
    except Exception as error:
        return error


MODELS = {"plain": lambda model: model, **MAKERS}

# ------------------------------------------------------------------------------------------------ what a file says

HUGE = 10**400
NEITHER_NUMBER = [None, "x", "", [], [4], {}, {"a": 1}, True, float("nan"), float("inf"), HUGE]
NEITHER_NAMES = [5, 0, 1.5, True, False, {}, {"q_proj": 1}, [1], [None], [["q_proj"]], float("nan")]
VALUES = {
    "r": [*NEITHER_NUMBER, 0, -1, 1.5, 4.0, 2**31],
    "lora_alpha": NEITHER_NUMBER,
    "lora_dropout": [*NEITHER_NUMBER, -0.1, 1, 1.0, 2],
    "use_rslora": [None, "x", 0, 1, [], {}, [True]],
    "rank_pattern": [None, "x", [], ["q_proj"], 3, True],
    "alpha_pattern": [None, "x", [], ["q_proj"], 3, True],
    "target_modules": [*NEITHER_NAMES, "(", "*q", "q_proj)", "(" * 20000, "x{99999999999}"],
    "exclude_modules": [*NEITHER_NAMES, "(", "*q"],
    "layers_pattern": [*NEITHER_NAMES, "(", ["layers", "("], "(?P<index>x)"],
    "layers_to_transform": ["x", "", [None], ["1"], 1.5, [1.5], True, [True], {}, {"a": 1}, float("nan")],
}
PATTERNS = {
    "rank_pattern": [*NEITHER_NUMBER, 0, -3, 1.5, 2**31],
    "alpha_pattern": NEITHER_NUMBER,
}
EXPRESSIONS = ["(", "*", "q_proj)", "(?P<x>", "[", "(" * 20000, "x{99999999999}"]


@pytest.mark.parametrize("kind", MODELS)
def test_any_value_of_any_field_is_one_clear_error(base, saved, kind):
    model = MODELS[kind](base)
    before = snapshot(model)
    original = (saved / CONFIG).read_text()

    def refused(field, **changes):
        edit(saved, **changes)
        with pytest.raises(ValueError, match=rf"^load_adapter: .*{CONFIG}: {field}") as caught:
            lk.load_adapter(model, saved)
        assert type(caught.value) is ValueError
        assert len(str(caught.value)) < 600, "a value of any length is shortened"
        (saved / CONFIG).write_text(original)

    for field, values in VALUES.items():
        for value in values:
            refused(field, **{field: value})
    for field, values in PATTERNS.items():
        for value in values:
            refused(f"{field}: q_proj is ", **{field: {"q_proj": value}})
        for expression in EXPRESSIONS:
            refused(rf"{field}: .* is no regular expression", **{field: {expression: 2}})
    for field in ("r", "lora_alpha"):
        config = json.loads(original)
        del config[field]
        (saved / CONFIG).write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"{CONFIG}: {field} is None, expected a number"):
            lk.load_adapter(model, saved)
        (saved / CONFIG).write_text(original)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["plain", "injected"])
def test_fields_that_mean_more_than_lora(base, saved, kind):
    model = MODELS[kind](base)
    before = snapshot(model)
    fields = [*adapter_config._BEYOND_PLAIN_LORA, "bias", "init_lora_weights"]
    for field in fields:
        for value in (["a"], {"a": 1}, "x", 5, "pissa", [[[1]]]):
            edit(saved, **{field: value})
            with pytest.raises(ValueError, match=rf"^load_adapter: .*{CONFIG}: {field}=.* is not plain LoRA"):
                lk.load_adapter(model, saved)
            edit(saved, **{field: "none" if field == "bias" else None})
    for value in (None, [], ""):
        edit(saved, target_modules=value)
        with pytest.raises(ValueError, match=rf"{CONFIG}: target_modules is "):
            lk.load_adapter(model, saved)
    assert_unchanged(model, before)


RAW = {
    "deep": b"[" * 100000,
    "deep object": b'{"a":' * 100000,
    "not UTF-8": b'{"peft_type": "LORA", "r": "\xff\xfe"}',
    "UTF-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"peft_type": "LORA"}',
    "empty": b"",
    "zeros": bytes(1000),
    "a number of many digits": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
    "a string": b'"LORA"',
    "null": b"null",
    "two documents": b'{"peft_type": "LORA"} {}',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
def test_any_content_of_the_config_is_one_clear_error(base, saved, raw):
    (saved / CONFIG).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"^load_adapter: \S+{CONFIG} ") as caught:
        lk.load_adapter(base, saved)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", BOTH)
def test_a_directory_in_the_place_of_a_file(base, saved, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(ValueError, match=f"load_adapter: .*{name} is a directory"):
        lk.load_adapter(base, saved)
    before = contents(saved)
    with pytest.raises(IsADirectoryError, match=name):
        lk.save_adapter(injected(base), saved)
    assert contents(saved) == before


@pytest.mark.parametrize("name", BOTH)
def test_a_file_that_may_not_be_read(base, saved, name, monkeypatch):
    """By whatever keeps it from being read; a test that runs as root cannot take its own permission away."""

    def forbidden(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if name == CONFIG:
        monkeypatch.setattr("pathlib.Path.read_text", forbidden)
    else:
        monkeypatch.setattr(safetensors.torch, "load_file", forbidden)
    with pytest.raises(PermissionError, match=rf"load_adapter: cannot read it: Permission denied: '\S+{name}'"):
        lk.load_adapter(base, saved)


def test_every_cut_and_every_bit_of_the_weights_file(base, saved):
    """Whatever is wrong with its header is an error with the file's name. (Values carry no checksum.)"""
    whole = (saved / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    damaged = [whole[:cut] for cut in (0, 4, 8, 9, header - 1, header, len(whole) - 1)]
    for _ in range(60):
        position = int(torch.randint(header, (), generator=generator))
        damaged.append(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
    before, failed = snapshot(base), 0
    for content in damaged:
        (saved / WEIGHTS).write_bytes(content)
        error = error_of(lambda: lk.load_adapter(twin(base), saved))
        assert error is None or (type(error) is ValueError and WEIGHTS in str(error)), error
        failed += error is not None
    assert failed > len(damaged) / 2
    assert_unchanged(base, before)


@pytest.mark.parametrize("kind", MODELS)
def test_numbers_that_torch_cannot_convert(base, saved, kind):
    model = MODELS[kind](base)
    before = snapshot(model)
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    key = list(tensors)[-1]
    packed = torch.zeros(tensors[key].shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for wrong in (packed, tensors[key].to(torch.complex64), tensors[key] > 0, tensors[key].int()):
        safetensors.torch.save_file(tensors | {key: wrong}, saved / WEIGHTS)
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: {key} is torch\.\w+, expected floating point"):
            lk.load_adapter(model, saved)
        assert_unchanged(model, before)


def test_every_field_of_pefts_config_is_known():
    """One that is not may change what an adapter computes: find out what it means, and add it to the right list."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= adapter_config.known_fields()


def test_a_field_of_a_newer_peft_is_named(base, saved):
    edit(saved, use_fluxlora={"rho": 2}, use_nothing=None)
    with pytest.warns(UserWarning, match=rf"{CONFIG}: use_fluxlora is of a newer PEFT") as seen:
        lk.load_adapter(base, saved)
    assert "use_nothing" not in str([w.message for w in seen])
    assert any(w.filename == __file__ for w in seen)


# ------------------------------------------------------------------------------------------- disks and permissions


@pytest.mark.parametrize("kind", MAKERS)
def test_a_full_disk_leaves_the_old_files(base, tmp_path, kind):
    """safetensors reports it by an error of its own."""
    model = MAKERS[kind](base)
    lk.save_adapter(model, tmp_path)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            lk.save_adapter(randomise(model), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert contents(tmp_path) == before


def test_the_error_of_safetensors_becomes_that_of_the_system(base, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        lk.save_adapter(injected(base), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("kind", MAKERS)
def test_permissions_are_those_of_the_umask(base, tmp_path, kind, umask):
    before = os.umask(umask)
    try:
        lk.save_adapter(MAKERS[kind](base), tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys(BOTH, 0o666 & ~umask)
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o777 & ~umask


# --------------------------------------------------------------------------------------------------- interruptions

STEPS = ("rename", "unlink", "replace")


def calls_of(save, monkeypatch):
    """How often ``save`` calls each function that changes a directory."""
    counts = dict.fromkeys(STEPS, 0)
    for name in STEPS:
        original = getattr(os, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counts[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)
    save()
    monkeypatch.undo()
    return [(name, call) for name in STEPS for call in range(1, counts[name] + 1)]


class Killed(BaseException):
    pass


def killed_at(name, call, monkeypatch):
    """From this call on nothing of this process reaches the disk, as after a SIGKILL."""
    state = {"calls": 0, "dead": False}

    def wrap(function, counts):
        original = getattr(os, function)

        def wrapped(*args, **kwargs):
            if counts:
                state["calls"] += 1
                state["dead"] |= state["calls"] == call
            if state["dead"]:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(os, function, wrapped)

    for function in (*STEPS, "rmdir", "mkdir"):
        wrap(function, function == name)
    remove = shutil.rmtree  # the clean-up of a block that is left, which a killed process does not come to
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None if state["dead"] else remove(*args, **kwargs))


@pytest.mark.parametrize("kind", MAKERS)
def test_killed_anywhere_the_old_or_the_new_adapter_is_there(base, tmp_path, kind, monkeypatch):
    """The two differ in alpha only: new weights beside the old config would load, and compute something else."""
    names = {"injected": "alpha", "peft": "lora_alpha"}
    old = MAKERS[kind](twin(base), **{names[kind]: 6})
    new = MAKERS[kind](twin(base), **{names[kind]: 48})
    expected = {"old": logits(old), "new": logits(new)}

    def which(found):
        """ "old" or "new"; an error if it is neither"""
        return next(name for name, value in expected.items() if torch.allclose(found, value, atol=1e-5))

    lk.save_adapter(old, tmp_path / "count")
    points = calls_of(lambda: lk.save_adapter(new, tmp_path / "count"), monkeypatch)
    assert len(points) >= 4

    seen = set()
    for number, (name, call) in enumerate(points):
        directory = tmp_path / str(number)
        lk.save_adapter(old, directory)
        with monkeypatch.context() as patch:
            killed_at(name, call, patch)
            with pytest.raises(Killed):
                lk.save_adapter(new, directory)
        model = twin(base)
        lk.load_adapter(model, directory)
        seen.add(which(logits(model.eval())))
        theirs = []  # whoever does not know of .saved reads an adapter as a whole, or nothing
        error = error_of(lambda: theirs.append(as_peft_reads(base, directory)))  # noqa: B023  called at once
        assert "adapter_config.json" in str(error) if error else which(theirs[0])
        lk.save_adapter(new, directory)  # cleans up
        assert sorted(os.listdir(directory)) == BOTH
        torch.testing.assert_close(as_peft_reads(base, directory), expected["new"], rtol=1e-5, atol=1e-5)
    assert seen == {"old", "new"}


@pytest.mark.parametrize("kind", MODELS)
def test_what_others_saved_after_a_kill_counts(base, saved, kind):
    """PEFT does not know of .saved; what is in there must not come before what it wrote later."""
    (saved / ".saved").mkdir()
    os.rename(saved / CONFIG, saved / ".saved" / CONFIG)
    os.utime(saved / ".saved" / CONFIG, (1, 1))
    newer = with_peft(twin(base), lora_alpha=6 if kind != "plain" else 99)
    newer.save_pretrained(saved)
    model = MODELS[kind](twin(base))
    lk.load_adapter(model, saved)
    torch.testing.assert_close(logits(model.eval()), logits(newer), rtol=1e-5, atol=1e-5)
    lk.save_adapter(model, saved)
    assert not (saved / ".saved").exists()
    torch.testing.assert_close(as_peft_reads(base, saved), logits(newer), rtol=1e-5, atol=1e-5)


def test_ctrl_c_between_the_renames_completes_them(base, tmp_path, monkeypatch):
    old, new = injected(twin(base)), injected(twin(base), alpha=48)
    lk.save_adapter(old, tmp_path)
    original, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lk.save_adapter(new, tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == BOTH
    torch.testing.assert_close(as_peft_reads(base, tmp_path), logits(new), rtol=1e-5, atol=1e-5)


def test_leftovers_of_a_kill_are_removed(base, saved):
    """A real one: the process dies while it writes."""
    code = f"""
import os, signal, torch, safetensors.torch
import lora_kernels as lk
safetensors.torch.save_file = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
lk.save_adapter(torch.nn.ModuleDict({{"q": lk.LoRALinear(4, 4, r=2, alpha=2)}}), {str(saved)!r})
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert any(name.startswith(".saving-") for name in os.listdir(saved))
    (saved / "notes.txt").write_text("mine")
    (saved / "runs").mkdir()
    lk.load_adapter(twin(base), saved)
    lk.save_adapter(injected(base), saved)
    assert sorted(os.listdir(saved)) == [*BOTH, "notes.txt", "runs"]


def test_a_save_that_is_under_way_is_not_taken_for_a_leftover(base, tmp_path, monkeypatch):
    """And a reader waits for it: he sees two files of one save."""
    old, new = injected(twin(base)), injected(twin(base), alpha=48)
    lk.save_adapter(old, tmp_path)
    writing, go_on = threading.Event(), threading.Event()
    original = safetensors.torch.save_file

    def slow(*args, **kwargs):
        writing.set()
        go_on.wait(30)
        return original(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", slow)
    done = []
    model = twin(base)
    threads = [threading.Thread(target=lambda: done.append(("new", lk.save_adapter(new, tmp_path))))]
    threads[0].start()
    assert writing.wait(30)
    threads.append(threading.Thread(target=lambda: done.append(("load", lk.load_adapter(model, tmp_path)))))
    threads[1].start()
    time.sleep(0.2)
    assert not done
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert {what for what, _ in done} == {"new", "load"}
    torch.testing.assert_close(logits(model.eval()), logits(new), rtol=1e-5, atol=1e-5)


def test_where_there_are_no_locks(base, tmp_path, monkeypatch):
    """As on some network drives: nothing is removed that may be another's."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".saving-other").mkdir()
    (tmp_path / ".saved").mkdir()  # of a process that died
    (tmp_path / ".saved" / CONFIG).write_text("{}")
    model = injected(base)
    lk.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".saving-other", *BOTH]
    lk.load_adapter(model, tmp_path)


def test_a_read_only_directory_is_read(base, saved):
    saved.chmod(0o555)
    try:
        lk.load_adapter(twin(base), saved)
    finally:
        saved.chmod(0o755)
    assert sorted(os.listdir(saved)) == BOTH


def test_one_file_needs_no_detour(tmp_path, monkeypatch):
    with files.replacing(tmp_path) as staged:
        (staged / "log.json").write_text("1")
    renamed = []
    monkeypatch.setattr(os, "rename", lambda *args: renamed.append(args))
    with files.replacing(tmp_path) as staged:
        (staged / "log.json").write_text("2")
    assert (tmp_path / "log.json").read_text() == "2"
    assert not renamed


def test_peft_models_of_other_methods_are_saved_and_named_when_they_do_not_fit(base, tmp_path):
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = get_peft_model(twin(base), config)
    lk.save_adapter(model, tmp_path / "ia3")
    assert isinstance(PeftModel.from_pretrained(twin(base), tmp_path / "ia3"), PeftModel)
    lk.save_adapter(with_peft(twin(base)), tmp_path / "lora")
    with pytest.raises(ValueError, match=rf"{CONFIG}: peft_type is 'LORA', the model's adapter is of .*IA3"):
        lk.load_adapter(model, tmp_path / "lora")
