"""The ops over packed weights as the CUDA backend serves them, all of its kernels emulated."""

from __future__ import annotations

import types
from unittest.mock import ANY

import pytest
import torch
from covering import case_id, covering_pairs
from emulated_packed import SCALING, cuda_on_the_cpu, library, make, results, unfused  # noqa: F401
from gptq_layers import Stub
from numerics import assert_as_accurate
from packed import decoded, random_packed, random_scaled, with_part
from pretended_gpu import pretend_gpu

import lora_kernels as lk
from lora_kernels import _native, dispatch
from lora_kernels.formats import from_module
from lora_kernels.ops import dequantize, linear_packed, lora_linear_packed
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels.launching import Device

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = covering_pairs(
    dtypes=[(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)], nested=[False, True], block=[48, 64], p=[0.0, 0.3],
    bias=[False, True], m=[33, 70],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case):
    """The decoded weight in float64 is the measure; a plain weight of its bits gives the same bits."""
    (dtype, adapter), p, n, k = case["dtypes"], case["p"], 136, 3 * case["block"]
    packed = random_packed(n, k, case["block"], case["nested"]).to(dtype=dtype)
    operands = make(case["m"], n, k, 8, dtype, adapter, case["bias"])
    grad_y = torch.randn(2, case["m"], n).to(dtype)
    ours = results(lk.lora_linear, packed, operands, grad_y, p)
    assert dict(lk.stats()["served"]) == {
        (name, "cuda"): 1 + (name == "dequantize")
        for name in (
            "lora_linear_packed", "lora_linear_packed_backward", "lora_linear", "lora_linear_backward", "dequantize",
        )
    }  # fmt: skip
    assert lk.stats()["fallback"] == {}
    same = results(lk.lora_linear, decoded(packed), operands, grad_y, p)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    as_one = [None if t is None else t.to(dtype) for t in operands]
    exact = [None if t is None else t.double() for t in operands]
    theirs = results(unfused, decoded(packed), as_one, grad_y, p)
    true = results(unfused, decoded(packed).double(), exact, grad_y.double(), p)
    for name, a, b, c in zip(("y", "dX", "dA", "dB"), ours, theirs, true):
        assert a.dtype == (adapter if name in ("dA", "dB") else dtype)
        assert_as_accurate(a, b, c, name)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("m", [2, 9])
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
def test_eight_bits_are_decoded_for_the_product(layout, m, dtype):
    """Kills: few rows that are sent to the kernel of codes4. The decoded weight gives the same bits."""
    packed = random_scaled(136, 192, layout, 128, "squares").to(dtype=dtype)
    operands, grad_y = make(m, 136, 192, 8, dtype), torch.randn(2, m, 136).to(dtype)
    ours = results(lk.lora_linear, packed, operands, grad_y, 0.0)
    assert lk.stats()["served"]["dequantize", "cuda"] == 2
    assert {backend for _, backend in lk.stats()["served"]} == {"cuda"}
    same = results(lk.lora_linear, decoded(packed), operands, grad_y, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    y = torch.ops.lora_kernels.linear_packed(operands[0], *packed.args, operands[3])
    assert torch.equal(y, torch.nn.functional.linear(operands[0], decoded(packed), operands[3]))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("m", [2, 33])
def test_what_no_kernel_decodes_is_decoded_for_the_product(m, method):
    """By torch; the product's kernels are ours. Kills: a kernel that is asked to decode it."""
    packed = from_module(Stub(136, 192, method))
    operands, grad_y = make(m, 136, 192, 8, FP16, FP32), torch.randn(2, m, 136).half()
    ours = results(lk.lora_linear, packed, operands, grad_y, 0.3)
    assert lk.stats() == {
        "served": {
            (name, "cuda"): 1
            for name in ("lora_linear_packed", "lora_linear_packed_backward", "lora_linear", "lora_linear_backward")
        },
        "fallback": {},
    }
    same = results(lk.lora_linear, decoded(packed, FP16), operands, grad_y, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    with lk.use_backend("cuda"):
        assert torch.equal(results(lk.lora_linear, packed, operands, grad_y, 0.3)[1], ours[1])


@pytest.mark.parametrize("m", [1, 8, 32])
def test_few_rows_are_one_launch(m):
    """Its gradients are those of many rows; what it saves is what they take."""
    packed = random_packed(136, 192, nested=True).to(dtype=BF16)
    operands, grad_y = make(m, 136, 192, 8, BF16), torch.randn(2, m, 136).bfloat16()
    ours = results(lk.lora_linear, packed, operands, grad_y, 0.0)
    assert lk.stats()["served"] == {
        (name, "cuda"): 1
        for name in ("lora_linear_packed", "lora_linear_packed_backward", "lora_linear_backward", "dequantize")
    }
    exact = [None if t is None else t.double() for t in operands]
    theirs = results(unfused, decoded(packed), operands, grad_y, 0.0)
    true = results(unfused, decoded(packed).double(), exact, grad_y.double(), 0.0)
    for name, a, b, c in zip(("y", "dX", "dA", "dB"), ours, theirs, true):
        assert_as_accurate(a, b, c, name)


@pytest.mark.parametrize(
    ("change", "few"),
    [
        (dict(), True), (dict(m=32), True), (dict(m=33), False), (dict(rank=64), True), (dict(rank=65), False),
        (dict(block=128), True), (dict(block=48), False), (dict(block=32), False), (dict(dtype=FP16), True),
        (dict(dtype=FP32), False), (dict(p=0.5), False), (dict(off=1), False),
    ],
    ids=str,
)  # fmt: skip
def test_who_decodes_few_rows(change, few):
    """As the kernel's own checks have it: what dispatch sends there is served, and no other call is."""
    given = {"m": 3, "rank": 8, "block": 64, "dtype": BF16, "p": 0.0, "off": 0, **change}
    packed = random_packed(40, 384, given["block"]).to(dtype=given["dtype"])
    data = torch.cat([torch.empty(given["off"], dtype=torch.uint8), packed.parts[0].view(-1)])[given["off"] :]
    x, lora_A, lora_B, bias = make(given["m"], 40, 384, given["rank"], given["dtype"])
    lk.lora_linear(x, with_part(packed, 0, data), lora_A, lora_B, bias, dropout_p=given["p"], training=True, seed=3)
    assert (("dequantize", "cuda") in lk.stats()["served"]) == (not few)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_float32_rows_by_weights_of_16_bits(precision, fp32_precision):
    """Kills: a weight that is decoded to x's dtype where its own has fewer bits; strict float32 in tf32."""
    fp32_precision(precision)
    packed = random_packed(136, 192).to(dtype=BF16)
    operands, grad_y = make(9, 136, 192, 8, FP32), torch.randn(2, 9, 136)
    ours = results(lk.lora_linear, packed, operands, grad_y, 0.0)
    served = "cuda" if precision == "tf32" else "reference"
    assert lk.stats()["served"]["lora_linear", served] == 1
    assert lk.stats()["served"]["lora_linear_packed", "cuda"] == 1
    assert lk.stats()["served"]["dequantize", "cuda"] == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours, results(lk.lora_linear, decoded(packed).float(), operands, grad_y, 0.0), strict=True)
    )


