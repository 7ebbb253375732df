"""Packed weights on the CPU: decoding to the bit, and every product by them against float64."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate
from packed import decoded, random_packed, random_scaled
from poisoned import memory_of_nan  # noqa: F401

from lora_kernels import _native, philox
from lora_kernels.formats import rounded_to
from lora_kernels.support import cpu, cpu_packed

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BITS = {FP32: torch.int32, BF16: torch.int16, FP16: torch.int16}
BLOCKS = [2, 6, 32, 34, 64, 96, 128, 256, 512, 1024, 2048, 4096]
SCALING, SEED = 1.7, 2026
# (rows, n, k, block, rank): ragged rows and outputs, blocks of every kind, several panels of W, no rows, no outputs.
SHAPES = [
    (0, 24, 64, 64, 4),
    (7, 0, 64, 64, 4),
    (9, 33, 576, 64, 17),
    (130, 65, 192, 96, 8),
    (70, 29, 128, 32, 3),
    (12, 40, 20, 2, 2),
    (33, 1100, 1024, 64, 16),
]
# (schedule, dtype of x, dtype that the weights are rounded to)
PRODUCTS = [
    ("aten", FP32, FP32), ("aten", FP32, BF16), ("aten", FP32, FP16), ("onednn", FP32, FP32), ("upcast", BF16, BF16),
    ("upcast", BF16, FP32), ("upcast", FP16, FP16), ("upcast", FP16, BF16), ("native", BF16, BF16),
    ("native", FP16, FP32),
]  # fmt: skip
FEW_ROWS = [
    (schedule, *dtypes)
    for schedule in ("decode", "rows")
    for dtypes in ((FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (BF16, FP32), (FP16, FP16))
]

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="lora_kernels._C is not built")


native = torch.ops.lora_kernels_native


def skip_unless_possible(schedule, dtype):
    if schedule == "onednn" and not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    if schedule == "native" and not cpu.has_native_matmul(dtype):
        pytest.skip(f"this CPU has no instructions for {dtype}")


# --------------------------------------------------------------------------------------------------- decoding


def assert_same_bits(ours, exact):
    assert ours.dtype == exact.dtype
    assert ours.shape == exact.shape
    nan = exact.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours.view(BITS[ours.dtype])[~nan], exact.view(BITS[ours.dtype])[~nan])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_bits_of_decoding(code, nested, dtype):
    """Kills: the nibbles' order, a contracted nested scale, a second rounding, a block that ends within a run."""
    for block in BLOCKS:
        for n, blocks_per_row in ((1, 1), (5, 3), (0, 2), (67, 2)):
            w = random_packed(n, block * blocks_per_row, block, nested, code).to(dtype=dtype)
            assert_same_bits(native.dequantize(*w.args, ""), decoded(w))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_bits_of_extreme_scales(dtype):
    """Subnormal halves, halves that overflow, negative scales and such of no number."""
    w = random_packed(64, 256, 32).to(dtype=dtype)
    scales = w.parts[1]
    scales[:] = torch.logspace(-12, 12, scales.numel())
    scales[::2] *= -1
    scales[5], scales[6], scales[7] = math.inf, -math.inf, math.nan
    scales[100:164] = torch.logspace(-8, -4, 64)
    scales[200:264] = torch.logspace(-41, -36, 64)
    assert_same_bits(native.dequantize(*w.args, ""), decoded(w))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_bits_are_those_of_bitsandbytes(code, nested, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional", reason="the bits are bitsandbytes'")
    for block in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        n, k = 48, max(192, block)
        k -= k % block
        data, state = bnb.quantize_4bit(
            torch.randn(n, k) * torch.rand(n, 1), quant_type=code, blocksize=block, compress_statistics=nested
        )
        parts = [data, state.absmax, state.code]
        if nested:
            parts += [state.state2.absmax, state.state2.code, state.offset]
        state.dtype = dtype
        ours = native.dequantize(parts, "codes4", n, k, block, dtype, "")
        assert_same_bits(ours, bnb.dequantize_4bit(data, state))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_bits_of_codes_in_low_halves_first(nested, dtype):
    """Kills: the order of layout "codes4"."""
    for block in BLOCKS:
        for n, blocks_per_row in ((1, 1), (5, 3), (0, 2), (7, 2)):
            w = random_packed(n, block * blocks_per_row, block, nested, layout="codes4_low").to(dtype=dtype)
            assert_same_bits(native.dequantize(*w.args, ""), decoded(w))


def scale_rows(n, block):
    """One row of scales per row, per square, and for all."""
    return dict.fromkeys((n, -(-n // block), 1))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
def test_bits_of_numbers_of_8_bits(layout, dtype):
    """Kills: a scale of a neighbouring row or column of squares, a block that ends within a run."""
    for n, k in ((1, 1), (5, 37), (0, 64), (70, 300), (9, 0), (3, 4096)):
        for block in (1, 3, 32, 64, 100, 128, max(1, k), k + 5):
            for rows in scale_rows(n, block):
                w = random_scaled(n, k, layout, block, rows).to(dtype=dtype)
                assert_same_bits(native.dequantize(*w.args, ""), decoded(w))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("layout", ["int8", "e4m3"])
def test_bits_of_every_number_of_8_bits(layout, dtype):
    """Kills: a subnormal of e4m3 or bf16 that is flushed, a NaN that is a number, -128 as 128, no overflow."""
    w = random_scaled(96, 256, layout, 32).to(dtype=dtype)
    data, scales = w.parts
    data[:] = torch.arange(256, dtype=torch.uint8)
    scales[:] = torch.logspace(-12, 37, scales.numel()).view_as(scales)
    scales[10:20] = torch.logspace(-41, -35, 80).view(10, 8)  # weights that are subnormal in bf16
    scales[::2] *= -1
    scales[5], scales[6], scales[7] = math.inf, -math.inf, math.nan
    assert_same_bits(native.dequantize(*w.args, ""), decoded(w))


# --------------------------------------------------------------------------------------------------- products


def make_problem(m, n, k, block, rank, x_dtype, dtype, adapter_dtype=None, weight=None):
    adapter_dtype = adapter_dtype or x_dtype
    return {
        "x": torch.randn(m, k).to(x_dtype),
        "weight": (weight or random_packed(n, k, block, nested=rank % 2 == 0)).to(dtype=dtype),
        "lora_A": (torch.randn(rank, k) / math.sqrt(k)).to(adapter_dtype),
        "lora_B": (torch.randn(n, rank) / math.sqrt(rank)).to(adapter_dtype),
        "bias": torch.randn(n).to(x_dtype),
        "grad_y": torch.randn(m, n).to(x_dtype),
    }


def ours(problem, schedule, p=0.0, bias=True, needs=(True, True, True), backward=None):
    """[y, s, dX, dA, dB]; the gradients by schedule ``backward``, which is the other one if not given."""
    x, w, A, B = (problem[name] for name in ("x", "weight", "lora_A", "lora_B"))
    seed = torch.tensor([SEED]) if p else None
    y, s = native.lora_linear_packed(x, *w.args, A, B, problem["bias"] if bias else None, seed, SCALING, p, schedule)
    gradients = native.lora_linear_packed_backward(
        problem["grad_y"], x, s, *w.args, A, B, seed, SCALING, p, *needs, backward or schedule
    )
    return [y, s, *gradients]


def product_weight(weight, x):
    """[n, k] in x's dtype."""
    return decoded(weight, rounded_to(weight.dtype, x)).to(x.dtype)


def torch_code(problem, dtype, p=0.0, bias=True):
    """The same by torch's products in this dtype, by the weight decoded, rounded to x's dtype."""
    weight = product_weight(problem["weight"], problem["x"]).to(dtype)
    x, A, B, row, grad_y = (problem[name].to(dtype) for name in ("x", "lora_A", "lora_B", "bias", "grad_y"))
    keep = philox.keep_mask(torch.tensor([SEED]), *x.shape, p) if p else None

    def dropped(t):
        return t if keep is None else torch.where(keep, t * philox.keep_scale(p), torch.zeros((), dtype=dtype))

    s = dropped(x) @ A.t()
    y = F.linear(x, weight, row if bias else None) + s @ B.t() * SCALING
    grad_s = grad_y @ B * SCALING
    grad_x = grad_y @ weight + dropped(grad_s @ A)
    return [y, s, grad_x, grad_s.t() @ dropped(x), grad_y.t() @ s * SCALING]


def assert_products(results, problem, p=0.0, bias=True):
    x_dtype = problem["x"].dtype
    names = ("y", "s", "dX", "dA", "dB")
    plain, exact = torch_code(problem, x_dtype, p, bias), torch_code(problem, FP64, p, bias)
    for name, a, b, c in zip(names, results, plain, exact):
        assert a.dtype == (problem["lora_A"].dtype if name in ("dA", "dB") else x_dtype)
        assert_as_accurate(a, b, c, f"{name} at p={p}, bias={bias}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), PRODUCTS, ids=str)
def test_values_by_panels(schedule, x_dtype, dtype, shape):
    """Kills: a panel at another panel's columns, a gradient of the last panel alone, weights of another rounding."""
    skip_unless_possible(schedule, x_dtype)
    for p, bias in ((0.0, True), (0.3, False)):
        problem = make_problem(*shape, x_dtype, dtype, FP32 if bias else x_dtype)
        assert_products(ours(problem, schedule, p, bias), problem, p, bias)


# (n, k, block, rank): of each block that a group of lanes holds several of, one, or a part of; ends within a group,
# within a tile of four outputs, and within a vector of ranks; more columns than scales or a tile hold. Every result has
# several elements: the error of a single one is luck.
FEW_ROWS_SHAPES = [
    (37, 576, 64, 17),
    (66, 160, 32, 8),
    (35, 1152, 128, 5),
    (9, 2048 + 512, 256, 7),
    (11, 6144, 2048, 12),
    (10, 16384, 16384, 9),
    (18, 192, 96, 16),
    (23, 34, 34, 6),
    (7, 64, 64, 1100),
    (0, 64, 64, 2),
]


@pytest.mark.parametrize("shape", FEW_ROWS_SHAPES, ids=str)
@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), FEW_ROWS, ids=str)
def test_values_of_few_rows(schedule, x_dtype, dtype, shape):
    """Kills: x in another order than the weights, a scale of the neighbouring block, weights that are not rounded."""
    n, k, block, rank = shape
    for m, bias in ((0, True), (1, False), (2, True), (3, True), (4, False), (13, True), (64, False)):
        problem = make_problem(m, n, k, block, rank, x_dtype, dtype, FP32 if bias else x_dtype)
        x, w, A, B = (problem[name] for name in ("x", "weight", "lora_A", "lora_B"))
        row = problem["bias"] if bias else None
        y, s = native.lora_linear_packed(x, *w.args, A, B, row, None, SCALING, 0.0, schedule)
        assert (y.dtype, s.dtype) == (x_dtype, x_dtype)
        for name, a, b, c in zip(
            "ys", (y, s), torch_code(problem, x_dtype, 0.0, bias), torch_code(problem, FP64, 0.0, bias)
        ):
            assert_as_accurate(a, b, c, f"{name} of {m} rows")
        weight = product_weight(w, x)
        plain = F.linear(x, weight, row), F.linear(x.double(), weight.double(), None if row is None else row.double())
        assert_as_accurate(native.linear_packed(x, *w.args, row, schedule), *plain, f"{m} rows without an adapter")


@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), FEW_ROWS, ids=str)
def test_every_weight_of_few_rows(schedule, x_dtype, dtype):
    """Each row of x picks a column of W: what is seen is a weight, to the bit where it was rounded to 16 bits."""
    for k, block in ((160, 32), (192, 64), (512, 512)):
        w, x = random_packed(7, k, block, nested=True).to(dtype=dtype), torch.eye(k, dtype=x_dtype)
        y = torch.cat([native.linear_packed(rows, *w.args, None, schedule) for rows in x.split(3)])
        assert torch.equal(y, product_weight(w, x).t())


# (n, k, block, rows of scales): a scale per row and for all, squares that do not divide n or k, blocks that end within
# a run of lanes; several parts of a row.
SCALED = [
    (37, 576, 576, 37),
    (40, 300, 300, 1),
    (70, 200, 32, 3),
    (66, 2048 + 161, 128, 66),
    (35, 150, 100, 1),
    (9, 4500, 4500, 9),
    (0, 64, 64, 0),
]
OTHER_LAYOUTS = {
    "codes4_low": [random_packed(37, 576, layout="codes4_low"), random_packed(23, 34, 34, True, layout="codes4_low")],
    **{
        layout: [random_scaled(n, k, layout, block, rows) for n, k, block, rows in SCALED]
        for layout in ("int8", "e4m3")
    },
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), FEW_ROWS, ids=str)
def test_values_of_few_rows_of_other_layouts(schedule, x_dtype, dtype, layout):
    """Kills: what is read behind a row's end, a scale that is applied to another block's sum."""
    for weight in OTHER_LAYOUTS[layout]:
        n, k = weight.shape
        for m, bias in ((1, False), (2, True), (3, True), (4, False), (13, True), (64, False)):
            problem = make_problem(m, n, k, weight.block, 9, x_dtype, dtype, FP32 if bias else x_dtype, weight)
            x, w, A, B = (problem[name] for name in ("x", "weight", "lora_A", "lora_B"))
            row = problem["bias"] if bias else None
            y, s = native.lora_linear_packed(x, *w.args, A, B, row, None, SCALING, 0.0, schedule)
            plain, exact = (torch_code(problem, accuracy, 0.0, bias) for accuracy in (x_dtype, FP64))
            for name, a, b, c in zip("ys", (y, s), plain, exact):
                assert_as_accurate(a, b, c, f"{name} of {m} rows by {tuple(weight.shape)}")


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), FEW_ROWS, ids=str)
def test_values_are_every_weight_of_other_layouts(schedule, x_dtype, dtype, layout):
    """As above, to the bit where weights were rounded."""
    for weight in OTHER_LAYOUTS[layout]:
        w = weight.to(dtype=dtype)
        x = torch.eye(w.shape[1], dtype=x_dtype)[:400]
        y = torch.cat([native.linear_packed(rows, *w.args, None, schedule) for rows in x.split(7)])
        assert torch.equal(y, product_weight(w, x).t()[:400])


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), PRODUCTS, ids=str)
def test_values_by_panels_of_other_layouts(schedule, x_dtype, dtype, layout):
    """Kills: rows of scales that are counted from a panel's first row."""
    skip_unless_possible(schedule, x_dtype)
    makers = {"codes4_low": lambda: random_packed(2200, 512, layout=layout)}
    large = makers.get(layout, lambda: random_scaled(2200, 550, layout, 128, 18))()
    for weight in (*OTHER_LAYOUTS[layout], large):
        problem = make_problem(33, *weight.shape, weight.block, 6, x_dtype, dtype, weight=weight)
        assert_products(ours(problem, schedule), problem)


