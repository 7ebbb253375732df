"""Which backend serves a call, and that it can always be told why."""

import contextlib
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import pretend_gpu
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels import _native, dispatch
from lora_kernels.ops import lora_linear
from lora_kernels.support import cuda as _cuda


def tensors(dtype=torch.float32, m=3):
    return (
        torch.randn(m, 8, dtype=dtype),
        torch.randn(6, 8, dtype=dtype),
        torch.randn(2, 8, dtype=dtype),
        torch.randn(6, 2, dtype=dtype),
    )


def test_every_backend_is_listed_with_a_reason():
    backends = lk.backends()
    assert tuple(backends) == lk.BACKENDS
    assert backends["cpu"] == (True, "lora_kernels._C")
    assert backends["reference"].available
    for status in backends.values():
        assert status.detail


def test_why_says_what_then_happens():
    t = tensors()
    choice = lk.why("lora_linear", *t, dropout_p=0.5, training=True)
    assert choice.backend == "cpu"
    assert choice.schedule == "aten"
    assert lk.stats()["served"] == {}, "why must compute nothing"
    state = torch.get_rng_state()
    lk.why("lora_linear", *t, dropout_p=0.5, training=True)
    assert torch.equal(torch.get_rng_state(), state), "why must draw no random number"
    lk.lora_linear(*t)
    assert lk.stats()["served"] == {("lora_linear", choice.backend): 1}


def test_why_names_the_faster_path_that_was_passed_over():
    choice = lk.why("lora_linear", *tensors(torch.float64), dropout_p=0.5, training=True)
    assert choice.backend == "reference"
    assert "cpu: dtype not served" in choice.reason


def cuda_verdict(monkeypatch, *, m=3, n=6, k=8, rank=2, dtype=torch.bfloat16, capability=(8, 0), problem=None):
    """What the CUDA kernel of lora_linear says to a call; meta tensors, so that sizes cost nothing."""
    pretend_gpu(monkeypatch, capability, problem)
    shapes = ((m, k), (n, k), (rank, k), (n, rank))
    x, weight, A, B = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return dispatch.specs()["lora_linear"].kernels["cuda"].supports(x, weight, A, B, None, None, 1.0, 0.0)


@pytest.mark.parametrize(
    "call",
    [{}, {"dtype": torch.float16}, {"rank": 256}, {"m": 0}, {"m": 2**22, "n": 2**17}, {"capability": (12, 0)}],
    ids=str,
)
def test_cuda_serves(monkeypatch, call):
    assert cuda_verdict(monkeypatch, **call) == _cuda.TENSOR_CORES


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": torch.float32}, lk.Reason.FP32_STRICT),  # torch's default
        ({"dtype": torch.float64}, lk.Reason.DTYPE),
        ({"rank": 257}, lk.Reason.RANK),
        ({"m": 2**31 - 1}, lk.Reason.SIZE),
        ({"k": 2**25 + 1}, lk.Reason.SIZE),
        ({"n": 2**25 + 1}, lk.Reason.SIZE),
        ({"m": 2**24, "n": 2**20}, lk.Reason.SIZE),
        ({"capability": (7, 5)}, lk.Reason.ARCHITECTURE),
        ({"problem": (lk.Reason.DRIVER, "")}, lk.Reason.DRIVER),
        ({"problem": (lk.Reason.NOT_COMPILED, "")}, lk.Reason.NOT_COMPILED),
    ],
    ids=str,
)
def test_cuda_refuses_with_its_reason(monkeypatch, call, reason):
    assert cuda_verdict(monkeypatch, **call) == (None, reason)


KINDS = {"driver": lk.Reason.DRIVER, "architecture": lk.Reason.NOT_COMPILED, "other": lk.Reason.CUDA_ERROR}


@pytest.fixture
def extension(monkeypatch):
    """extension(problem): a ``lora_kernels._cuda`` and a GPU on which it has that problem, or none."""
    asked = []

    def load(problem):
        def usable():
            asked.append(problem)
            return problem, "what CUDA says" if problem else ""

        monkeypatch.setattr(_native, "cuda", SimpleNamespace(usable=usable))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(_cuda, "capability", lambda device: (8, 0))
        monkeypatch.setattr(_native, "_found", {})
        return asked

    return load


