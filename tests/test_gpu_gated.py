"""gated_activation on a GPU, by the CUDA and by the Triton kernels, against float64."""

from __future__ import annotations

import gated
import gpu
import pytest
import torch
from gpu import BF16, DEVICE, FP16, FP32

import lora_kernels as lk
from lora_kernels.ops.gated_activation import ACTIVATIONS, BACKWARD_OUT

pytestmark = gpu.needed


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (7,), (3, 129), (512, 1536)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(backend, activation, shape, dtype):
    given = gated.make(shape, dtype)
    gate, up, grad_h = (t.to(DEVICE) for t in given)
    gpu.poison([gate])
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = gpu.unless_triton_is_old(lambda: lk.gated_activation(*leaves, activation))
    gradients = torch.autograd.grad(h, leaves, grad_h)
    gated.check((h.detach(), *gradients), *given, activation)
    assert {served_by for _, served_by in lk.stats()["served"]} == {backend}
    lk.dispatch.run(BACKWARD_OUT, grad_h, gate, up, activation, gate, up)
    assert torch.equal(gate, gradients[0])
    assert torch.equal(up, gradients[1])