def test_gradients_of_16_bits_stay_in_16_bits_where_the_cpu_multiplies_them():
    """Kills: the adapter's gradients by way of fp32."""
    for dtype in (BF16, FP16):
        verdict = cpu_packed.product_verdict(torch.ones(70, 24, dtype=dtype), "codes4", 24, 64, is_gradient=True)
        assert verdict.schedule == ("native" if cpu.has_native_matmul(dtype) else "upcast")
    assert cpu_packed.product_verdict(torch.ones(70, 24), "codes4", 24, 64, is_gradient=True).schedule != "native"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_values_of_native_gradients(dtype):
    """Kills: panels of a 16-bit gradient that are not summed, an unscaled one."""
    skip_unless_possible("native", dtype)
    for shape in SHAPES:
        problem = make_problem(*shape, dtype, dtype)
        assert_products(ours(problem, "aten", backward="native"), problem)


@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), PRODUCTS, ids=str)
def test_values_by_panels_without_an_adapter(schedule, x_dtype, dtype):
    skip_unless_possible(schedule, x_dtype)
    for shape in SHAPES:
        problem = make_problem(*shape, x_dtype, dtype)
        x, w, bias, grad_y = (problem[name] for name in ("x", "weight", "bias", "grad_y"))
        weight = product_weight(w, x)
        for row in (None, bias):
            wide = None if row is None else row.double()
            y = native.linear_packed(x, *w.args, row, schedule)
            assert_as_accurate(y, F.linear(x, weight, row), F.linear(x.double(), weight.double(), wide))
        grad_x = native.linear_packed_backward(grad_y, *w.args, schedule)
        assert_as_accurate(grad_x, grad_y @ weight, grad_y.double() @ weight.double(), "dX")


