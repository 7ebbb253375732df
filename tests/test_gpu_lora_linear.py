"""lora_linear on a GPU, by the CUDA and by the Triton kernels: values and gradients against float64."""

from __future__ import annotations

import itertools

import gpu
import misfits
import pytest
import torch
from covering import case_id, covering_pairs
from gpu import BACKENDS, BF16, DEVICE, FP16, FP32, SCALING, SEED, check, check_inference, problem
from numerics import assert_as_accurate
from torch import Tensor

import lora_kernels as lk
from lora_kernels import philox
from lora_kernels.ops.lora_linear import SPEC

pytestmark = gpu.needed

AXES = {
    "dtypes": [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)],
    "p": [0.0, 0.3],
    "bias": [True, False],
    "rank": [1, 4, 8, 12, 16, 17, 64, 128, 256],
    "shape": [
        (1, 4096, 4096), (16, 1024, 520), (64, 4096, 1024), (77, 75, 263), (100, 32001, 520), (1000, 1032, 777),
        (2100, 4096, 1024),
    ],
}  # fmt: skip
FEWER = AXES | {
    "rank": [4, 12, 16, 64, 256],
    "shape": [(1, 1024, 520), (77, 75, 263), (100, 32001, 520), (2100, 4096, 1024)],
}
"""For Triton, which compiles a kernel for nearly every case."""


def by_backend(ours, of_triton):
    """(backend, value) pairs of each."""
    return [(name, value) for name in BACKENDS for value in (of_triton if name == "triton" else ours)]


@pytest.mark.parametrize(
    ("backend", "case"), by_backend(covering_pairs(**AXES), covering_pairs(**FEWER)), ids=case_id, indirect=["backend"]
)
def test_values_and_gradients(backend, case):
    ours = check(problem(*case["shape"], case["rank"], *case["dtypes"], bias=case["bias"], p=case["p"]), backend)
    if case["dtypes"][1] == FP32 and backend != "reference":
        rounded = ours[2].to(case["dtypes"][0]).float()
        assert not torch.equal(ours[2], rounded), "a float32 gradient has float32's digits"


@gpu.only
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("rank", "dtypes"), [(4, (BF16, BF16)), (16, (BF16, FP32)), (64, (FP16, FP16))], ids=str)
@pytest.mark.parametrize("shape", [(8192, 4096, 4096), (4096, 14336, 4096), (4096, 4096, 14336)], ids=str)
def test_sizes_of_large_models(backend, shape, rank, dtypes, p):
    check(problem(*shape, rank, *dtypes, p=p), backend)


@pytest.mark.parametrize(("backend", "rank"), by_backend([4, 16, 64, 128], [16, 128]), indirect=["backend"])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 520), (1030, 4097)])
def test_one_to_sixteen_rows(backend, n, k, rank):
    q = problem(16, n, k, rank)
    for m in range(1, 17):
        check_inference(q._replace(x=q.x[:m]), backend)
    gpu.note_schedules(q._replace(x=q.x[:1], grad_y=q.grad_y[:1]))


@pytest.mark.parametrize(("backend", "rank"), by_backend([4, 16, 64, 128], [16, 128]), indirect=["backend"])
@pytest.mark.parametrize(("n", "k"), [(1024, 4096), (4096, 520), (1030, 777)])
def test_seventeen_to_128_rows(backend, n, k, rank):
    q = problem(128, n, k, rank)
    for m in (17, 31, 32, 33, 48, 64, 65, 100, 127, 128):
        check(q._replace(x=q.x[:m], grad_y=q.grad_y[:m]), backend)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (3, 50), (2, 3, 11)], ids=str)
def test_leading_sizes(backend, lead):
    q = problem(lead, 72, 40, 8)
    ours = check(q, backend)
    assert [t.shape for t in ours] == [(*lead, 72), q.x.shape, q.lora_A.shape, q.lora_B.shape]
    if 0 in lead:
        assert not ours[2].any()
        assert not ours[3].any()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(300, 264, 136, 24), (77, 75, 263, 8), (1100, 1024, 520, 64)])
def test_tf32(backend, m, n, k, rank, p, fp32_precision):
    fp32_precision("tf32")
    check(problem(m, n, k, rank, FP32, p=p), backend)


def test_fp32_adapters_are_rounded_as_casting_them_does(backend):
    q = problem(300, 264, 136, 24, BF16, FP32)
    rounded = q._replace(lora_A=q.lora_A.bfloat16(), lora_B=q.lora_B.bfloat16())
    assert torch.equal(gpu.inferred(q), gpu.inferred(rounded))


WANTED = [c for n in (1, 2) for c in itertools.combinations(range(3), n)]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_gradients_that_are_not_wanted_are_none(backend, wanted):
    q = problem(300, 264, 136, 24, p=0.3)
    _, *everything = gpu.unless_triton_is_old(lambda: gpu.fused(q))
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate((q.x, q.lora_A, q.lora_B))]
    y = lk.lora_linear(*q[:5], scaling=SCALING, dropout_p=q.p, training=True, seed=SEED)
    y.backward(q.grad_y)
    for i, leaf in enumerate(leaves):
        if i not in wanted:
            assert leaf.grad is None
        else:  # dB may be summed in another order where there is no dX to compute beside it
            largest = everything[i].abs().max()
            assert (leaf.grad - everything[i]).abs().max() <= 2 * torch.finfo(BF16).eps * largest


