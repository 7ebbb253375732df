"""The CUDA kernels of prefix_kv and their binding, emulated: values, gradients, orders of blocks, missing stores."""

from __future__ import annotations

import emulator
import naive_prefix
import pytest
import torch
from covering import case_id, covering_pairs
from naive_prefix import BF16, FP16, FP32, FP64, grads_of, inside_longer, make
from pretended_gpu import pretend_gpu

from lora_kernels.ops.prefix_kv import BACKWARD, SPEC
from lora_kernels.reasons import Reason

DTYPES = [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (FP16, FP16)]
"""Of the prefix, and of the keys and values."""


@pytest.fixture(scope="module", autouse=True)
def native():
    """The module that the tests steer the launches with."""
    library = torch.library.Library("lora_kernels_emulated_prefix", "DEF")
    for spec in (SPEC, BACKWARD):
        arguments, returns = spec.schema.split(" -> ")
        library.define(f"{spec.name}{arguments[:-1]}, str schedule) -> {returns}")
    yield emulator.load_prefix_kv()
    library._destroy()


def run_forward(prefix, layers, heads, batch, copies, dtype, **options):
    emulator.load_prefix_kv().set_options({"resident_blocks": 3, **options})
    return torch.ops.lora_kernels_emulated_prefix.prefix_kv(prefix, layers, heads, batch, copies, dtype, "")


def run_backward(grads, dtype, **options):
    emulator.load_prefix_kv().set_options({"resident_blocks": 3, **options})
    return torch.ops.lora_kernels_emulated_prefix.prefix_kv_backward(grads, dtype, "")


def check(prefix, layers, heads, batch, copies, dtype, lay_out=inside_longer, **options):
    """Runs both directions and compares; returns the results. The sums are in the order of the definition."""
    kv = run_forward(prefix, layers, heads, batch, copies, dtype, **options)
    expected = naive_prefix.forward(prefix, layers, heads, batch, dtype)
    assert kv.dtype == dtype
    assert torch.equal(kv.flatten(0, 1), torch.stack(expected))
    assert (kv.stride(2) == 0) == (not copies and batch != 1)
    grads = grads_of(expected)
    gradient = run_backward(lay_out(grads), prefix.dtype, **options)
    assert gradient.dtype == prefix.dtype
    assert torch.equal(gradient, naive_prefix.backward(grads, prefix.dtype))
    return kv, gradient


CASES = covering_pairs(
    dtypes=DTYPES,
    copies=[False, True],
    head_dim=[16, 64, 3],
    heads=[1, 3],
    layers=[1, 17],
    batch=[1, 2, 5],
    tokens=[1, 9],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(native, case):
    dtype, out_dtype = case["dtypes"]
    shape = {name: case[name] for name in ("head_dim", "layers", "heads", "tokens")}
    check(make(dtype, **shape), case["layers"], case["heads"], case["batch"], case["copies"], out_dtype)
    assert native.last_launch()[0] == (case["head_dim"] != 3)


@pytest.mark.parametrize(("batch", "tokens", "head_dim"), [(0, 5, 16), (2, 0, 16), (2, 5, 0)])
def test_empty(batch, tokens, head_dim):
    check(make(BF16, head_dim, tokens=tokens), 3, 2, batch, True, BF16, lambda grads: grads)


def off_16_bytes(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)


def test_one_tensor_off_16_bytes_is_enough(native):
    check(off_16_bytes(make(FP32, 16)), 3, 2, 2, False, BF16, lambda grads: [*grads[:-1], off_16_bytes(grads[-1])])
    assert not native.last_launch()[0]
    run_forward(off_16_bytes(make(FP32, 16)), 3, 2, 2, False, BF16)
    assert not native.last_launch()[0]


def test_strides():
    whole = torch.randn(10, 3 * 2 * 2 * 16 + 8)
    for prefix in (whole[::2, 4:-4], whole[:5, 8:].t().contiguous().t()):
        check(
            prefix, 3, 2, 3, False, BF16, lambda grads: [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
        )
    zero = torch.zeros(16, dtype=BF16).expand(3, 2, 5, 16)
    check(make(FP32, 16), 3, 2, 3, False, BF16, lambda grads: grads)
    assert not run_backward([zero] * 6, FP32).any()


def test_the_same_bits_in_every_order():
    torch.manual_seed(1)
    prefix = make(FP32, 32, layers=2)
    first = None
    for seed in range(4):
        torch.manual_seed(2)
        results = check(prefix, 2, 2, 5, True, BF16, seed=seed, resident_blocks=1 + 3 * seed)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first))


@pytest.mark.parametrize(
    ("dtypes", "head_dim"), [((FP32, BF16), 16), ((BF16, BF16), 16), ((FP32, FP16), 3), ((FP32, FP32), 16)]
)
def test_every_store_that_is_left_out_is_caught(native, dtypes, head_dim):
    prefix = make(dtypes[0], head_dim)
    kv = run_forward(prefix, 3, 2, 2, True, dtypes[1])
    sites = len(native.last_launch()[2].global_store_sites)
    grads = [g.contiguous() for g in kv.flatten(0, 1)]
    gradient = run_backward(grads, dtypes[0])
    sites_backward = len(native.last_launch()[2].global_store_sites)
    assert min(sites, sites_backward) >= 1
    for site in range(sites):
        assert not torch.equal(run_forward(prefix, 3, 2, 2, True, dtypes[1], drop_global_store=site), kv)
    for site in range(sites_backward):
        assert not torch.equal(run_backward(grads, dtypes[0], drop_global_store=site), gradient)


def test_what_is_refused(monkeypatch):
    for dtype, out_dtype in ((FP64, FP64), (FP32, FP64), (BF16, FP32), (BF16, FP16)):
        with pytest.raises(RuntimeError, match="serve float32, bfloat16 and float16"):
            run_forward(make(dtype), 3, 2, 1, False, out_dtype)
    grads = grads_of(naive_prefix.forward(make(), 3, 2, 2, BF16))
    with pytest.raises(RuntimeError, match="serve float32, bfloat16 and float16"):
        run_backward(grads, FP16)
    with pytest.raises(RuntimeError, match="differ in shape, dtype or device"):
        run_backward([*grads[:-1], grads[-1].float()], FP32)
    with pytest.raises(RuntimeError, match="differ in shape, dtype or device"):
        run_backward([*(grad.to("meta") for grad in grads[:-1]), grads[-1]], FP32)


def test_launches_go_to_the_callers_stream(native):
    native.set_stream(0x77)
    run_forward(make(), 3, 2, 1, False, BF16)
    assert native.last_launch()[3] == 0x77
    run_backward(grads_of(naive_prefix.forward(make(), 3, 2, 2, BF16)), FP32)
    assert native.last_launch()[3] == 0x77
    native.set_stream(0)


def test_what_dispatch_asks(monkeypatch):
    forward, backward = SPEC.kernels["cuda"].supports, BACKWARD.kernels["cuda"].supports
    grads = grads_of(naive_prefix.forward(make(), 3, 2, 2, BF16))
    pretend_gpu(monkeypatch, (7, 0))
    assert forward(make(), 3, 2, 1, False, BF16).reason == Reason.ARCHITECTURE
    pretend_gpu(monkeypatch)
    assert forward(make(), 3, 2, 1, False, BF16).schedule == "transpose"
    assert forward(make(BF16), 3, 2, 1, False, FP32).reason == Reason.DTYPE
    assert forward(make(), 3, 2, 2**30, True, BF16).reason == Reason.SIZE
    assert backward(grads, FP32).schedule == "row_sum"
    assert backward(grads, FP16).reason == Reason.DTYPE