def strided_rows(m, k, dtype):
    wide = torch.randn(2 * m, 2 * k).to(dtype)
    return {
        "columns of a wider tensor": wide[:m, k:],
        "every second column": wide[:m, ::2],
        "every second row": wide[::2, :k],
        "columns outermost": torch.randn(k, m).to(dtype).t(),
        "expanded rows": wide[:1, :k].expand(m, k),
    }


@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), PRODUCTS, ids=str)
def test_values_of_strided_operands(schedule, x_dtype, dtype):
    skip_unless_possible(schedule, x_dtype)
    m, n, k, rank = 9, 70, 192, 6
    problem = make_problem(m, n, k, 64, rank, x_dtype, dtype)
    for (name, x), grad_y in zip(strided_rows(m, k, x_dtype).items(), strided_rows(m, n, x_dtype).values()):
        strided = {
            **problem, "x": x, "grad_y": grad_y, "lora_A": strided_rows(rank, k, x_dtype)[name],
            "lora_B": strided_rows(n, rank, x_dtype)[name], "bias": torch.randn(n, 2).to(x_dtype)[:, 1],
        }  # fmt: skip
        assert_products(ours(strided, schedule), strided)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0, 3)], ids=str)
def test_any_leading_shape(lead):
    w, x, grad_y = random_packed(24, 64), torch.randn(*lead, 64), torch.randn(*lead, 24)
    A, B = torch.randn(2, 64), torch.randn(24, 2)
    y, s = native.lora_linear_packed(x, *w.args, A, B, None, None, SCALING, 0.0, "aten")
    assert (y.shape, s.shape) == ((*lead, 24), (*lead, 2))
    torch.testing.assert_close(y, x @ decoded(w).t() + x @ A.t() @ B.t() * SCALING)
    grad_x, _, _ = native.lora_linear_packed_backward(
        grad_y, x, s, *w.args, A, B, None, SCALING, 0.0, True, False, False, "aten"
    )
    assert grad_x.shape == x.shape
    assert native.linear_packed(x, *w.args, None, "aten").shape == y.shape


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_that_are_not_needed(needs, p):
    problem = make_problem(70, 33, 128, 64, 4, FP32, FP32)
    everything, some = ours(problem, "aten", p)[2:], ours(problem, "aten", p, needs=needs)[2:]
    for whole, part, needed in zip(everything, some, needs):
        assert torch.equal(part, whole) if needed else part.numel() == 0


