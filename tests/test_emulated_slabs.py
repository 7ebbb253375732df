"""Many rows by packed weights on CUDA, slab by slab, emulated: values, gradients, memory, and who is served so."""

from __future__ import annotations

import emulator
import pytest
import torch
from covering import case_id, covering_pairs
from emulated_packed import SCALING, SEED, cuda_on_the_cpu, library, make, results, unfused  # noqa: F401
from gptq_layers import Stub
from numerics import assert_as_accurate
from packed import decoded, random_packed, random_scaled, with_part
from pretended_gpu import pretend_gpu

import lora_kernels as lk
from lora_kernels.formats import from_module
from lora_kernels.support import cuda, gpu_packed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M, N, K, RANK = 33, 200, 328, 8
SLAB = 64


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    """On a GPU whose products are the vendor's, slabs are of 64 rows or columns."""
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(gpu_packed, "_SLAB_STEP", SLAB)
    monkeypatch.setattr(gpu_packed, "_SLAB_AREA", 1)


def weight_of(layout, dtype, n=N, k=K):
    if layout == "codes4":
        return random_packed(n, k, 8, nested=True).to(dtype=dtype)
    if layout == "codes4_low":
        return random_packed(n, k - k % 32 + 32, 32, layout=layout).to(dtype=dtype)
    return random_scaled(n, k, layout, 128, "squares").to(dtype=dtype)


CASES = covering_pairs(
    layout=["codes4", "codes4_low", "int8", "e4m3"], dtypes=[(BF16, BF16), (BF16, FP32), (FP16, FP32)], p=[0.0, 0.3],
    bias=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case):
    """The decoded weight in float64 is the measure. Kills: a slab's result that is written beside its place, a product
    with the slab before, the last slab taken to be whole, gradients rounded once for every slab."""
    (dtype, adapter), p = case["dtypes"], case["p"]
    packed = weight_of(case["layout"], dtype)
    n, k = packed.shape
    operands, grad_y = make(M, n, k, RANK, dtype, adapter, case["bias"]), torch.randn(2, M, n).to(dtype)
    ours = results(lk.lora_linear, packed, operands, grad_y, p)
    names = "lora_linear_packed", "lora_linear_packed_backward"
    assert lk.stats() == {"served": {(name, "cuda"): 1 for name in names}, "fallback": {}}
    as_one = [None if t is None else t.to(dtype) for t in operands]
    exact = [None if t is None else t.double() for t in operands]
    theirs = results(unfused, decoded(packed), as_one, grad_y, p)
    true = results(unfused, decoded(packed).double(), exact, grad_y.double(), p)
    for name, a, b, c in zip(("y", "dX", "dA", "dB"), ours, theirs, true):
        assert a.dtype == (adapter if name in ("dA", "dB") else dtype)
        assert_as_accurate(a, b, c, name)
    with cuda.use_schedule("cublas"):
        whole = results(lk.lora_linear, decoded(packed), operands, grad_y, p)
    for a, b in zip(ours[2:], whole[2:]):
        assert torch.equal(a, b), "what does not read the weight has the same bits"


def test_the_registered_ops():
    """Their schemas and gradients, and a compiled call without a graph break."""
    packed = weight_of("int8", BF16)
    x, lora_A, lora_B, bias = make(2, N, K, RANK, BF16)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    args = (x, *packed.args, lora_A, lora_B, bias, None, SCALING, 0.0)
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_packed.default, args, test_utils=tests)
    torch.library.opcheck(torch.ops.lora_kernels.linear_packed.default, (x, *packed.args, bias), test_utils=tests)

    def call(x):
        return lk.lora_linear(x, packed, lora_A, lora_B, bias, scaling=SCALING)

    expected = torch.autograd.grad(call(x).float().square().sum(), leaves)
    torch._dynamo.reset()
    lk.reset_stats()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    grads = torch.autograd.grad(compiled.float().square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))
    assert lk.stats()["served"]["lora_linear_packed", "cuda"] == 1
    assert ("dequantize", "cuda") not in lk.stats()["served"]


def test_slabs_are_decoded_one_after_the_other_in_the_callers_stream():
    """Kills: a slab of another size than was asked for, a launch on another stream."""
    module = emulator.load_lora_linear()
    packed = weight_of("codes4", BF16)
    x, lora_A, lora_B, bias = make(M, N, K, RANK, BF16)
    module.set_stream(0x55)
    module.decoded()
    try:
        lk.lora_linear(x, packed, lora_A, lora_B, bias)
        runs = module.decoded()
    finally:
        module.set_stream(0)
    assert runs == [(0x55, begin * K, 1, min(SLAB, N - begin) * K) for begin in range(0, N, SLAB)]
    y = lk.lora_linear(x.requires_grad_(), packed, lora_A, lora_B, bias)
    module.decoded()
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert module.decoded() == [(0, begin, N, min(SLAB, K - begin)) for begin in range(0, K, SLAB)]


