"""Schedules by measurement: what is remembered of timed layers, and that dispatch follows it for who wants it."""

from __future__ import annotations

import json
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import pretend_gpu

import lora_kernels as lk
from lora_kernels import dispatch, measured
from lora_kernels.benchmarks.cases import Result
from lora_kernels.benchmarks.measure import Ratio
from lora_kernels.benchmarks.winners import winners_of
from lora_kernels.cli import main
from lora_kernels.support import cuda, triton, winners
from lora_kernels.triton_kernels.launching import Device

META = torch.device("meta")
BF16, FP32 = torch.bfloat16, torch.float32
M, N, K, RANK = 4096, 1024, 512, 16
EAGER = {"float_adapters": False, "dropout": False, "captured": False}
FORWARD = winners.problem(BF16, M, N, K, RANK, backward=False, **EAGER)
BACKWARD = winners.problem(BF16, M, K, N, RANK, backward=True, **EAGER)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A pretended sm_90 with files of its own, on which Triton serves and is not preferred; winners are wanted."""
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "is_installed", lambda: True)
    monkeypatch.setattr(triton, "version", lambda: (3, 7))
    monkeypatch.setattr(triton, "device_of", lambda _: Device("sm_90", 10**6))
    monkeypatch.setattr(winners, "device_name", lambda device: "GPU of (this) test")
    monkeypatch.setattr(winners, "ENABLED", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    winners.known.cache_clear()
    yield
    winners.known.cache_clear()


def verdicts(m=M, adapters=BF16):
    """Of CUDA, on a forward and on a backward."""
    x, grad_y, s, weight = (
        torch.empty(size, dtype=BF16, device="meta") for size in ((m, K), (m, N), (m, RANK), (N, K))
    )
    lora_A, lora_B = (torch.empty(size, dtype=adapters, device="meta") for size in ((RANK, K), (N, RANK)))
    specs = dispatch.specs()
    forward = specs["lora_linear"].kernels["cuda"].supports(x, weight, lora_A, lora_B, None, None, 1.0, 0.0)
    args = (grad_y, x, s, weight, lora_A, lora_B, None, 1.0, 0.0, True, True, True)
    return forward, specs["lora_linear_backward"].kernels["cuda"].supports(*args)


def test_dispatch_follows_what_was_measured(gpu):
    assert verdicts() == (cuda.TENSOR_CORES, cuda.TENSOR_CORES)
    winners.remember(META, {FORWARD: "cuda, one launch", BACKWARD: "triton"})
    forward, backward = verdicts()
    assert forward == ("one launch", "measured to be fastest")
    assert backward == (None, lk.Reason.MEASURED_TRITON)
    assert verdicts(m=M - 100)[0] == forward, "as many rows, up to a power of two"
    assert verdicts(m=2 * M)[0] == cuda.TENSOR_CORES, "not measured"


def test_who_asks_for_a_backend_or_a_schedule_gets_it(gpu):
    winners.remember(META, {FORWARD: "triton"})
    with lk.use_backend("cuda"):
        assert verdicts()[0] == cuda.TENSOR_CORES
    with cuda.use_schedule("cublas"):
        assert verdicts()[0].schedule == "cublas"


def test_a_graph_has_winners_of_its_own(gpu, monkeypatch):
    """What holds the host counts outside of a graph alone."""
    winners.remember(META, {f"{FORWARD} captured": "triton", FORWARD: "cuda, cublas"})
    assert verdicts()[0].schedule == "cublas"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert verdicts()[0] == (None, lk.Reason.MEASURED_TRITON)


def test_adapters_of_float32_have_winners_of_their_own(gpu):
    """Kills: what was fastest with adapters of the activations' dtype is taken for theirs."""
    winners.remember(META, {FORWARD: "cuda, cublas", BACKWARD: "triton"})
    assert verdicts(adapters=FP32) == (cuda.TENSOR_CORES, cuda.TENSOR_CORES)
    winners.remember(META, {f"{problem} fp32 adapters": "cuda, one launch" for problem in (FORWARD, BACKWARD)})
    assert [verdict.schedule for verdict in verdicts(adapters=FP32)] == ["one launch"] * 2
    assert verdicts()[0].schedule == "cublas"


def test_triton_wins_only_where_it_serves(gpu, monkeypatch):
    winners.remember(META, {FORWARD: "triton"})
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    assert verdicts()[0] == cuda.TENSOR_CORES


def test_off_unless_wanted(gpu, monkeypatch):
    winners.remember(META, {FORWARD: "cuda, cublas"})
    monkeypatch.setattr(winners, "ENABLED", False)
    assert verdicts()[0] == cuda.TENSOR_CORES


def test_the_file_names_the_device_and_keeps_what_others_wrote(gpu):
    path = winners.remember(META, {FORWARD: "triton"})
    assert "winners-GPU-of-this-test-" in path.name
    winners.remember(META, {BACKWARD: "cuda, cublas"})
    assert json.loads(path.read_text()) == {FORWARD: "triton", BACKWARD: "cuda, cublas"}


@pytest.mark.parametrize("later", ["torch", "triton", "no triton"])
def test_other_versions_have_winners_of_their_own(gpu, monkeypatch, later):
    """Kills: what was fastest with an earlier cuBLAS, or Triton, is taken for what is."""
    winners.remember(META, {FORWARD: "cuda, cublas"})
    assert verdicts()[0].schedule == "cublas"
    if later == "torch":
        monkeypatch.setattr(torch, "__version__", "99.1.0+cu999")
    elif later == "triton":
        monkeypatch.setattr(triton, "version", lambda: (99, 1))
    else:
        monkeypatch.setattr(triton, "is_installed", lambda: False)
    winners.known.cache_clear()
    assert verdicts()[0] == cuda.TENSOR_CORES