@pytest.mark.parametrize(("schedule", "x_dtype", "dtype"), PRODUCTS + FEW_ROWS, ids=str)
def test_threads_do_not_change_the_weights(schedule, x_dtype, dtype):
    """Kills: a thread's rows at another's place. Every row of x picks one column of W, so a product is exact."""
    skip_unless_possible(schedule, x_dtype)
    w = random_packed(1100, 1024, 64, nested=True).to(dtype=dtype)
    picked = torch.randperm(1024)[:5]
    x = torch.zeros(5, 1024, dtype=x_dtype)
    x[torch.arange(5), picked] = 1
    expected = product_weight(w, x)[:, picked].t()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            y, whole = native.linear_packed(x, *w.args, None, schedule), native.dequantize(*w.args, "")
        finally:
            torch.set_num_threads(1)
        assert torch.equal(whole, decoded(w))
        assert torch.equal(y, expected)


def test_a_thread_has_a_buffer_of_its_own():
    """Kills: one buffer for all threads."""
    problems = [make_problem(40, 300, 1024, 64, 4, FP32, FP32) for _ in range(4)]
    expected = [ours(problem, "aten") for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for results, alone in zip(pool.map(lambda problem: ours(problem, "aten"), problems), expected):
                assert all(torch.equal(a, b) for a, b in zip(results, alone))


# ---------------------------------------------------------------------------------------------------- misfits


def misfits(nested):
    """What is wrong, and the arguments that describe the weight."""
    parts, layout, n, k, block, dtype = random_packed(24, 128, 64, nested).args

    def other(index, part):
        return [*parts[:index], part, *parts[index + 1 :]], layout, n, k, block, dtype

    for index, part in enumerate(parts):
        if part.dim():
            yield f"part {index} is short", other(index, part[:-1])
        yield f"part {index} has another dtype", other(index, part.to(torch.int64))
        if part.numel() > 1:
            yield f"part {index} is not contiguous", other(index, torch.stack([part, part], dim=1)[:, 0])
    yield "no parts", ([], layout, n, k, block, dtype)
    yield "a part too many", ([*parts, parts[0]], layout, n, k, block, dtype)
    yield "the code missing", (parts[:2], layout, n, k, block, dtype)
    yield "another layout", (parts, "codes5", n, k, block, dtype)
    yield "more rows", (parts, layout, n + 1, k, block, dtype)
    yield "fewer columns", (parts, layout, n, k - 64, block, dtype)
    yield "negative sizes", (parts, layout, -n, -k, block, dtype)
    of_nothing = [part[:0] if index in (0, 1, 3) else part for index, part in enumerate(parts)]
    yield "sizes whose product is zero in 64 bits", (of_nothing, layout, 1 << 32, 1 << 32, block, dtype)
    yield "a block that does not divide", (parts, layout, n, k, 48, dtype)
    yield "no block", (parts, layout, n, k, 0, dtype)
    yield "an odd block", (parts, layout, n, k, 1, dtype)
    yield "float64 weights", (parts, layout, n, k, block, FP64)


def scaled_misfits(layout):
    parts, layout, n, k, block, dtype = random_scaled(24, 128, layout, 16, 2).args
    data, scales = parts
    yield "one part", ([data], layout, n, k, block, dtype)
    yield "three parts", ([*parts, scales], layout, n, k, block, dtype)
    yield "short data", ([data[:-1], scales], layout, n, k, block, dtype)
    yield "data of int8", ([data.view(torch.int8), scales], layout, n, k, block, dtype)
    yield "data that is not contiguous", ([data.t().contiguous().t(), scales], layout, n, k, block, dtype)
    yield "scales of another dtype", ([data, scales.double()], layout, n, k, block, dtype)
    yield "scales of one dimension", ([data, scales.view(-1)], layout, n, k, block, dtype)
    yield "scales of three dimensions", ([data, scales[None]], layout, n, k, block, dtype)
    yield "scales of another number of rows", ([data, torch.ones(3, 8)], layout, n, k, block, dtype)
    yield "scales of another number of columns", ([data, torch.ones(2, 9)], layout, n, k, block, dtype)
    yield "scales that are not contiguous", ([data, torch.ones(8, 2).t()], layout, n, k, block, dtype)
    yield "no block", (parts, layout, n, k, 0, dtype)
    yield "a negative block", (parts, layout, n, k, -16, dtype)
    yield "a block that no sum holds", ([data, torch.ones(1, 1)], layout, n, k, 2**63 - 1, dtype)
    yield "another block", (parts, layout, n, k, 32, dtype)
    yield "more rows", (parts, layout, n + 1, k, block, dtype)
    yield "negative sizes", (parts, layout, -n, -k, block, dtype)
    yield "float64 weights", (parts, layout, n, k, block, FP64)


REFUSALS = {"no parts": "packed weight|no tensor arguments"}


@pytest.mark.parametrize(
    ("found", "of"), [(misfits, False), (misfits, True), (scaled_misfits, "int8"), (scaled_misfits, "e4m3")]
)
def test_misfits_are_refused(found, of):
    """Kills each check: what does not fit is never read."""
    x, grad_y, s = torch.randn(7, 128), torch.randn(7, 24), torch.randn(7, 2)
    A, B = torch.randn(2, 128), torch.randn(24, 2)
    for wrong, args in found(of):
        calls = [
            lambda args=args: native.dequantize(*args, ""),
            lambda args=args: native.linear_packed(x, *args, None, "aten"),
            lambda args=args: native.linear_packed_backward(grad_y, *args, "aten"),
            lambda args=args: native.lora_linear_packed(x, *args, A, B, None, None, 1.0, 0.0, "aten"),
            lambda args=args: native.lora_linear_packed_backward(
                grad_y, x, s, *args, A, B, None, 1.0, 0.0, True, True, True, "aten"
            ),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match=REFUSALS.get(wrong, r"packed weight|(bias|lora_.|grad_y) must")):
                call()


def test_operands_beside_a_packed_weight_are_checked():
    w = random_packed(24, 128).args
    x, grad_y, s, bias = torch.randn(7, 128), torch.randn(7, 24), torch.randn(7, 2), torch.randn(24)
    A, B = torch.randn(2, 128), torch.randn(24, 2)

    def forward(x=x, A=A, B=B, bias=bias, seed=None):
        return native.lora_linear_packed(x, *w, A, B, bias, seed, 1.0, 0.0, "aten")

    def backward(grad_y=grad_y, x=x, s=s, A=A, B=B, seed=None):
        return native.lora_linear_packed_backward(grad_y, x, s, *w, A, B, seed, 1.0, 0.0, True, True, True, "aten")

    for function, wrong in (
        (forward, {"x": x[:, :64], "A": A[:, :64], "B": B[:-1], "bias": bias[:-1], "seed": torch.tensor([1, 2])}),
        (backward, {"x": x[:, :64], "A": A[:, :64], "B": B[:-1], "grad_y": grad_y[:, :-1], "s": s[:-1]}),
    ):
        for name, tensor in wrong.items():
            with pytest.raises(RuntimeError, match="must"):
                function(**{name: tensor})
    for call in (
        lambda: forward(x=x.double(), bias=None),
        lambda: native.linear_packed(x, *w, bias[:-1], "aten"),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()


@pytest.mark.parametrize("schedule", ["aten", "decode", "rows"])
def test_no_call_allocates_a_decoded_weight(schedule):
    """Kills: a panel from torch's allocator, which would be the size of W here; only results are allocated."""
    problem = make_problem(4, 512, 1024, 64, 4, FP32, FP32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ours(problem, schedule, backward="aten")
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocated) > 0
    assert max(allocated) < 512 * 1024 * 4 / 4