def every_cuda_verdict():
    """To a call of every op that has a kernel in the extension, by name."""
    BF16, meta = torch.bfloat16, torch.device("meta")
    rows = torch.empty(4, 8, dtype=BF16, device=meta)
    x, weight, A, B = (torch.empty(size, dtype=BF16, device=meta) for size in ((3, 8), (6, 8), (2, 8), (6, 2)))
    y, s = torch.empty(3, 6, dtype=BF16, device=meta), torch.empty(3, 2, dtype=BF16, device=meta)
    ids = torch.empty(1, 5, dtype=torch.int64, device=meta)
    kv = torch.empty(1, 2, 4, 2, dtype=BF16, device=meta)
    embeds = torch.empty(1, 9, 8, dtype=BF16, device=meta)
    needs = (True, True, True)
    groups_W, groups_A, groups_B = (torch.empty(2, *t, dtype=BF16, device=meta) for t in ((8, 8), (2, 8), (8, 2)))
    ends = torch.empty(2, dtype=torch.int32, device=meta)
    pools = x, groups_W[0], groups_A, groups_B, torch.empty(3, dtype=torch.int64, device=meta), None, None
    calls = {
        "lora_linear": (x, weight, A, B, None, None, 1.0, 0.0),
        "lora_linear_backward": (y, x, s, weight, A, B, None, 1.0, 0.0, *needs),
        "grouped_lora_linear": (x, groups_W, groups_A, groups_B, ends, None, None, 1.0, 0.0),
        "grouped_lora_linear_backward": (x, x, s, groups_W, groups_A, groups_B, ends, None, 1.0, 0.0, *needs),
        "multi_lora_linear": (*pools, None, None, 1.0, 0.0),
        "multi_lora_linear_backward": (x, x, s, *pools[1:], None, 1.0, 0.0, *needs),
        "multi_lora_shrink": (x, groups_A, pools[4], None, None, None),
        "multi_lora_expand_": (x, s, groups_B, pools[4], None, None, 1.0, None, None),
        "dropout_mask": (ids, 3, 8, 0.5),
        "prompt_embedding": (rows, ids, weight, *(None,) * 5, False),
        "prompt_embedding_backward": (embeds, ids, None, None, 0, 4, BF16, 0, True, False, False),
        "prefix_kv": (rows, 1, 2, 1, False, BF16),
        "prefix_kv_backward": ([kv, kv], BF16),
        "dequantize": ([rows], "codes4", 4, 8, 8, BF16),
    }
    kernels = {name: spec.kernels["cuda"] for name, spec in dispatch.specs().items() if "cuda" in spec.kernels}
    assert {name for name, kernel in kernels.items() if kernel.run is None} == calls.keys(), "those of the extension"
    return {name: kernels[name].supports(*args) for name, args in calls.items()}


def test_every_cuda_kernel_serves_on_a_gpu_that_works(extension):
    asked = extension("")
    assert not [name for name, verdict in every_cuda_verdict().items() if verdict.schedule is None]
    every_cuda_verdict()
    assert len(asked) == 1, "once per device, not per call"
    assert lk.backends()["cuda"] == (True, "lora_kernels._cuda")


@pytest.mark.parametrize("problem", KINDS)
def test_no_cuda_kernel_runs_where_the_extension_does_not(extension, problem):
    # Refused, not raised: the next backend serves the call.
    extension(problem)
    assert set(every_cuda_verdict().values()) == {(None, KINDS[problem])}
    status = lk.backends()["cuda"]
    assert not status.available
    assert str(KINDS[problem]) in status.detail
    assert "what CUDA says" in status.detail


@pytest.mark.parametrize(("problem", "served"), [("other", True), ("driver", False), ("architecture", False)])
def test_an_error_of_cuda_that_may_pass_is_asked_about_again(extension, monkeypatch, problem, served):
    """Kills: memory that was exhausted at the first call turns CUDA off for as long as the process lives."""
    asked = extension(problem)
    every_cuda_verdict()
    monkeypatch.setattr(_native.cuda, "usable", lambda: ("", ""))
    serving = [verdict.schedule is not None for verdict in every_cuda_verdict().values()]
    assert set(serving) == {served}
    assert (len(asked) == 1) == (problem != "other"), "what stays so is asked once"