def test_gradients_of_the_adapter_alone_decode_nothing():
    """Kills: a launch for a weight that nobody reads. What stands for it is NaN."""
    packed = random_packed(136, 192).to(dtype=BF16)
    x, lora_A, lora_B, bias = make(33, 136, 192, 8, BF16)
    leaves = [lora_A.requires_grad_(), lora_B.requires_grad_()]
    y = lk.lora_linear(x, packed, *leaves, bias, scaling=SCALING)
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, grad_y)
    assert lk.stats()["served"]["dequantize", "cuda"] == 1
    plain = torch.autograd.grad(lk.lora_linear(x, decoded(packed), *leaves, bias, scaling=SCALING), leaves, grad_y)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_frozen_linear(dtype):
    packed = random_packed(136, 192, nested=True).to(dtype=BF16)
    x, _, _, bias = make(9, 136, 192, 8, dtype)
    x.requires_grad_()
    weight = decoded(packed).to(dtype)
    y = torch.ops.lora_kernels.linear_packed(x, *packed.args, bias)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(y, expected)
    grad_y = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(t, x, grad_y)[0] for t in (y, expected)))
    assert lk.stats()["served"] == {
        ("linear_packed", "cuda"): 1, ("linear_packed_backward", "cuda"): 1, ("dequantize", "cuda"): 2,
    }  # fmt: skip


