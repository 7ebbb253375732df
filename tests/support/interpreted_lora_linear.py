"""The Triton kernels in Triton's interpreter, on the CPU. Run by test_triton_lora_linear.py.

The interpreter computes bfloat16 wrongly (Triton 3.8): float16 and float32 only.
"""

from __future__ import annotations

import itertools
import math

import emulator
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from covering import case_id, covering_pairs
from emulated import matrices, operand, rounded_backward, rounded_forward
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels import philox
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels import configs, lora_linear
from lora_kernels.triton_kernels.dropout_mask import keep_tile
from lora_kernels.triton_kernels.launching import Device, run_all

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
SCALING, SEED = 1.7, -987654321012345
ONE_SM, MANY_SMS = 1, 10**6  # the large tile wherever there are rows for it; the small one


@pytest.fixture
def pretend(monkeypatch):
    """pretend(target, sms): kernels are configured as for this GPU."""

    def choose(target, sms):
        for module in (lora_linear, _triton):
            monkeypatch.setattr(module, "device_of", lambda _: Device(target, sms))

    choose("sm_80", ONE_SM)
    return choose


def make_problem(m, k, n, r, dtype, adapter_dtype, bias=True):
    """Inputs representable in their dtypes, as float64."""

    def rounded(t, dtype):
        return t.to(dtype).double()

    return {
        "x": rounded(torch.randn(m, k), dtype),
        "weight": rounded(torch.randn(n, k) / math.sqrt(k), dtype),
        "lora_A": rounded(torch.randn(r, k) / math.sqrt(k), adapter_dtype),
        "lora_B": rounded(torch.randn(n, r) / math.sqrt(r), adapter_dtype),
        "bias": rounded(torch.randn(n), dtype) if bias else None,
        "grad_y": rounded(torch.randn(m, n), dtype),
    }


def results(problem, dtype, adapter_dtype, function):
    """[y, dx, dA, dB] of function in these dtypes."""
    cast = {k: None if v is None else v.to(adapter_dtype if "lora" in k else dtype) for k, v in problem.items()}
    grad_y = cast.pop("grad_y")
    leaves = [cast[k].requires_grad_() for k in ("x", "lora_A", "lora_B")]
    y = function(**cast)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def unfused(p, scaling=SCALING):
    """What PEFT computes, as a function."""

    def function(x, weight, lora_A, lora_B, bias):
        dropped = x
        if p > 0:
            keep = philox.keep_mask(torch.tensor([SEED]), *x.shape, p)
            dropped = torch.where(keep, x * philox.keep_scale(p), torch.zeros((), dtype=x.dtype))
        return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_A), lora_B) * scaling

    return function


def fused(backend, p, scaling=SCALING):
    """lora_linear on a backend, as a function."""

    def function(x, weight, lora_A, lora_B, bias):
        with lk.use_backend(backend):
            return lk.lora_linear(
                x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=p, training=True, seed=SEED
            )

    return function


def check(m, k, n, r, dtype, adapter_dtype, p=0.0, bias=True, scaling=SCALING):
    """Values and gradients against float64; returns them."""
    problem = make_problem(m, k, n, r, dtype, adapter_dtype, bias)
    ours = results(problem, dtype, adapter_dtype, fused("triton", p, scaling))
    torch_code = results(problem, dtype, dtype, unfused(p, scaling))
    exact = results(problem, FP64, FP64, unfused(p, scaling))
    for name, a, b, c in zip(("y", "dx", "dA", "dB"), ours, torch_code, exact):
        assert a.dtype == (adapter_dtype if name in ("dA", "dB") else dtype)
        assert_as_accurate(a, b, c, name)
    assert set(lk.stats()["served"]) == {("lora_linear", "triton"), ("lora_linear_backward", "triton")}
    return ours