@pytest.mark.skipif(_native.cuda is None, reason=f"lora_kernels._cuda: {_native.cuda_error}")
def test_the_extension_itself_says_what_is_wrong():
    problem, detail = _native.cuda.usable()
    assert problem in {"", *KINDS}
    assert bool(problem) == bool(detail)
    assert problem or torch.cuda.is_available(), "there is no GPU here"


def test_no_cuda_kernel_runs_on_an_old_gpu(extension, monkeypatch):
    extension("")
    monkeypatch.setattr(_cuda, "capability", lambda device: (7, 5))
    assert set(every_cuda_verdict().values()) == {(None, lk.Reason.ARCHITECTURE)}


def test_cuda_serves_float32_where_torch_allows_tf32(monkeypatch, fp32_precision):
    fp32_precision("tf32")
    assert cuda_verdict(monkeypatch, dtype=torch.float32) == _cuda.TENSOR_CORES
    assert cuda_verdict(monkeypatch, dtype=torch.float64) == (None, lk.Reason.DTYPE)


def test_why_knows_dora():
    x, weight, A, B = torch.randn(9, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    assert lk.why("dora_linear", x, weight, A, B, torch.ones(6)) == lk.why("lora_linear", x, weight, A, B)


def test_why_checks_arguments_and_names():
    with pytest.raises(ValueError, match="unknown op 'lora'"):
        lk.why("lora")
    with pytest.raises(ValueError, match="x must be"):
        lk.why("lora_linear", torch.randn(3, 9), *tensors()[1:])


def test_use_backend_nests_and_restores():
    t = tensors()
    assert dispatch.forced_backend() is None
    with lk.use_backend("reference"):
        assert lk.why("lora_linear", *t).backend == "reference"
        with lk.use_backend("cpu"):
            assert lk.why("lora_linear", *t).backend == "cpu"
        with lk.use_backend(None):
            assert lk.why("lora_linear", *t).backend == "cpu"
        assert lk.why("lora_linear", *t).backend == "reference"
    assert dispatch.forced_backend() is None


def test_use_backend_as_a_call_lasts():
    setting = lk.use_backend("reference")
    try:
        lk.lora_linear(*tensors())
    finally:
        setting.__exit__()
    assert lk.stats()["served"] == {("lora_linear", "reference"): 1}


def test_use_backend_belongs_to_its_thread():
    seen = []
    with lk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(lk.why("lora_linear", *tensors()).backend))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_backward_runs_on_the_backend_of_the_forward():
    x, weight, A, B = tensors()
    with lk.use_backend("reference"):
        y = lk.lora_linear(x, weight, A.requires_grad_(), B)
    y.sum().backward()
    assert lk.stats()["served"] == {("lora_linear", "reference"): 1, ("lora_linear_backward", "reference"): 1}


@pytest.mark.parametrize("schedule", ["one launch", "cublas"])
def test_backward_takes_the_schedule_of_the_forward(monkeypatch, schedule):
    """Kills: the thread in which autograd runs knows nothing of ``use_schedule``."""
    pretend_gpu(monkeypatch)
    verdicts = []

    def run_backward(*args):
        verdicts.append(lora_linear.BACKWARD.kernels["cuda"].supports(*args))
        return lora_linear.BACKWARD.reference(*args)

    monkeypatch.setattr(lora_linear, "run_backward", run_backward)
    x, weight, A, B = tensors(torch.bfloat16)
    with _cuda.use_schedule(schedule):
        y = lk.lora_linear(x, weight, A.requires_grad_(), B)
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
    lk.lora_linear(x, weight, A, B).sum().backward()
    asked, unasked = verdicts
    assert asked.schedule == schedule
    assert unasked == _cuda.TENSOR_CORES


def test_a_forced_backend_that_cannot_serve_raises_with_the_reason():
    with pytest.raises(ValueError, match="use_backend: unknown backend 'gpu', expected one of cuda"):
        lk.use_backend("gpu")
    with (
        lk.use_backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' was asked for, but the tensors are on 'cpu'"),
    ):
        lk.lora_linear(*tensors())
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot serve this call: dtype not served"):
        lk.lora_linear(*tensors(torch.float64), dropout_p=0.5, training=True)