def test_no_memory_is_as_large_as_the_weight():
    """Kills: a slab that has memory of its own, which is none of the call's any more when it is not needed, but counts
    in the peak; a decoded weight."""
    packed = weight_of("int8", BF16, n=512, k=640)
    operands, grad_y = make(3, 512, 640, RANK, BF16), torch.randn(2, 3, 512).bfloat16()
    module = emulator.load_lora_linear()
    x, lora_A, lora_B, bias = operands
    module.allocations()
    lk.lora_linear(x, packed, lora_A, lora_B, bias)
    forward = sorted(module.allocations())
    assert forward[-1] == SLAB * 640
    assert sum(size >= SLAB * 640 for size in forward) == 1, "one for all slabs"
    results(lk.lora_linear, packed, operands, grad_y, 0.0)
    backward = sorted(module.allocations())
    assert backward[-2:] == [SLAB * 512, SLAB * 640]


@pytest.mark.parametrize(
    ("change", "slabs"),
    [
        ({}, True), ({"capability": (8, 0)}, True), ({"capability": (8, 6)}, False), ({"capability": (12, 0)}, False),
        ({"schedule": "one launch"}, False), ({"schedule": "cublas", "capability": (8, 6)}, True), ({"n": 196}, False),
        ({"n": 120}, False), ({"dtype": FP32}, False), ({"layout": "gptq"}, False), ({"off": 1}, True),
    ],
    ids=str,
)  # fmt: skip
def test_who_is_served_so(monkeypatch, change, slabs):
    given = {"capability": (9, 0), "schedule": "auto", "n": N, "dtype": BF16, "layout": "int8", "off": 0, **change}
    pretend_gpu(monkeypatch, given["capability"])
    if given["layout"] == "gptq":
        packed = from_module(Stub(N, 320))
    else:
        packed = weight_of(given["layout"], given["dtype"], given["n"])
        data = torch.cat([torch.empty(given["off"], dtype=torch.uint8), packed.parts[0].view(-1)])[given["off"] :]
        packed = with_part(packed, 0, data)
    n, k = packed.shape
    x, lora_A, lora_B, bias = make(M, n, k, RANK, given["dtype"])
    with cuda.use_schedule(given["schedule"]):
        y = lk.lora_linear(x, packed, lora_A, lora_B, bias)
        why = lk.why("lora_linear", x, packed, lora_A, lora_B, bias) if slabs else None
    assert ("lora_linear" not in {op for op, _ in lk.stats()["served"]}) == slabs
    assert why is None or (why[1] == "slabs" and "for the vendor's GEMM" in why[2])
    exact = [t.double() for t in (x, decoded(packed, given["dtype"]), lora_A, lora_B, bias)]
    plain = [t.to(x.dtype) for t in exact]
    none = {"scaling": 1.0, "dropout_p": 0.0, "training": False, "seed": 0}
    assert_as_accurate(y, unfused(*plain, **none), unfused(*exact, **none))


