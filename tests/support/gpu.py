"""What the tests that need a GPU share: both backends, problems, poisoned memory, the comparison with float64.

``LORA_KERNELS_REHEARSAL=1`` runs the same tests on the CPU, by the backends that it has, so that a mistake in one does
not wait for the first machine with a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from numerics import assert_as_accurate
from torch import Tensor

import lora_kernels as lk
from lora_kernels import dispatch
from lora_kernels.ops.lora_linear import BACKWARD, SPEC
from lora_kernels.support import cuda as cuda_support
from lora_kernels.support import triton as triton_support

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
REHEARSED = os.environ.get("LORA_KERNELS_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSED else "cuda")
HAS_WGMMA = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
_WGMMA = ("cuda, wgmma", "cuda, wgmma, clusters") if HAS_WGMMA else ()
ON_GPU = ("cuda, one launch", "cuda, cublas", *_WGMMA, "triton")
BACKENDS = ("cpu", "reference") if REHEARSED else ON_GPU
"""And, behind the comma, the schedule."""
SCALING, SEED = 1.7, -987654321012345
RESULTS = ("y", "dX", "dA", "dB")
GIB = 2**30

_HAS_GPU = torch.cuda.is_available()
needed = pytest.mark.skipif(
    not (_HAS_GPU or REHEARSED), reason="needs a GPU; the emulator and Triton's interpreter run the same kernels"
)
"""For what can be rehearsed on the CPU."""
only = pytest.mark.skipif(not _HAS_GPU, reason="needs a GPU: graphs, streams, or as much memory and speed")

_schedules: list[tuple[str, object]] = []
"""Of the running test: what its report shows of the schedules that were chosen (``conftest.py`` sums them up)."""


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """In turn, the name of a backend that every call of every thread takes, in a schedule that they take, too.

    As LORA_KERNELS_BACKEND and LORA_KERNELS_CUDA_SCHEDULE do it: autograd has threads of its own.
    """
    name, _, schedule = request.param.partition(", ")
    status = lk.backends()[name]
    if not status.available:
        pytest.skip(f"{name}: {status.detail}")
    monkeypatch.setattr(dispatch, "_forced", contextvars.ContextVar("forced", default=name))
    if schedule:
        monkeypatch.setattr(cuda_support, "_schedule", contextvars.ContextVar("schedule", default=schedule))
    monkeypatch.setitem(globals(), "_schedules", request.node.user_properties)
    return name


def unless_triton_is_old(call: Callable[[], Any]) -> Any:
    """``call()``; skips the test where the installed Triton, by its own version, is what cannot serve it."""
    try:
        return call()
    except RuntimeError as error:
        reason = str(error).partition("cannot serve this call: ")[2]
        if "Triton" in reason and triton_support.version() < triton_support.OLDEST:
            pytest.skip(reason)
        raise


# --------------------------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    """Operands of a LoRA linear and the gradient of its result, on the device."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    grad_y: Tensor
    p: float = 0.0

    @property
    def seed(self) -> Tensor | None:
        return torch.tensor([SEED], device=self.x.device) if self.p > 0 else None

    def double(self) -> Problem:
        return Problem(*(None if t is None else t.double() for t in self[:6]), self.p)


def problem(
    m: int | Sequence[int], n: int, k: int, rank: int, dtype: torch.dtype = BF16,
    adapter_dtype: torch.dtype | None = None, *, bias: bool = True, p: float = 0.0,
) -> Problem:  # fmt: skip
    """Random operands; ``m`` may be several leading sizes."""
    lead = (m,) if isinstance(m, int) else tuple(m)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    return Problem(
        random(*lead, k), random(n, k, scale=k**-0.5), random(rank, k, scale=k**-0.5, dtype=adapter_dtype),
        random(n, rank, scale=rank**-0.5, dtype=adapter_dtype), random(n) if bias else None, random(*lead, n), p,
    )  # fmt: skip


def fused(q: Problem) -> list[Tensor]:
    """[y, dX, dA, dB] of ``lk.lora_linear``."""
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (q.x, q.lora_A, q.lora_B))
    y = lk.lora_linear(
        x, q.weight, lora_A, lora_B, q.bias, scaling=SCALING, dropout_p=q.p, training=q.p > 0, seed=q.seed
    )
    return [y.detach(), *torch.autograd.grad(y, [x, lora_A, lora_B], q.grad_y)]


def inferred(q: Problem) -> Tensor:
    """y where no gradient is asked for, and another kernel may serve."""
    with torch.no_grad():
        return lk.lora_linear(*q[:5], scaling=SCALING, dropout_p=q.p, training=q.p > 0, seed=q.seed)