def arguments(dtype, layout="codes4"):
    """(op, arguments) of every op over a packed weight."""
    packed = random_packed(64, 128).to(dtype=dtype)
    x, lora_A, lora_B, bias = make(3, 64, 128, 8, dtype)
    parts, _, *sizes = packed.args
    weight = parts, layout, *sizes
    forward = (x, *weight, lora_A, lora_B, bias, None, SCALING, 0.0)
    s, grad_y = x.new_empty(2, 3, 8), x.new_empty(2, 3, 64)
    backward = (grad_y, x, s, *weight, lora_A, lora_B, None, SCALING, 0.0, True, True, True)
    return [
        (lora_linear_packed.SPEC, forward), (lora_linear_packed.BACKWARD, backward), (dequantize.SPEC, weight),
        (linear_packed.SPEC, (x, *weight, bias)), (linear_packed.BACKWARD, (grad_y, *weight)),
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_what_dispatch_asks(monkeypatch, backend, fp32_precision):
    monkeypatch.setattr(_triton, "refusal", lambda device: None)
    monkeypatch.setattr(_triton, "device_of", lambda device: Device("sm_80", 108))
    fp32_precision("ieee")
    monkeypatch.setitem(dispatch._ORDER, "cpu", (backend, "reference"))
    for dtype in (BF16, FP32):
        for spec, args in arguments(dtype):
            verdict = spec.kernels[backend].supports(*args)
            in_one = backend == "cuda" and spec is lora_linear_packed.SPEC and dtype == BF16
            decodes = spec is dequantize.SPEC or in_one
            assert verdict.schedule == ("decode" if decodes else "dequantize + product"), spec.name
        for spec, args in arguments(dtype, "gptq"):
            no_kernel, composed = (None, lk.Reason.TORCH_DECODE), ("dequantize + product", ANY)
            assert spec.kernels[backend].supports(*args) == (no_kernel if spec is dequantize.SPEC else composed)
    with lk.use_backend(backend):
        for spec, args in arguments(FP32)[:2]:
            verdict = spec.kernels[backend].supports(*args)
            # Triton multiplies strict float32 where it was asked for.
            assert verdict == ((None, lk.Reason.FP32_STRICT) if backend == "cuda" else ("dequantize + product", ANY))
    pretend_gpu(monkeypatch, (7, 0))
    if backend == "cuda":
        for spec, args in arguments(BF16):
            assert spec.kernels["cuda"].supports(*args) == (None, lk.Reason.ARCHITECTURE)


def test_why_tells_the_products_schedule(monkeypatch):
    """The plan of a plain weight's product, which is asked for a weight that is no memory."""
    asked = {}

    def plan(**problem):
        asked.update(problem)
        return {"schedule": "ticketed", "reason": "several blocks per SM"}

    device = types.SimpleNamespace(multi_processor_count=108, shared_memory_per_block_optin=163 << 10, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(_native, "cuda", types.SimpleNamespace(plan_lora_linear=plan))
    x, lora_A, lora_B, bias = make(33, 64, 128, 8, BF16)
    choice = lk.why("lora_linear", x, random_packed(64, 128).to(dtype=BF16), lora_A, lora_B, bias)
    few = lk.why("lora_linear", x[:, :8], random_packed(64, 128).to(dtype=BF16), lora_A, lora_B, bias)
    assert few.schedule == "decode"
    assert "streams the packed weight" in few.reason
    assert choice.backend == "cuda"
    assert choice.schedule == "dequantize + ticketed"
    assert choice.reason.startswith("one launch decodes the weight")
    assert choice.reason.endswith("several blocks per SM")
    assert {"m": 66, "n": 64, "k": 128, "rank": 8, "rows_aligned": True}.items() <= asked.items()