def test_who_writes_at_once_loses_nothing(gpu, monkeypatch):
    """Kills: two read the file before either has written it, and the later one drops what the earlier one added."""
    right, names = measured.read, [f"{FORWARD} {i}" for i in range(4)]

    def slow_read(*args):
        found = right(*args)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(measured, "read", slow_read)
    path = winners.path(META)
    writers = [threading.Thread(target=winners.remember, args=(META, {name: "triton"})) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert json.loads(path.read_text()) == dict.fromkeys(names, "triton")


def test_a_write_that_fails_leaves_the_file_as_it_was(gpu, monkeypatch):
    """Kills: every failure leaves a temporary file behind."""
    path = winners.remember(META, {FORWARD: "triton"})
    before = {file.name for file in path.parent.iterdir()}

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.warns(UserWarning, match="winners are not remembered: no space left"):
        winners.remember(META, {BACKWARD: "triton"})
    assert {file.name for file in path.parent.iterdir()} == before
    assert json.loads(path.read_text()) == {FORWARD: "triton"}


def test_a_file_of_something_else_is_ignored_with_a_warning(gpu):
    path = winners.remember(META, {FORWARD: "triton"})
    path.write_text(json.dumps({FORWARD: "rocm"}))
    winners.known.cache_clear()
    with pytest.warns(UserWarning, match="not a cache of winners"):
        assert verdicts()[0] == cuda.TENSOR_CORES


def test_problems(fp32_precision):
    fp32_precision("tf32")
    tf32 = winners.problem(FP32, 3000, 8, 16, 12, backward=False, **EAGER)
    assert tf32 == "forward tf32 8x16 rows<=4096 rank<=16"
    kinds = dict.fromkeys(("float_adapters", "dropout", "backward", "captured"), True)
    dropped = winners.problem(BF16, 1, 8, 16, 1, **kinds)
    assert dropped == "backward bfloat16 8x16 rows<=1 rank<=1 fp32 adapters dropout captured"


# ------------------------------------------------------------------------------------------------------- from times


def timed(what, seconds, *, null=1.0, dropout=0.0, m=M, dtype="bfloat16", fp32_adapters=False):
    fused = dict(zip(("fused, cuda, one launch", "fused, cuda, cublas", "fused, triton"), seconds))
    names = {"PEFT again": Ratio(null, null, null)}
    return Result(
        "layer", f"a layer, {dtype}, dropout {dropout:g}", what, seconds={"PEFT": 9.0, "fused": 2.0, **fused},
        speedup=names, over_frozen={}, saved={}, peak={}, flops=0, bytes=0, light_share=None,
        shape={"m": m, "n": N, "k": K, "rank": RANK, "dropout": dropout, "fp32_adapters": fp32_adapters},
        served={}, declined={}, schedules={},
    )  # fmt: skip


def test_forward_and_backward_have_winners_of_their_own():
    # Backwards alone: 7, 3, 4.
    found = winners_of([timed("forward+backward", (8.0, 5.0, 7.0)), timed("forward", (1.0, 2.0, 3.0))], captured=False)
    assert found == {FORWARD: "cuda, one launch", BACKWARD: "cuda, cublas"}


def test_dropout_is_another_problem():
    found = winners_of([timed("forward", (1.0, 2.0)), timed("forward", (2.0, 1.0), dropout=0.1)], captured=False)
    assert found == {FORWARD: "cuda, one launch", f"{FORWARD} dropout": "cuda, cublas"}


def test_adapters_of_float32_are_another_problem():
    found = winners_of([timed("forward", (1.0, 2.0)), timed("forward", (2.0, 1.0), fp32_adapters=True)], captured=False)
    assert found == {FORWARD: "cuda, one launch", f"{FORWARD} fp32 adapters": "cuda, cublas"}


def test_decoding_is_a_forward():
    (problem,) = winners_of([timed("decode", (2.0, 3.0, 1.0), m=1)], captured=False).items()
    assert problem == (winners.problem(BF16, 1, N, K, RANK, backward=False, **EAGER), "triton")


@pytest.mark.parametrize(
    "result",
    [
        timed("forward", (1.0, 2.0), null=1.5),
        timed("forward", (1.0,)),
        timed("forward", (1.0, 2.0), dtype="float64"),
        timed("forward+backward", (1.0, 2.0)),
    ],
    ids=["noisy", "one candidate", "dtype", "backward without its forward"],
)
def test_results_that_say_nothing(result):
    assert winners_of([result], captured=False) == {}


def test_bench_writes_winners_of_one_layer_on_a_gpu_alone(capsys, monkeypatch):
    assert main(["bench", "--write-winners", "--device", "cpu"]) == 2
    assert "--device cuda" in capsys.readouterr().err
    from lora_kernels.cli import bench

    written = []
    results = [timed("forward", (1.0, 2.0, 3.0))]
    monkeypatch.setattr(bench, "pick_device", lambda name: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(bench, "_measure_all", lambda *_, eager=False: (results, {"device": "a GPU"}, None))
    monkeypatch.setattr(winners, "remember", lambda device, found: written.append(found) or "there")
    assert main(["bench", "--write-winners", "--json"]) == 0
    assert written == [dict.fromkeys((FORWARD, f"{FORWARD} captured"), "cuda, one launch")]
    printed = capsys.readouterr()
    assert json.loads(printed.out)["environment"] == {"device": "a GPU"}
    assert "wrote there" in printed.err