def by_torch(q: Problem) -> list[Tensor]:
    """[y, dX, dA, dB] by the unfused code that defines the op, in the problem's dtypes."""
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (q.x, q.lora_A, q.lora_B))
    y, _ = SPEC.reference(x, q.weight, lora_A, lora_B, q.bias, q.seed, SCALING, q.p)
    return [y.detach(), *torch.autograd.grad(y, [x, lora_A, lora_B], q.grad_y)]


def note_schedules(q: Problem) -> None:
    """Puts what dispatch chooses for forward and backward into the test's report."""
    forward = lk.why("lora_linear", *q[:5], scaling=SCALING, dropout_p=q.p, training=q.p > 0, seed=SEED)
    s = q.x.new_empty((*q.x.shape[:-1], q.lora_A.shape[0]))
    args = (q.grad_y, q.x, s, q.weight, q.lora_A, q.lora_B, q.seed, SCALING, q.p, True, True, True)
    backward = dispatch.choose(BACKWARD, args)
    for op, choice in (("lora_linear", forward), ("lora_linear_backward", backward)):
        _schedules.append(("schedule", f"{op}: {choice.backend}, {choice.schedule}"))


# ------------------------------------------------------------------------------------------------- comparison


def poison(results: Sequence[Tensor]) -> None:
    """Leaves NaN where the allocator is likely to put tensors like these, and a kernel's workspaces, next."""
    if DEVICE.type != "cuda":
        return
    torch.cuda.empty_cache()  # what is left is the blocks below, and rests of segments in use
    copies = 3 if sum(t.nbytes for t in results) < GIB else 1
    held = [torch.full_like(t, float("nan")) for t in results for _ in range(copies)]
    held += [torch.full((size,), float("nan"), device=DEVICE) for size in (128, 4096, 2**16, 2**20, 2**23)]
    del held


def check(q: Problem, backend: str) -> list[Tensor]:
    """Result and gradients, by ``backend`` alone, are as close to float64 as the yardstick asks; returns them."""
    unfused, exact = by_torch(q), by_torch(q.double())
    poison(unfused)
    lk.reset_stats()
    ours = unless_triton_is_old(lambda: fused(q))
    served = lk.stats()["served"]
    assert served == {("lora_linear", backend): 1, ("lora_linear_backward", backend): 1}, f"served: {served}"
    note_schedules(q)
    for name, value, bound, true in zip(RESULTS, ours, unfused, exact):
        assert value.dtype == bound.dtype
        # A float32 gradient of 16-bit operands is judged as they are.
        assert_as_accurate(value.to(q.x.dtype), bound, true, name)
    return ours


def check_inference(q: Problem, backend: str) -> Tensor:
    """As ``check``, for y alone."""
    args = (*q[:5], q.seed, SCALING, q.p)
    unfused, _ = SPEC.reference(*args)
    exact, _ = SPEC.reference(*q.double()[:5], q.seed, SCALING, q.p)
    poison([unfused])
    lk.reset_stats()
    y = unless_triton_is_old(lambda: inferred(q))
    served = lk.stats()["served"]
    assert served == {("lora_linear", backend): 1}, f"served: {served}"
    assert_as_accurate(y, unfused, exact)
    return y


def torch_reads_beside_rows() -> bool:
    """Whether torch's product of bfloat16 lets NaN beside a row into it, as oneDNN's by AMX does (torch 2.14)."""
    wide = torch.full((105, 168), float("nan"), device=DEVICE).bfloat16()
    wide[:, 8:144] = 1.0
    return bool((wide[:, 8:144] @ torch.ones(136, 72, device=DEVICE).bfloat16()).isnan().any())


def check_backward(grad_y: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, p: float
                   ) -> None:  # fmt: skip
    """The registered op of the backward, whose operands may be laid out as autograd never does."""
    seed = torch.tensor([SEED], device=DEVICE) if p > 0 else None
    tensors, rest = (grad_y, x, s, weight, lora_A, lora_B), (seed, SCALING, p, True, True, True)
    # torch's product of bfloat16 by AMX reads beside strided rows, where there may be NaN.
    unfused = BACKWARD.reference(*(t.contiguous() for t in tensors), *rest)
    exact = BACKWARD.reference(*(t.double() for t in tensors), *rest)
    poison(unfused)
    ours = unless_triton_is_old(lambda: torch.ops.lora_kernels.lora_linear_backward(*tensors, *rest))
    for name, value, bound, true in zip(RESULTS[1:], ours, unfused, exact):
        assert_as_accurate(value, bound, true, name)


@contextlib.contextmanager
def much_memory(gib: int) -> Iterator[None]:
    """For one test at a time on this machine; skips where the GPU has less than that free."""
    with open(Path(tempfile.gettempdir()) / "lora_kernels_gpu_tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / GIB
        if free < gib:
            pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.0f} are free")
        try:
            yield
        finally:
            torch.cuda.empty_cache()


def same(ours: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
