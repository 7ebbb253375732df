"""The Triton kernels of prefix_kv in Triton's interpreter, on the CPU. Run by test_triton_prefix_kv.py.

The interpreter rounds to bfloat16 wrongly (Triton 3.8): here bfloat16 is copied only.
"""

from __future__ import annotations

import naive_prefix
import pytest
import torch
from covering import case_id, covering_pairs
from naive_prefix import BF16, FP16, FP32, grads_of, inside_longer, make
from poisoned import by_triton, memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.triton_kernels import configs, prefix_kv

SERVED = {("prefix_kv", "triton"), ("prefix_kv_backward", "triton")}


CASES = covering_pairs(
    dtypes=[(FP32, FP32), (FP32, FP16), (FP16, FP16), (FP16, FP32)], copies=[False, True], head_dim=[16, 3],
    heads=[1, 3], layers=[1, 3], batch=[0, 1, 5], tokens=[0, 1, 9], small_tiles=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case, monkeypatch):
    if case["small_tiles"]:
        for name in ("copy_tile", "sum_tile"):
            monkeypatch.setattr(configs, name, lambda columns, size: configs.RowTile(4, 8, 4))
    layers, heads, batch, (dtype, out_dtype) = case["layers"], case["heads"], case["batch"], case["dtypes"]
    prefix = make(dtype, case["head_dim"], layers, heads, case["tokens"]).requires_grad_()
    pairs = lk.prefix_kv(prefix, layers, heads, batch_size=batch, dtype=out_dtype, copies=case["copies"])
    ours = [t for pair in pairs for t in pair]
    expected = naive_prefix.forward(prefix.detach(), layers, heads, batch, out_dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    grads = grads_of(expected)
    exact = naive_prefix.backward(grads, dtype)
    for lay_out in (inside_longer, lambda grads: torch.stack(grads).unbind(0)):
        (gradient,) = torch.autograd.grad(ours, prefix, lay_out(grads), retain_graph=True)
        assert torch.equal(gradient, exact)
    assert set(lk.stats()["served"]) == SERVED


def test_bfloat16_is_copied():
    prefix = make(BF16, 16)
    pairs = lk.prefix_kv(prefix, 3, 2, batch_size=2)
    expected = naive_prefix.forward(prefix, 3, 2, 2, BF16)
    assert all(torch.equal(a, b) for a, b in zip([t for pair in pairs for t in pair], expected, strict=True))


def test_gradients_that_are_one_tensor_are_not_copied():
    whole = torch.randn(6, 2, 2, 5, 3)
    assert prefix_kv._as_one(list(whole.unbind(0))).data_ptr() == whole.data_ptr()
    assert torch.equal(prefix_kv._as_one(list(whole.flip(0).unbind(0))[::-1]), whole)
    assert torch.equal(prefix_kv._as_one([whole[0], whole[2], whole[3]]), whole[[0, 2, 3]])