AXES = {
    "dtypes": ((FP16, FP16), (FP16, FP32), (FP32, FP32)),
    "p": (0.0, 0.3),
    "bias": (False, True),
    "target": ("sm_80", "sm_90", "gfx942"),
    "rank": (1, 8, 16, 17, 64, 256),
}
# Sizes that lead to each tile; the last column is what the forward of a 16-bit problem must then use.
SHAPES = {
    "large": dict(m=(150, 257), n=(272, 144), k=(48, 160), sms=ONE_SM),
    "small": dict(m=(64, 150), n=(144, 80), k=(48, 160), sms=MANY_SMS),
    "few_rows": dict(m=(1, 16), n=(144, 80), k=(48, 160), sms=MANY_SMS),
    "unaligned": dict(m=(1, 70), n=(1, 75), k=(1, 70), sms=ONE_SM),
}
CASES = [
    {"tile": tile, **case, "sms": shapes["sms"]}
    for tile, shapes in SHAPES.items()
    for case in covering_pairs(**{k: v for k, v in shapes.items() if k != "sms"}, **AXES)
]


def _runs(case):
    """A third of the cases by default: every one takes about a second."""
    return pytest.param(case, id=case_id(case), marks=[] if CASES.index(case) % 3 == 0 else pytest.mark.full)


@pytest.mark.parametrize("case", [_runs(case) for case in CASES])
def test_values_and_gradients(case, pretend):
    pretend(case["target"], case["sms"])
    check(case["m"], case["k"], case["n"], case["rank"], *case["dtypes"], case["p"], case["bias"])


@pytest.mark.parametrize(
    ("tile", "m", "n", "k"), [("large", 150, 272, 48), ("small", 64, 144, 48), ("few_rows", 16, 144, 48)]
)
def test_the_cases_lead_to_their_tiles(tile, m, n, k, pretend):
    device = Device("sm_90", SHAPES[tile]["sms"])
    (launch,) = lora_linear.fused_launches(device, "ticketed", task(m, n, k, 16), drops="p")
    wanted = getattr(configs.TARGETS["sm_90"], tile)
    assert (launch.constants["BLOCK_ROWS"], launch.constants["BLOCK_COLUMNS"]) == (wanted.rows, wanted.columns)


def task(m, n, k, rank, p=0.0, dtype=FP16):
    """Operands of a forward."""
    t = {name: v.to(dtype) for name, v in make_problem(m, k, n, rank, dtype, dtype).items()}
    y, s = torch.empty(m, n, dtype=dtype), torch.empty(m, rank, dtype=dtype)
    seed = torch.tensor([SEED]) if p > 0 else None
    return lora_linear.forward_task(y, s, t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"], seed, SCALING, p)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_schedules_agree_bit_for_bit(p):
    device = Device("sm_80", ONE_SM)
    outputs = []
    for schedule in ("ticketed", "split", "ticketed"):
        torch.manual_seed(1)
        operands = task(300, 272, 80, 72, p)
        run_all(lora_linear.fused_launches(device, schedule, operands, drops="p"), CPU)
        outputs.append((operands.out.data, operands.inner.data))
    for other in outputs[1:]:
        for a, b in zip(other, outputs[0]):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("n", [64, 33])
def test_dual_schedule(n, p, pretend):
    pretend("sm_80", ONE_SM)
    problem = make_problem(150, 64, n, 16, FP16, FP16)
    t = {name: v.half() for name, v in problem.items() if name != "grad_y"}
    with lk.use_backend("triton"):
        assert lk.why("lora_linear", *t.values(), dropout_p=p, training=True).schedule == "dual"
    check(150, 64, n, 16, FP16, FP16, p)


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one tile column"):
        lora_linear.fused_launches(Device("sm_80", ONE_SM), "dual", task(16, 272, 16, 16), drops="p")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sums_over_rows_in_shares(p, pretend):
    # Two tiles and 40 SMs: more than one share, the last one shorter.
    pretend("sm_80", 40)
    big, inner = torch.randn(1100, 144).half(), torch.randn(1100, 16).half()
    out = torch.empty(144, 16)
    seed = torch.tensor([SEED]) if p > 0 else None
    launch = lora_linear.reduce_launch(Device("sm_80", 40), out, big, inner, seed, SCALING, p)
    assert launch.grid[1] > 1
    run_all([launch], CPU)
    keep = philox.keep_mask(torch.tensor([SEED]), *big.shape, p)
    dropped = torch.where(keep, big.double() * philox.keep_scale(p), 0.0)
    exact = SCALING * dropped.t() @ inner.double()
    assert_as_accurate(out, (SCALING * dropped.float().t() @ inner.float()), exact)
    again = torch.empty_like(out)
    run_all([lora_linear.reduce_launch(Device("sm_80", 40), again, big, inner, seed, SCALING, p)], CPU)
    assert torch.equal(again, out)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("schedule", "n"), [("ticketed", 144), ("split", 144), ("dual", 52)])