# ---------------------------------------------------------------------------------------------------- layouts


def wider(columns: int):
    """The operand as part of a matrix of NaN that is wider by twice so many columns."""
    return lambda t: torch.nn.functional.pad(t, (columns, columns), value=float("nan"))[:, columns:-columns]


LAYOUTS = {
    "rows of a wider matrix": wider(8),
    "rows of a wider matrix, off 16 bytes": wider(3),
    "off 16 bytes": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "columns outermost": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}
OPERANDS = ("grad_y", "x", "s", "weight", "lora_A", "lora_B")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, p):
    """Of each operand alone (of one in Triton, which compiles for each) and of all.

    Forward by ``lk.lora_linear``, backward by its op, which takes s, too.
    """
    takes_torchs = backend == "reference" or (backend == "cpu" and p == 0.0)
    if takes_torchs and layout.startswith("rows of a wider matrix") and gpu.torch_reads_beside_rows():
        pytest.skip("torch's own product of bfloat16 reads beside strided rows on this CPU, and takes NaN from there")
    q = problem(300, 264, 136, 24, p=p)
    s = SPEC.reference(*q[:5], q.seed, SCALING, p)[1]
    alone = ("grad_y",) if backend == "triton" else OPERANDS
    for names in (*({name} for name in alone), set(OPERANDS)):
        given = {"s": s, **q._asdict()}
        given |= {name: LAYOUTS[layout](given[name]) for name in names}
        check_inference(gpu.Problem(*(given[name] for name in q._fields)), backend)
        gpu.check_backward(*(given[name] for name in OPERANDS), p)


@pytest.mark.parametrize("grad_y", ["of a sum", "of a row that is repeated", "of every second element"])
def test_gradients_as_autograd_hands_them_on(backend, grad_y):
    q = problem(300, 264, 136, 24)
    layouts = {
        "of a sum": torch.ones((), dtype=BF16, device=DEVICE).expand(300, 264),
        "of a row that is repeated": q.grad_y[:1].expand(300, 264),
        "of every second element": q.grad_y.float().view(BF16)[:, 1::2],
    }
    check(q._replace(grad_y=layouts[grad_y]), backend)


