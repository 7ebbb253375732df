"""The CUDA kernels of gated_activation and their binding, emulated: values, gradients, missing stores."""

from __future__ import annotations

import emulator
import gated
import pytest
import torch
from gated import BF16, FP16, FP32, FP64, SHAPES, make
from pretended_gpu import pretend_gpu

from lora_kernels.ops.gated_activation import ACTIVATIONS, BACKWARD, SPEC
from lora_kernels.reasons import Reason

OPS = "lora_kernels_emulated_gated"


@pytest.fixture(scope="module", autouse=True)
def native():
    """The module that the tests steer the launches with."""
    library = torch.library.Library(OPS, "DEF")
    for name in ("gated_activation_out", "gated_activation_backward_out"):
        schema = str(getattr(torch.ops.lora_kernels_native, name).default._schema)
        library.define(schema.removeprefix("lora_kernels_native::"))
    yield emulator.load_gated_activation()
    library._destroy()


def run(gate, up, grad_h, activation, in_place=False, **options):
    """h and the gradients of gate and up, into new memory or into copies of the operands'."""
    emulator.load_gated_activation().set_options({"resident_blocks": 3, **options})
    ops = getattr(torch.ops, OPS)
    gate, up = gate.clone(), up.clone()
    h = torch.empty_like(gate)
    ops.gated_activation_out(gate, up, activation, h)
    results = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    ops.gated_activation_backward_out(grad_h, gate, up, activation, *results)
    return h, *results


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(native, activation, shape, dtype, in_place):
    given = make(shape, dtype)
    gated.check(run(*given, activation, in_place), *given, activation)
    if given[0].numel():
        assert native.last_launch()[0] == (given[0].numel() * dtype.itemsize % 16 == 0)


def test_off_16_bytes(native):
    given = [torch.cat([t.new_zeros(1), t])[1:] for t in make((264,), BF16)]
    gated.check(run(*given, "silu"), *given, "silu")
    assert not native.last_launch()[0]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("before", [2**31, 2**33])
def test_elements_behind_what_32_bits_count(native, aligned, before):
    """Kills: an element's number reckoned in 32 bits. Only the last blocks run: what is in front is not there."""
    gate, up, _ = given = make((2504,), BF16)
    h = torch.empty_like(gate)
    native.gated_behind(before, aligned, *(t.data_ptr() for t in (gate, up, h)), len(h))
    assert torch.equal(h, run(*given, "silu")[0])


@pytest.mark.parametrize("count", [264, 263])
def test_every_store_that_is_left_out_is_caught(native, count):
    given = make((count,), BF16)
    whole = run(*given, "silu")
    sites = len(native.last_launch()[2].global_store_sites)
    assert sites >= 1
    for site in range(sites):
        assert not all(map(torch.equal, run(*given, "silu", drop_global_store=site), whole))


def test_what_is_refused():
    ops = getattr(torch.ops, OPS)
    gate, up, _ = make((4, 8), FP32)
    for changes, message in (
        ({"up": up[:2]}, "up must be contiguous and as large"),
        ({"up": up.t()}, "up must be contiguous and as large"),
        ({"up": up.half()}, "up must be contiguous and as large"),
        ({"activation": "swish"}, "activation must be silu"),
        ({"gate": gate.double(), "up": up.double(), "h": up.double()}, "serve float32, bfloat16 and float16"),
    ):
        given = {"gate": gate, "up": up, "activation": "silu", "h": torch.empty_like(gate)} | changes
        with pytest.raises(RuntimeError, match=message):
            ops.gated_activation_out(*given.values())


def test_launches_go_to_the_callers_stream(native):
    native.set_stream(0x77)
    run(*make((40,), FP32), "relu")
    assert native.last_launch()[3] == 0x77
    native.set_stream(0)


def test_what_dispatch_asks(monkeypatch):
    gate, up, grad_h = make((2, 8), BF16)
    pretend_gpu(monkeypatch, (7, 0))
    assert SPEC.kernels["cuda"].supports(gate, up, "silu").reason == Reason.ARCHITECTURE
    pretend_gpu(monkeypatch)
    assert SPEC.kernels["cuda"].supports(gate, up, "silu").schedule == "elementwise"
    assert BACKWARD.kernels["cuda"].supports(grad_h, gate, up, "silu").schedule == "elementwise"
    assert SPEC.kernels["cuda"].supports(gate.to(FP64), up.to(FP64), "silu").reason == Reason.DTYPE