def test_factors_of_tf32_are_rounded_to_nearest(schedule, n, p, fp32_precision):
    """Every factor of every product, s and dY B as stored; kills: one taken as it is, or with its low bits cut off."""
    fp32_precision("tf32")
    device, seed = Device("sm_90", ONE_SM), torch.tensor([SEED]) if p > 0 else None
    x, weight, A, B, bias = matrices(70, n, 60, 24, FP32, bias=True)
    grad_y, y, s = torch.randn(70, n), torch.empty(70, n), torch.empty(70, 24)
    forward = lora_linear.forward_task(y, s, x, weight, A, B, bias, seed, SCALING, p)
    run_all(lora_linear.fused_launches(device, schedule, forward, drops="p"), CPU)
    dx, ds, dA, dB = (torch.empty_like(t) for t in (x, s, A, B))
    backward = lora_linear.backward_task(dx, ds, grad_y, weight, A, B, seed, SCALING, p)
    run_all(lora_linear.fused_launches(device, schedule, backward, drops="branch"), CPU)
    sums = (dA.t(), x, ds, seed, SCALING, p), (dB, grad_y, s, None, SCALING, 0.0)
    run_all([lora_linear.reduce_launch(device, *operands) for operands in sums], CPU)

    mask = (None, 1.0) if seed is None else (philox.keep_mask(seed, *x.shape, p), philox.keep_scale(p))

    def of_rounded_factors(dtype):
        return [
            *rounded_forward(x, weight, A, B, bias, *mask, s, dtype),
            *rounded_backward(grad_y, x, s, weight, A, B, *mask, ds, dtype),
        ]

    results = of_rounded_factors(FP32), of_rounded_factors(FP64)
    for name, ours, torch_code, exact in zip(("y", "s", "dx", "dA", "dB", "ds"), (y, s, dx, dA, dB, ds), *results):
        assert_as_accurate(ours, torch_code, exact, name)


@triton.jit
def _rounded(numbers, rounded, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(rounded + i, lora_linear._tf32(tl.load(numbers + i)))


def test_tf32_of_any_number():
    """Kills: ties to even or towards zero, bits that stay, and NaN that becomes a number."""
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000])
    high = torch.tensor([0, 0x2000, 0x3F80_0000, 0x7F7F_C000, 0x7F7F_E000, 0x7F80_0000, 0x7FC0_0000, 0x7FFF_C000])
    magnitudes = (high[:, None] + low).view(-1)
    bits = torch.cat([magnitudes, magnitudes - 2**31]).to(torch.int32)
    numbers, rounded = bits.view(FP32), torch.empty(len(bits))
    _rounded[(1,)](numbers, rounded, len(bits))
    assert rounded[numbers.isnan()].isnan().all()
    others = ~numbers.isnan()
    assert torch.equal(rounded[others].view(torch.int32), operand(numbers[others]).view(torch.int32))


@pytest.mark.parametrize("scaling", [0.0, -0.5, 1e-5, 1e5])
def test_any_scaling(scaling, pretend):
    check(40, 48, 80, 16, FP16 if abs(scaling) < 1e5 else FP32, FP32, scaling=scaling)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (0, 3)], ids=str)