@gpu.only
def test_a_transposed_weight_is_read_as_it_lies(backend):
    """transformers' Conv1D keeps [in, out]: no call may copy it."""
    q = problem(40, 4096, 4096, 16)
    q = q._replace(weight=q.weight.t().contiguous().t())
    check(q, backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gpu.fused(q)
    assert torch.cuda.max_memory_allocated() - before < q.weight.nbytes / 2


# ------------------------------------------------------------------------------------------------------- sizes

NEEDED_GIB = 28


def in_blocks(function, *tensors: Tensor) -> Tensor:
    """The sum of ``function`` over blocks of rows of the tensors, in float64."""
    return sum(function(*(t.double() for t in block)) for block in zip(*(t.split(1024) for t in tensors)))


@gpu.only
@pytest.mark.parametrize(("n", "k", "p"), [(151_936, 64, 0.3), (64, 151_936, 0.0)])
def test_more_elements_than_32_bits_count(backend, n, k, p):
    """y or dX has more than 2**31 elements: a language model's head over many tokens. Rows of them are compared."""
    with gpu.much_memory(NEEDED_GIB):
        check_rows(backend, 16_400, n, k, p)


def check_rows(backend, m, n, k, p, rank=8):
    """Some rows of y and dX, and all of dA and dB, without a float64 copy of anything large."""
    x, grad_y = (torch.randn(m, columns, device=DEVICE, dtype=BF16) for columns in (k, n))
    weight, lora_A = (torch.randn(rows, k, device=DEVICE, dtype=BF16) / k**0.5 for rows in (n, rank))
    lora_B = torch.randn(n, rank, device=DEVICE, dtype=BF16) / rank**0.5
    q = gpu.Problem(x, weight, lora_A, lora_B, None, grad_y, p)
    lk.reset_stats()
    y, grad_x, grad_A, grad_B = gpu.unless_triton_is_old(lambda: gpu.fused(q))
    assert set(lk.stats()["served"]) == {("lora_linear", backend), ("lora_linear_backward", backend)}
    gpu.note_schedules(q)
    assert not y.isnan().any()
    assert not grad_x.isnan().any()

    rows = torch.cat([torch.arange(32), torch.randint(m, (64,)), torch.arange(m - 32, m)]).to(DEVICE)
    keep = philox.keep_mask(q.seed, m, k, p) if p else torch.ones((), dtype=torch.bool, device=DEVICE)
    factor = keep * philox.keep_scale(p)  # of x and of the branch's part of dX

    def at_rows(dtype: torch.dtype) -> list[Tensor]:
        x_rows, grad_rows, w, a, b = (t.to(dtype) for t in (x[rows], grad_y[rows], weight, lora_A, lora_B))
        dropped = factor[rows] if p else factor
        s, grad_s = (x_rows * dropped).to(dtype) @ a.t(), grad_rows @ b * SCALING
        return [x_rows @ w.t() + s @ b.t() * SCALING, grad_rows @ w + (grad_s @ a * dropped).to(dtype)]

    for name, value, bound, true in zip(("y", "dX"), (y[rows], grad_x[rows]), at_rows(BF16), at_rows(torch.float64)):
        assert_as_accurate(value, bound, true, name)
    del y, grad_x
    dropped = (x * factor).to(BF16) if p else x
    a, b = lora_A.double(), lora_B.double()
    exact_A = in_blocks(lambda g, d: (g @ b * SCALING).t() @ d, grad_y, dropped)
    exact_B = in_blocks(lambda g, d: g.t() @ (d @ a.t()) * SCALING, grad_y, dropped)
    assert_as_accurate(grad_A, (grad_y @ lora_B * SCALING).t() @ dropped, exact_A, "dA")
    assert_as_accurate(grad_B, grad_y.t() @ (dropped @ lora_A.t()) * SCALING, exact_B, "dB")


# ---------------------------------------------------------------------------------------------------- refusals


def on_device(args):
    return [t.to(DEVICE) if isinstance(t, Tensor) else t for t in args]


@gpu.only
def test_rank_0_is_refused(backend):
    q = problem(70, 24, 40, 8)
    nothing = q.lora_A[:0], q.lora_B[:, :0]
    with pytest.raises(ValueError, match="rank"):
        lk.lora_linear(q.x, q.weight, *nothing)
    says = r"lora_A must be .* rank of at least 1"
    with pytest.raises(RuntimeError, match=says):
        torch.ops.lora_kernels.lora_linear(q.x, q.weight, *nothing, None, None, 1.0, 0.0)
    args = (q.grad_y, q.x, q.x[:, :0], q.weight, *nothing, None, 1.0, 0.0, True, True, True)
    with pytest.raises(RuntimeError, match=says):
        torch.ops.lora_kernels.lora_linear_backward(*args)
    torch.cuda.synchronize()


@gpu.only
@pytest.mark.parametrize("name", misfits.FORWARD)
def test_operands_that_do_not_fit_are_refused_by_the_op(backend, name):
    args = on_device(misfits.lora_linear(name, 70, BF16, drops=name == "seed"))
    with pytest.raises(RuntimeError, match=misfits.message(name)):
        torch.ops.lora_kernels.lora_linear(*args)
    torch.cuda.synchronize()


@gpu.only
@pytest.mark.parametrize("name", misfits.BACKWARD)
def test_operands_that_do_not_fit_are_refused_by_the_backward(backend, name):
    args = on_device(misfits.lora_linear_backward(name, 70, BF16))
    with pytest.raises(RuntimeError, match=misfits.message(name)):
        torch.ops.lora_kernels.lora_linear_backward(*args)
    torch.cuda.synchronize()


@gpu.only
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "bias"])
def test_operands_on_another_device_are_refused(backend, name):
    q = problem(70, 24, 40, 8)
    q = q._replace(**{name: getattr(q, name).cpu()})
    with pytest.raises(ValueError, match=name):
        lk.lora_linear(*q[:5])
    with pytest.raises(RuntimeError, match=f"{name} must be on x's device"):
        torch.ops.lora_kernels.lora_linear(*q[:5], None, 1.0, 0.0)
    torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("columns", [1, 40, 263])
def test_dropout_mask_equals_the_definition(backend, columns):
    seed = torch.tensor([SEED])
    ours = gpu.unless_triton_is_old(lambda: lk.dropout_mask(1000, columns, 0.3, seed.to(DEVICE)))
    assert lk.stats()["served"] == {("dropout_mask", backend): 1}
    assert torch.equal(ours.cpu(), philox.keep_mask(seed, 1000, columns, 0.3))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_keep_as_many_as_they_should_and_know_nothing_of_each_other(backend, p):
    """Means of all, of rows, of columns, and of what two seeds, two neighbours or two rows keep alike: 6 sigma."""
    rows = columns = 1024
    q = 1 - philox.keep_threshold(p) / 65536
    seeds = torch.tensor([[1], [2]], device=DEVICE)
    one, two = gpu.unless_triton_is_old(lambda: [lk.dropout_mask(rows, columns, p, seed).double() for seed in seeds])

    def near(found: Tensor, expected: float, count: int) -> bool:
        return bool(((found - expected).abs() <= 6 * (expected * (1 - expected) / count) ** 0.5).all())

    assert near(one.mean(), q, rows * columns)
    assert near(one.mean(0), q, rows)
    assert near(one.mean(1), q, columns)
    for pair in (one * two, one[:, 1:] * one[:, :-1], one[1:] * one[:-1]):
        assert near(pair.mean(), q * q, pair.numel())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend):
    q = problem(300, 264, 136, 24)
    elsewhere = gpu.Problem(*(t.to("cuda:1") for t in q[:6]))
    assert gpu.same([t.cpu() for t in gpu.fused(elsewhere)], [t.cpu() for t in gpu.fused(q)])
