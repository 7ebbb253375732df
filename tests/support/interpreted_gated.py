"""The Triton kernels of gated_activation in Triton's interpreter, on the CPU. Run by test_triton_gated.py."""

from __future__ import annotations

import gated
import pytest
import torch
from gated import FP16, FP32, SHAPES, make
from poisoned import by_triton, memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.ops.gated_activation import ACTIVATIONS, BACKWARD_OUT, OUT


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, shape, dtype):
    gate, up, grad_h = make(shape, dtype)
    leaves = gate.requires_grad_(), up.requires_grad_()
    h = lk.gated_activation(*leaves, activation)
    gradients = torch.autograd.grad(h, leaves, grad_h)
    gated.check((h.detach(), *gradients), gate, up, grad_h, activation)
    assert set(lk.stats()["served"]) == {("gated_activation", "triton"), ("gated_activation_backward", "triton")}


def test_results_in_the_operands_memory():
    given = make((3, 700), FP32)
    gate, up, grad_h = (t.clone() for t in given)
    lk.dispatch.run(BACKWARD_OUT, grad_h, gate, up, "silu", gate, up)
    h = given[0].clone()
    lk.dispatch.run(OUT, h, given[1], "silu", h)
    gated.check((h, gate, up), *given, "silu")


def test_nothing_is_written_past_the_end():
    """Kills: an element too many of the last block."""
    gate, up, grad_h = make((387,), FP32)
    memory = torch.full((3, 400), 7.0)
    h, grad_gate, grad_up = (row[:387] for row in memory)
    lk.dispatch.run(OUT, gate, up, "silu", h)
    lk.dispatch.run(BACKWARD_OUT, grad_h, gate, up, "silu", grad_gate, grad_up)
    gated.check((h, grad_gate, grad_up), gate, up, grad_h, "silu")
    assert (memory[:, 387:] == 7.0).all()
