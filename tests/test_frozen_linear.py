"""frozen_linear: F.linear for weights that do not train, through fp32 where the CPU has no 16-bit arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate
from packed import random_packed

import lora_kernels as lk
from lora_kernels.support import cpu as _cpu
from lora_kernels.support import cpu_product as _cpu_product

SHAPES = [(0, 8, 8), (1, 7, 5), (4, 33, 130), (5, 64, 48), (37, 1100, 1200), (2050, 24, 20)]


@pytest.fixture(params=["this CPU", "ATen", "no native 16-bit matmul", "oneDNN"])
def _matmul(request, monkeypatch):
    """Every schedule is tested on every machine, and for few rows, too."""
    if request.param in ("ATen", "oneDNN"):
        monkeypatch.setattr(_cpu, "FEW_ROWS", 0)
    if request.param == "ATen":
        monkeypatch.setattr(_cpu_product, "_mode", "mkl")
    if request.param == "oneDNN":
        request.getfixturevalue("onednn")
        monkeypatch.setattr(_cpu_product, "FROM_ROWS", 0)
    if request.param == "no native 16-bit matmul":
        monkeypatch.setattr(_cpu, "has_native_matmul", lambda dtype: dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("_matmul")
def test_values_and_gradients(shape, dtype):
    m, k, n = shape
    x, weight, bias, grad_y = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n), torch.randn(m, n)
    given = [t.to(dtype) for t in (x, weight, bias, grad_y)]

    def run(function, dtype):
        x, weight, bias, grad_y = (t.to(dtype) for t in given)
        y = function(x.requires_grad_(), weight, bias)
        return y.detach(), torch.autograd.grad(y, x, grad_y)[0]

    for name, ours, torchs, exact in zip(
        ("y", "dx"), run(lk.frozen_linear, dtype), run(F.linear, dtype), run(F.linear, torch.float64)
    ):
        assert ours.dtype == dtype
        assert_as_accurate(ours, torchs, exact, name)


def test_schedules(monkeypatch):
    monkeypatch.setattr(_cpu, "has_native_matmul", lambda dtype: False)
    weight = torch.randn(6, 8, dtype=torch.bfloat16)

    def schedule(rows):
        return lk.why("frozen_linear", torch.randn(rows, 8, dtype=torch.bfloat16), weight).schedule

    assert schedule(_cpu.UPCAST_ABOVE_ROWS) == "aten"
    assert schedule(_cpu.UPCAST_ABOVE_ROWS + 1) == "upcast"
    monkeypatch.setattr(_cpu_product, "_mode", "mkl")
    assert lk.why("frozen_linear", torch.randn(100, 8), weight.float()).schedule == "aten"
    assert lk.why("frozen_linear", torch.randn(_cpu.FEW_ROWS, 8), weight.float()).schedule == "decode"
    assert lk.why("frozen_linear", torch.randn(_cpu.FEW_ROWS, 6), weight.float().t()).schedule == "aten"


def test_any_leading_shape_and_strides():
    weight, bias = torch.randn(6, 8), torch.randn(6)
    for x in (
        torch.randn(8),
        torch.randn(2, 3, 8),
        torch.randn(3, 2, 16)[..., ::2],
        torch.randn(2, 3, 8).transpose(0, 1),
    ):
        torch.testing.assert_close(lk.frozen_linear(x, weight, bias), F.linear(x, weight, bias))


def test_opcheck_and_compile():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    torch.library.opcheck(torch.ops.lora_kernels.frozen_linear.default, (x, weight, torch.randn(6)))
    torch.library.opcheck(torch.ops.lora_kernels.frozen_linear_backward.default, (torch.randn(5, 6), weight))
    torch._dynamo.reset()
    compiled = torch.compile(lk.frozen_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), lk.frozen_linear(x, weight))


def test_a_result_may_be_changed_in_place():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(6, 8)
    y = lk.frozen_linear(x, weight)
    y += 1
    y.sum().backward()
    torch.testing.assert_close(y, F.linear(x, weight) + 1)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 3, 8))


@pytest.mark.parametrize("op", ["frozen_linear", "linear_packed"])
def test_backward_runs_on_the_backend_of_the_forward(op):
    """Kills: gradients by whoever serves them where they are formed, later or in autograd's thread."""
    x = torch.randn(5, 64, requires_grad=True)
    with lk.use_backend("reference"):
        y = lk.frozen_linear(x, torch.randn(6, 64) if op == "frozen_linear" else random_packed(6, 64))
    y.sum().backward()
    assert lk.stats()["served"] == {(op, "reference"): 1, (f"{op}_backward", "reference"): 1}


def test_a_weight_that_trains_is_refused():
    x, weight = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True)
    y = lk.frozen_linear(x, weight)
    with pytest.raises(RuntimeError, match="must not require grad"):
        y.sum().backward()


def test_autocast():
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.frozen_linear(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(x.bfloat16(), weight.bfloat16()))
