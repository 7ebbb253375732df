"""The Triton kernel of dequantize in Triton's interpreter, on the CPU. Run by test_triton_dequantize.py.

The interpreter rounds to bfloat16 wrongly (Triton 3.8), and fuses nothing: the machine code is what shows that
(test_triton_aot.py).
"""

from __future__ import annotations

import pytest
import torch
from covering import case_id, covering_pairs
from packed import decoded, random_packed, with_part

import lora_kernels as lk
from lora_kernels.triton_kernels import configs, dequantize

FP16, FP32 = torch.float16, torch.float32
BITS = {FP16: torch.int16, FP32: torch.int32}


@pytest.fixture(autouse=True)
def _poisoned():
    """What torch.empty returns is NaN, so that an element nobody writes is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(packed):
    parts, *rest = packed.args
    weight = dequantize.dequantize(parts, *rest)
    assert weight.dtype == packed.dtype
    assert torch.equal(weight.view(BITS[weight.dtype]), decoded(packed).view(BITS[weight.dtype]))


CASES = covering_pairs(
    dtype=[FP16, FP32], nested=[False, True], block=[2, 6, 48, 64, 256, 4096], blocks=[1, 3], n=[0, 1, 5, 33],
    small_tiles=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bits(case, monkeypatch):
    """Small tiles: a block of weights takes several programs."""
    n = case["n"]
    if case["small_tiles"]:
        monkeypatch.setattr(configs, "packed_tile", lambda block_bytes: configs.RowTile(4, 16, 4))
        n = min(n, 5)
    check(random_packed(n, case["blocks"] * case["block"], case["block"], case["nested"]).to(dtype=case["dtype"]))


@pytest.mark.parametrize("by", [1, 2, 8])
def test_packed_weights_off_16_bytes(by):
    packed = random_packed(3, 192, nested=True).to(dtype=FP16)
    data = packed.parts[0].view(-1)
    check(with_part(packed, 0, torch.cat([data.new_empty(by), data])[by:]))


def test_a_block_that_is_longer_than_a_tile():
    check(random_packed(2, 3 * 8400, 8400, nested=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_a_linear_over_a_packed_weight_is_one_over_the_decoded(dtype, p):
    packed = random_packed(48, 128, nested=True).to(dtype=FP16)
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((7, 128), (8, 128), (48, 8))]
    grad_y = torch.randn(7, 48).to(dtype)

    def results(weight):
        x, lora_A, lora_B = leaves
        y = lk.lora_linear(x, weight, lora_A, lora_B, scaling=1.7, dropout_p=p, training=True, seed=3)
        return [y, *torch.autograd.grad(y, leaves, grad_y), torch.autograd.grad(lk.lora_linear(
            x.detach(), weight, lora_A, lora_B), lora_A, grad_y)[0]]  # fmt: skip

    with lk.use_backend("triton"):
        ours = results(packed)
        served = set(lk.stats()["served"])
        plain = results(decoded(packed).to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert {name for name, _ in served} == {
        "lora_linear_packed", "lora_linear_packed_backward", "lora_linear", "lora_linear_backward", "dequantize",
    }  # fmt: skip
    assert {backend for _, backend in served} == {"triton"}