@pytest.mark.parametrize("layout", ["codes4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_frozen_linear(dtype, bias, layout):
    """Kills: a bias of other rows, or of the first slab's."""
    packed = weight_of(layout, dtype)
    x, _, _, addend = make(M, N, K, RANK, dtype, bias=bias)
    grad_y, results = torch.randn(2, M, N).to(dtype), []
    for weight, as_type in ((packed, dtype), (None, dtype), (None, torch.float64)):
        leaf = x.to(as_type).requires_grad_()
        given = None if addend is None else addend.to(as_type)
        if weight is None:
            y = torch.nn.functional.linear(leaf, decoded(packed).to(as_type), given)
        else:
            y = torch.ops.lora_kernels.linear_packed(leaf, *weight.args, given)
        results.append([y.detach(), *torch.autograd.grad(y, leaf, grad_y.to(as_type))])
    names = "linear_packed", "linear_packed_backward"
    assert lk.stats() == {"served": {(name, "cuda"): 1 for name in names}, "fallback": {}}
    for ours, theirs, true in zip(*results):
        assert_as_accurate(ours, theirs, true)


def test_what_the_binding_of_a_frozen_linear_refuses():
    packed, (x, *_, bias) = weight_of("int8", BF16), make(M, N, K, RANK, BF16)
    weight, native = packed.args[:-1], torch.ops.lora_kernels_emulated
    for args, message in (
        ((x[..., :-1], *weight, bias, SLAB), r"x must be \[..., k\]"),
        ((x, *weight, bias[:-1], SLAB), r"bias must be \[n\]"),
        ((x, *weight, bias, 0), "a slab must have at least one row or column"),
        ((x.double(), *weight, bias.double(), SLAB), "the CUDA kernels serve bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.linear_slabs(*args)
    with pytest.raises(RuntimeError, match=r"x must be \[..., k\]"):
        native.linear_slabs_backward(x, *weight, SLAB)
    assert native.linear_slabs(x[:0], *weight, bias, SLAB).shape == (0, M, N)
    fake = torch.ops.lora_kernels_native
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = fake.linear_slabs(mode.from_tensor(x), *weight, bias, SLAB)
        assert y.shape == (2, M, N)
        assert fake.linear_slabs_backward(y, *weight, SLAB).shape == (2, M, K)


def test_gradients_of_the_adapter_alone_decode_nothing():
    packed = weight_of("int8", BF16)
    x, lora_A, lora_B, bias = make(M, N, K, RANK, BF16)
    leaves = [lora_A.requires_grad_(), lora_B.requires_grad_()]
    y = lk.lora_linear(x, packed, *leaves, bias, scaling=SCALING)
    module = emulator.load_lora_linear()
    module.decoded()
    torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert not module.decoded()


@pytest.mark.parametrize(
    ("rows", "length", "expected"),
    [(8192, 4096, 2048), (8192, 14336, 2048), (8192, 3072, 3072), (2048, 28672, 8192), (512, 28672, 28672)],
)
def test_the_size_of_a_slab(monkeypatch, rows, length, expected):
    monkeypatch.undo()
    assert gpu_packed.slab(rows, length) == expected


@pytest.mark.parametrize("name", ["lora_linear_slabs", "lora_linear_slabs_backward"])
def test_what_the_binding_refuses(name):
    """Kills: an address that is taken from a tensor of another size, dtype or device."""
    packed = weight_of("int8", BF16)
    parts, layout, n, k, block, _ = packed.args
    x, lora_A, lora_B, bias = make(M, N, K, RANK, BF16)
    weight, is_backward = (parts, layout, n, k, block), name.endswith("backward")
    call = getattr(torch.ops.lora_kernels_emulated, name)

    def run(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, length=SLAB):
        if not is_backward:
            return call(x, *weight, lora_A, lora_B, bias.to(x.dtype), None, SCALING, 0.0, length)
        grad_y, s = x.new_empty(2, M, N), x.new_empty(2, M, RANK)
        return call(grad_y, x, s, *weight, lora_A, lora_B, None, SCALING, 0.0, True, True, True, length)

    run()
    for change, message in (
        ({"length": 0}, "a slab must have at least one row or column"),
        ({"x": x[..., :-1]}, r"x must be \[..., k\]"),
        ({"x": x.double(), "lora_A": lora_A.double(), "lora_B": lora_B.double()}, "the CUDA kernels serve bfloat16"),
        ({"lora_A": lora_A[:, :-1]}, r"lora_A must be \[rank, k\]"),
        ({"lora_B": lora_B[:-1]}, r"lora_B must be \[n, rank\]"),
        ({"weight": (parts, "int4", n, k, block)}, "layout is not known: int4"),
        ({"weight": (parts, layout, n + 1, k, block)}, "data must be contiguous uint8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**change)


def test_no_rows():
    packed, (_, lora_A, lora_B, bias) = weight_of("int8", BF16), make(1, N, K, RANK, BF16)
    call = torch.ops.lora_kernels_emulated.lora_linear_slabs
    y, s = call(torch.empty(0, K, dtype=BF16), *packed.args[:-1], lora_A, lora_B, bias, None, 1.0, 0.0, SLAB)
    assert (y.shape, s.shape) == ((0, N), (0, RANK))


def test_fakes():
    """What a compiler is told of the shapes."""
    packed = weight_of("int8", BF16)
    x, lora_A, lora_B, bias = make(M, N, K, RANK, BF16, FP32)
    *weight, _ = packed.args
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        native = torch.ops.lora_kernels_native
        y, s = native.lora_linear_slabs(fake, *weight, lora_A, lora_B, bias, None, 1.0, 0.0, SLAB)
        assert (y.shape, s.shape) == ((2, M, N), (2, M, RANK))
        grads = native.lora_linear_slabs_backward(
            y, fake, s, *weight, lora_A, lora_B, None, 1.0, 0.0, True, True, True, SLAB
        )
    assert [(g.shape, g.dtype) for g in grads] == [((2, M, K), BF16), ((RANK, K), FP32), ((N, RANK), FP32)]