@pytest.mark.parametrize(("value", "outcome"), [("reference", "reference"), ("quantum", "unknown backend 'quantum'")])
def test_environment_variable(value, outcome):
    code = "import torch, lora_kernels as lk; print(lk.why('dropout_mask', 2, 8, 0.5, 0).backend)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"LORA_KERNELS_BACKEND": value, "PATH": ""}, capture_output=True, text=True
    )
    assert outcome in run.stdout + run.stderr
    assert (run.returncode == 0) == (value == "reference")


def test_stats_count_and_reset():
    t = tensors()
    for _ in range(3):
        lk.lora_linear(*t)
    lk.lora_linear(*tensors(torch.float64), dropout_p=0.5, training=True)
    assert lk.stats() == {
        "served": {("lora_linear", "cpu"): 3, ("lora_linear", "reference"): 1},
        "fallback": {("lora_linear", str(lk.Reason.DTYPE)): 1},
    }
    lk.reset_stats()
    assert lk.stats() == {"served": {}, "fallback": {}}


def test_stats_lose_no_count_between_threads():
    t = tensors()
    threads = [threading.Thread(target=lambda: [lk.lora_linear(*t) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lk.stats()["served"] == {("lora_linear", "cpu"): 800}


def test_own_stats_leave_other_threads_their_counts():
    """Kills: calls of another thread, counted with a trial's and forgotten with them."""
    t = tensors()
    lk.lora_linear(*t)
    thread = threading.Thread(target=lambda: [lk.lora_linear(*t) for _ in range(3)])
    with dispatch.own_stats():
        assert lk.stats() == {"served": {}, "fallback": {}}
        lk.lora_linear(*t)
        thread.start()
        thread.join()
        dispatch.count_fallback("lora_linear", lk.Reason.DTYPE)
        assert lk.stats()["served"] == {("lora_linear", "cpu"): 1}
        lk.reset_stats()
        dispatch.count_served("lora_linear", "cpu")
    assert lk.stats() == {"served": {("lora_linear", "cpu"): 4}, "fallback": {}}


def test_own_stats_have_the_gradients_that_another_thread_forms():
    """As autograd does those of a GPU. Kills: a trial's backward that everybody finds counted."""
    x, weight, A, B = tensors()
    with dispatch.own_stats():
        total = lk.lora_linear(x, weight, A.requires_grad_(), B).sum()
        thread = threading.Thread(target=total.backward)
        thread.start()
        thread.join()
        assert lk.stats()["served"] == {("lora_linear", "cpu"): 1, ("lora_linear_backward", "cpu"): 1}
    assert lk.stats()["served"] == {}


@pytest.mark.parametrize("name", sorted(dispatch.specs()))
def test_every_op_states_its_cost_and_its_shapes(name):
    spec = dispatch.specs()[name]
    assert spec.flops is not None
    assert spec.bytes is not None
    assert callable(spec.fake)
    assert set(spec.kernels) <= set(lk.BACKENDS)


def test_cost_model_of_lora_linear():
    m, n, k, r = 128, 96, 64, 8
    x, weight, A, B = torch.empty(m, k), torch.empty(n, k), torch.empty(r, k), torch.empty(n, r)
    spec = dispatch.specs()["lora_linear"]
    args = (x, weight, A, B, None, None, 1.0, 0.0)
    with FlopCounterMode(display=False) as counter:
        spec.reference(*args)
    assert spec.flops(*args) == counter.get_total_flops() == 2 * m * k * (n + r) + 2 * m * n * r
    assert spec.bytes(*args) == 4 * (m * k + n * k + m * n + m * r + r * k + r * n)
    backward = dispatch.specs()["lora_linear_backward"]
    for needs in ((True, True, True), (True, False, False), (False, True, True), (False, False, True)):
        args = (torch.empty(m, n), x, torch.empty(m, r), weight, A, B, None, 1.0, 0.0, *needs)
        with FlopCounterMode(display=False) as counter:
            spec_flops = backward.flops(*args)
            backward.reference(*args)
        # The reference always forms grad_s; dB alone does not need it.
        assert spec_flops == counter.get_total_flops() - (0 if needs[0] or needs[1] else 2 * m * n * r)
