"""The Triton kernel of dequantize in Triton's interpreter, on the CPU. Run by test_triton_dequantize.py.

The interpreter rounds to bfloat16 wrongly (Triton 3.8), and fuses nothing: the machine code is what shows that
(test_triton_aot.py).
"""

from __future__ import annotations

import pytest
import torch
from covering import case_id, covering_pairs
from packed import decoded, random_packed, random_scaled, with_part
from poisoned import memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.triton_kernels import configs, dequantize

FP16, FP32 = torch.float16, torch.float32
BITS = {FP16: torch.int16, FP32: torch.int32}


def check(packed):
    parts, *rest = packed.args
    weight = dequantize.dequantize(parts, *rest)
    assert weight.dtype == packed.dtype
    bits, expected = (t.view(BITS[t.dtype]) for t in (weight, decoded(packed)))
    is_number = ~decoded(packed).isnan()
    assert torch.equal(weight.isnan(), ~is_number)
    assert torch.equal(bits[is_number], expected[is_number])


CASES = covering_pairs(
    layout=["codes4", "codes4_low"], dtype=[FP16, FP32], nested=[False, True],
    block=[2, 6, 16, 48, 64, 256, 4096], blocks=[1, 3], n=[0, 1, 5, 33], small_tiles=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bits(case, monkeypatch):
    """Small tiles: a block of weights takes several programs."""
    n = case["n"]
    if case["small_tiles"]:
        monkeypatch.setattr(configs, "packed_tile", lambda block_bytes: configs.RowTile(4, 16, 4))
        n = min(n, 5)
    size = n, case["blocks"] * case["block"], case["block"], case["nested"]
    check(random_packed(*size, layout=case["layout"]).to(dtype=case["dtype"]))


SCALED = covering_pairs(
    layout=["int8", "e4m3"], dtype=[FP16, FP32], rows=["each", "squares", "all"], block=[None, 1, 12, 16, 128, 2048],
    n=[0, 1, 5, 131], k=[1, 100, 136, 1032], off=[0, 1],
)  # fmt: skip


@pytest.mark.parametrize("case", SCALED, ids=case_id)
def test_bits_of_eight_bit_layouts(case):
    """Kills: a scale of another row, column or square, or one that a row's end has not."""
    packed = random_scaled(case["n"], case["k"], case["layout"], case["block"], case["rows"], special=True)
    data = packed.parts[0].flatten()
    data = torch.cat([data.new_empty(case["off"]), data])[case["off"] :]
    check(with_part(packed.to(dtype=case["dtype"]), 0, data.view(packed.shape)))


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
def test_every_number_of_eight_bits(layout, dtype):
    """Kills: a sign, an exponent or a subnormal number that is taken for another; a NaN for 480."""
    packed = with_part(random_scaled(4, 256, layout), 0, torch.arange(256, dtype=torch.uint8).repeat(4, 1))
    check(with_part(packed.to(dtype=dtype), 1, torch.tensor([[1.0], [-0.3], [2.0**-120], [0.0]])))


@pytest.mark.parametrize("by", [1, 2, 8])
def test_packed_weights_off_16_bytes(by):
    packed = random_packed(3, 192, nested=True).to(dtype=FP16)
    data = packed.parts[0].view(-1)
    check(with_part(packed, 0, torch.cat([data.new_empty(by), data])[by:]))


def test_more_blocks_than_share_a_scale_of_the_second_level():
    """Kills: such a scale for the wrong 256 blocks."""
    check(random_packed(3, 200 * 16, 16, nested=True).to(dtype=FP32))


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
