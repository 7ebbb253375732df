"""gated_activation: values, gradients, results in given memory, compilers, and what is refused."""

from __future__ import annotations

import math

import gated
import pytest
import torch
from gated import BF16, FP16, FP32, FP64, SHAPES, make

import lora_kernels as lk
from lora_kernels.ops.gated_activation import ACTIVATIONS, BACKWARD_OUT, OUT

DTYPES = [FP32, BF16, FP16]


def run(gate, up, grad_h, activation):
    leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = lk.gated_activation(*leaves, activation)
    return h.detach(), *torch.autograd.grad(h, leaves, grad_h)


@pytest.mark.parametrize("dtype", [*DTYPES, FP64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, shape, dtype):
    given = make(shape, dtype)
    gated.check(run(*given, activation), *given, activation)
    backend = "reference" if dtype == FP64 else "cpu"
    assert set(lk.stats()["served"]) == {("gated_activation", backend), ("gated_activation_backward", backend)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out(activation):
    """exp must neither overflow to NaN nor lose its small values."""
    gate = torch.tensor([-1e4, -200.0, -104.0, -90.0, -88.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 88.5, 200.0, 1e4, 1e15])
    up, grad_h = torch.ones_like(gate), torch.ones_like(gate)
    ours, exact = run(gate, up, grad_h, activation), gated.plain(gate, up, grad_h, activation, FP64)
    for mine, right in zip(ours, exact):
        torch.testing.assert_close(mine.double(), right.nan_to_num(), rtol=2e-5, atol=1e-36)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_where_it_is(activation):
    gate, up = torch.randn(40), torch.randn(40)
    gate[7], up[30] = math.nan, math.nan
    h, d_gate, d_up = run(gate, up, torch.ones(40), activation)
    assert h.isnan().nonzero().flatten().tolist() == [7, 30]
    assert d_up.isnan().nonzero().flatten().tolist() == [7]
    assert set(d_gate.isnan().nonzero().flatten().tolist()) <= {7, 30}
    assert d_gate.isnan()[30]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_the_operands_memory(dtype):
    given = make((6, 131), dtype)
    h, grad_gate, grad_up = run(*given, "silu")
    gate, up, grad_h = (t.clone() for t in given)
    lk.dispatch.run(OUT, gate, up, "silu", gate)
    assert torch.equal(gate, h)
    gate = given[0].clone()
    lk.dispatch.run(BACKWARD_OUT, grad_h, gate, up, "silu", gate, up)
    assert torch.equal(gate, grad_gate)
    assert torch.equal(up, grad_up)


def test_strides():
    gate, up, grad_h = (t.t() for t in make((40, 30), FP32))
    gated.check(run(gate, up, grad_h, "silu"), gate, up, grad_h, "silu")
    given = tuple(t[:, ::2] for t in make((40, 60), FP32))
    gated.check(run(*given, "gelu"), *given, "gelu")


def test_gate_and_up_are_all_that_is_saved():
    gate, up, _ = make((8, 16), FP32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lk.gated_activation(gate.requires_grad_(), up.requires_grad_())
    assert sorted(t.data_ptr() for t in saved) == sorted((gate.data_ptr(), up.data_ptr()))


def test_only_one_of_them_needs_a_gradient():
    gate, up, grad_h = make((4, 9), FP32)
    h = lk.gated_activation(gate, up.requires_grad_())
    (grad,) = torch.autograd.grad(h, up, grad_h)
    assert torch.equal(grad, run(gate, up, grad_h, "silu")[2])


def test_not_differentiable_twice():
    gate, up, _ = make((4, 9), FP32)
    h = lk.gated_activation(gate.requires_grad_(), up)
    (grad,) = torch.autograd.grad(h.square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    gate, up, _ = make((3, 17), FP32)
    args = gate.requires_grad_(), up.requires_grad_(), activation
    torch.library.opcheck(torch.ops.lora_kernels.gated_activation.default, args)


def test_compiled():
    given = make((3, 17), FP32)

    def run_sum(gate, up):
        return lk.gated_activation(gate, up, "gelu_tanh").square().sum()

    def gradients(function):
        leaves = given[0].detach().requires_grad_(), given[1].detach().requires_grad_()
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(run_sum, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled), gradients(run_sum)):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation must be one of 'silu', 'gelu', 'gelu_tanh', 'relu'"),
        ({"gate": [1.0]}, TypeError, "gate must be a tensor, got list"),
        ({"gate": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "gate must be float32"),
        ({"up": torch.ones(2, 3, dtype=BF16)}, TypeError, "up must be torch.float32 like gate"),
        ({"up": torch.ones(3)}, ValueError, r"up must be \(2, 3\) like gate"),
        ({"up": torch.ones(2, 3, device="meta")}, ValueError, "up must be on cpu like gate"),
        ({"gate": torch.ones(2, 3).to_sparse()}, TypeError, "gate must be a dense tensor"),
    ],
)
def test_what_is_refused(changes, error, message):
    arguments = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3), "activation": "silu"} | changes
    with pytest.raises(error, match=message):
        lk.gated_activation(**arguments)


def test_why():
    gate, up, _ = make((2, 3), FP32)
    assert lk.why("gated_activation", gate, up)[:2] == ("cpu", "elementwise")