def test_any_leading_shape(lead, pretend):
    t = {name: v.half() for name, v in make_problem(1, 48, 80, 4, FP16, FP16).items()}
    del t["grad_y"]
    t["x"] = torch.randn(*lead, 48).half()
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    with lk.use_backend("triton"):
        y = lk.lora_linear(**t)
        y.sum().backward()
    expected = F.linear(t["x"], t["weight"], t["bias"]) + F.linear(F.linear(t["x"], t["lora_A"]), t["lora_B"])
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=1e-2)
    assert t["x"].grad.shape == t["x"].shape
    if y.numel() == 0:
        assert not t["lora_A"].grad.any()
        assert not t["lora_B"].grad.any()


def inside(t, columns):
    """``t`` as part of a wider matrix of NaN."""
    wide = torch.full((t.shape[0], columns), float("nan"), dtype=t.dtype)
    wide[:, 16 : 16 + t.shape[1]] = t
    return wide[:, 16 : 16 + t.shape[1]]


LAYOUTS = {
    "rows of a wider matrix, aligned": lambda t: inside(t, 144),
    "rows of a wider matrix": lambda t: inside(t, 141),
    "columns outermost": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: inside(t.repeat_interleave(2, 1), 300)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_strided_operands(layout, p, pretend):
    def strided(x, weight, lora_A, lora_B, bias):
        x, weight, lora_A, lora_B = (LAYOUTS[layout](t) for t in (x, weight, lora_A, lora_B))
        return fused("triton", p)(x, weight, lora_A, lora_B, bias)

    problem = make_problem(70, 48, 80, 16, FP16, FP16)
    # The gradients differ in layout only: the kernels read the same values in the same order.
    for a, b in zip(results(problem, FP16, FP16, strided), results(problem, FP16, FP16, fused("triton", p))):
        assert (a - b).abs().max() <= 4 * torch.finfo(FP16).eps * b.abs().max()


@pytest.mark.parametrize("layout", ["rows of a wider matrix, aligned", "columns outermost"])
def test_descriptors_fetch_what_pointers_do(layout, pretend, monkeypatch):
    def laid_out(x, weight, lora_A, lora_B, bias):
        return fused("triton", 0.3)(LAYOUTS[layout](x), LAYOUTS[layout](weight), lora_A, lora_B, bias)

    launched = []
    monkeypatch.setattr(
        lora_linear, "run_all", lambda launches, gpu: (launched.extend(launches), run_all(launches, gpu))
    )
    problem = make_problem(160, 80, 272, 16, FP16, FP16)
    problem["x"][159, 3] = problem["grad_y"][159, 3] = float("nan")  # the last row that there is
    pretend("sm_90", ONE_SM)
    through_descriptors = results(problem, FP16, FP16, laid_out)
    descriptors = [launch.args[2:] for launch in launched if launch.kernel is lora_linear._fused]
    assert len(descriptors) == 2
    assert None not in itertools.chain(*descriptors)
    monkeypatch.setitem(configs.TARGETS, "sm_90", configs.TARGETS["sm_90"]._replace(descriptors=False))
    for a, b in zip(through_descriptors, results(problem, FP16, FP16, laid_out)):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(("x", "lora_A", "lora_B"), n)])
def test_needs_input_grad_is_honoured(wanted, pretend):
    problem = make_problem(40, 48, 80, 16, FP16, FP16)
    everything = dict(zip(("x", "lora_A", "lora_B"), results(problem, FP16, FP16, fused("triton", 0.3))[1:]))
    t = {name: v.half().requires_grad_(name in wanted) for name, v in problem.items()}
    grad_y = t.pop("grad_y")
    fused("triton", 0.3)(**t).backward(grad_y)
    for name, grad in everything.items():
        assert torch.equal(t[name].grad, grad) if name in wanted else t[name].grad is None


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(
    ("rows", "columns", "p"), [(1, 1, 0.5), (33, 576, 0.3), (3, 2057, 0.9), (5, 9, 1.0), (0, 5, 0.5)]
)
def test_mask_equals_the_definition(rows, columns, p, seed):
    with lk.use_backend("triton"):
        mask = lk.dropout_mask(rows, columns, p, seed)
    assert lk.stats()["served"] == {("dropout_mask", "triton"): 1}
    assert torch.equal(mask, philox.keep_mask(torch.tensor([seed]), rows, columns, p))


