"""multi_lora_linear's route to its CUDA kernels: verdicts, refusals, and the function with gradients, emulated."""

from __future__ import annotations

import types

import emulator
import pytest
import torch
from emulated_multi import check_forward, names, problem, run_forward, steered
from pretended_gpu import pretend_gpu
from test_emulated_multi import ids_of

import lora_kernels as lk
from lora_kernels import _native, dispatch
from lora_kernels.reasons import Reason
from lora_kernels.support import cuda, pools_fit


@pytest.fixture
def _cuda_on_the_cpu(monkeypatch):
    """Tensors on the CPU are served by the CUDA backend, emulated."""
    steered()
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(_native, "cuda", types.SimpleNamespace())
    monkeypatch.setitem(dispatch._ORDER, "cpu", ("cuda", "reference"))
    for name in ("multi_lora_linear", "multi_lora_linear_backward"):
        monkeypatch.setitem(dispatch._native_ops, name, getattr(torch.ops.lora_kernels_emulated_multi, name))


@pytest.mark.usefixtures("_cuda_on_the_cpu")
@pytest.mark.parametrize("rows", [20, 100])
@pytest.mark.parametrize("scaling", [1.7, torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)], ids=["one", "each"])
def test_the_backend_serves_the_function(rows, scaling):
    q = problem(ids_of("scattered", rows, 3), (8, 3, 16), 72, 136, "bf16", bias=True)
    leaves = [t.requires_grad_() for t in (q.x, q.lora_A, q.lora_B)]
    results = []
    for backend in ("cuda", "reference"):
        with lk.use_backend(backend):
            y = lk.multi_lora_linear(*leaves[:1], q.weight, *leaves[1:], q.adapter_ids, q.bias, ranks=q.ranks,
                                     scaling=scaling)  # fmt: skip
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert lk.stats()["served"][("multi_lora_linear", "cuda")] == 1
    assert lk.stats()["served"][("multi_lora_linear_backward", "cuda")] == 1
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.usefixtures("_cuda_on_the_cpu")
@pytest.mark.parametrize("rows", [20, 100])
def test_opcheck_and_compile(rows):
    q = problem(ids_of("scattered", rows, 3), (8, 3, 16), 72, 136, "bf16", bias=True)
    q = q._replace(lora_A=q.lora_A.nan_to_num(), lora_B=q.lora_B.nan_to_num())
    tensors = [t.requires_grad_() if i in (0, 2, 3) else t for i, t in enumerate(q)]
    torch.library.opcheck(torch.ops.lora_kernels.multi_lora_linear.default, (*tensors, torch.tensor([5]), 0.5, 0.25))
    compiled = torch.compile(lk.multi_lora_linear, backend="aot_eager", fullgraph=True)
    args = *tensors[:5], q.bias
    assert torch.equal(compiled(*args, ranks=q.ranks), lk.multi_lora_linear(*args, ranks=q.ranks))
    assert lk.stats()["served"][("multi_lora_linear", "cuda")] >= 2


@pytest.mark.usefixtures("_cuda_on_the_cpu")
@pytest.mark.parametrize(
    ("n", "k", "rank", "dtype", "reason"),
    [
        (72, 136, 8, torch.bfloat16, None),
        (72, 136, 5, torch.bfloat16, None),
        (75, 136, 8, torch.bfloat16, Reason.LAYOUT),
        (72, 70, 8, torch.bfloat16, Reason.LAYOUT),
        (72, 136, 257, torch.bfloat16, Reason.RANK),
        (72, 136, 8, torch.float64, Reason.DTYPE),
        (72, 136, 8, torch.float32, Reason.FP32_STRICT),
    ],
)
def test_verdicts(n, k, rank, dtype, reason):
    x, weight = torch.zeros(5, k, dtype=dtype), torch.zeros(n, k, dtype=dtype)
    for w in (weight, weight.t().contiguous().t()):
        schedule, why = cuda.multi_verdict(x, w, 3, rank)
        assert (schedule is None) == (reason is not None)
        assert reason is None or why == reason
    assert cuda.multi_verdict(x[:, :64].half(), weight[:64, :64].half(), 2**30, 8).reason == Reason.SIZE


@pytest.mark.parametrize("fault", ["k", "n"])
def test_weights_that_are_not_whole_are_refused(fault):
    emulator.load_multi_lora_linear()
    args = problem((0, 1), (8, 3), 75 if fault == "n" else 72, 70 if fault == "k" else 136, "bf16")
    with pytest.raises(RuntimeError, match="chunks of 16 bytes"):
        run_forward(args)


def test_ids_and_ranks_of_either_width():
    for wide in (False, True):
        *_, launches = check_forward(problem((1, -1, 0), (8, 3), 72, 136, "bf16", wide=wide))
        assert names(launches) == ["decode"]


FORWARD = {
    "x": torch.zeros(23, 128), "weight": torch.zeros(72, 128), "lora_A": torch.zeros(3, 8, 128),
    "lora_B": torch.zeros(3, 64, 8), "adapter_ids": torch.zeros(22, dtype=torch.int64), "ranks": torch.zeros(2),
    "scalings": torch.zeros(4), "bias": torch.zeros(64), "seed": torch.zeros(1, dtype=torch.int32),
}  # fmt: skip
BACKWARD = {"grad_y": torch.zeros(23, 64), "s": torch.zeros(22, 8), **FORWARD}
del BACKWARD["bias"]


def misfit(name, replacement, given):
    """Arguments of the op, in which this one does not fit."""
    keep = replacement.dtype if name == "seed" else given[name].dtype
    return list((given | {name: replacement.to(keep)}).values())


def test_nothing_is_launched_on_what_does_not_fit():
    """By the binding, and by what Triton's launches look at."""
    q = problem(ids_of("scattered", 23, 3), (8, 8, 8), 72, 136, "bf16", bias=True)
    given = {**q._asdict(), "seed": torch.tensor([3])}
    steered()
    ops = torch.ops.lora_kernels_emulated_multi
    for name, replacement in FORWARD.items():
        arguments = misfit(name, replacement, given)
        says = "x must be" if name == "weight" else f"{name} must be"
        with pytest.raises(RuntimeError, match=says):
            ops.multi_lora_linear(*arguments, 1.0, 0.5, "auto")
        with pytest.raises(RuntimeError, match=says):
            pools_fit.check_multi_lora_linear(*arguments)
    del given["bias"]
    given = dict(grad_y=torch.zeros(23, 72).bfloat16(), x=q.x, s=torch.zeros(23, 8).bfloat16()) | given
    for name, replacement in BACKWARD.items():
        arguments = misfit(name, replacement, given)
        says = "x must be" if name == "weight" else f"{name} must be"
        with pytest.raises(RuntimeError, match=says):
            ops.multi_lora_linear_backward(*arguments, 1.0, 0.5, True, True, True, "auto")
        with pytest.raises(RuntimeError, match=says):
            pools_fit.check_multi_lora_linear_backward(*arguments)