@triton.jit
def _rows_of_mask(seed, rows, mask, threshold, COLUMNS: tl.constexpr):
    i = tl.arange(0, 2)
    keep = keep_tile(seed, tl.load(rows + i), 0, COLUMNS, threshold, COLUMNS)
    tl.store(mask + i[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep)


def test_mask_beyond_32_bits_of_groups():
    # Row 2**29 of a matrix 64 wide begins at group 2**32: the counter's second word counts.
    rows = torch.tensor([2**29, 2**29 + 1])
    group = rows[:, None] * 8 + torch.arange(8)
    seed, zero, low = torch.tensor([SEED]), torch.zeros_like(group), 2**32 - 1
    words = philox.philox4x32((group & low, group >> 32, zero, zero), (seed & low, seed >> 32 & low))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).view(2, 64)
    mask = torch.empty(2, 64, dtype=torch.bool)
    _rows_of_mask[(1,)](seed, rows, mask, philox.keep_threshold(0.5), 64)
    assert torch.equal(mask, halves >= philox.keep_threshold(0.5))


def test_everything_dropped_gives_the_base_layer(pretend):
    t = {name: v.half() for name, v in make_problem(40, 48, 80, 16, FP16, FP16).items() if name != "grad_y"}
    y = fused("triton", 1.0)(**t)
    base = fused("triton", 0.0)(**{**t, "lora_B": torch.zeros_like(t["lora_B"])})
    assert torch.equal(y, base)


def test_nan_in_a_row_stays_in_that_row(pretend):
    t = {name: v.half() for name, v in make_problem(130, 48, 80, 16, FP16, FP16).items() if name != "grad_y"}
    t["x"][129] = float("nan")
    y = fused("triton", 0.0)(**t)
    assert y[129].isnan().all()
    assert not y[:129].isnan().any()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP16, FP16), (FP16, FP32), (FP32, FP32)], ids=str)
def test_agrees_with_the_cpu_kernels(dtype, adapter_dtype, p, pretend):
    problem = make_problem(150, 80, 144, 24, dtype, adapter_dtype)
    ours, cpu = (results(problem, dtype, adapter_dtype, fused(backend, p)) for backend in ("triton", "cpu"))
    for a, b in zip(ours, cpu):
        assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_agrees_with_the_cuda_kernel(p, pretend):
    problem = make_problem(150, 80, 144, 24, FP16, FP16)
    t = {name: v.half() for name, v in problem.items() if name != "grad_y"}
    seed = torch.tensor([SEED]) if p > 0 else None
    emulator.load_lora_linear()
    cuda = torch.ops.lora_kernels_emulated.lora_linear(*t.values(), seed, SCALING, p, "auto")
    ours = lora_linear.forward("ticketed", *t.values(), seed, SCALING, p)
    for a, b in zip(ours, cuda):
        assert (a - b).abs().max() <= 2 * torch.finfo(FP16).eps * b.abs().max()


def test_why_and_refusals():
    t = {name: v.half() for name, v in make_problem(8, 48, 80, 4, FP16, FP16).items() if name != "grad_y"}
    assert lk.backends()["triton"].available
    assert lk.why("lora_linear", *t.values()).backend == "cpu", "the interpreter is for those who ask for it"
    with lk.use_backend("triton"):
        assert lk.why("lora_linear", *t.values())[:2] == ("triton", "ticketed")
        with pytest.raises(RuntimeError, match="rank above 256"):
            lk.lora_linear(t["x"], t["weight"], torch.zeros(257, 48).half(), torch.zeros(80, 257).half())
        with pytest.raises(RuntimeError, match="dtype not served"):
            lk.lora_linear(*(v.double() for v in t.values()))
