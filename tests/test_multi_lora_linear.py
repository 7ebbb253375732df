"""multi_lora_linear: values and gradients against a loop in float64, whose bits may depend on what, its arguments."""

import pytest
import torch
from many_adapters import BATCHES, SCALINGS, SEED, Batch, looped, make_problem, scattered, small
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.functional.multi import multi_lora_linear_apart
from lora_kernels.spec import Verdict
from lora_kernels.support import cpu

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]
BACKENDS = ["reference", None]  # None: what dispatch chooses
ON_CPU = pytest.mark.skipif(_native.cpu is None, reason="lora_kernels._C is not built")


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


def run(batch, problem, dtype, adapter_dtype, function):
    """[y, dx, dA, dB] of ``function`` in these dtypes."""
    cast = {k: None if v is None else v.to(adapter_dtype if "lora" in k else dtype) for k, v in problem.items()}
    grad_y = cast.pop("grad_y")
    leaves = [cast[k].requires_grad_() for k in ("x", "lora_A", "lora_B")]
    y = function(**cast)
    grads = torch.autograd.grad(y, leaves, grad_y, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


def check_values(batch, dtypes, p, bias):
    problem = make_problem(batch, *dtypes, bias)
    factors = torch.tensor(SCALINGS[: len(batch.ranks)])

    def torch_code(**tensors):
        return looped(**tensors, batch=batch, p=p)

    def ours(bias, **tensors):
        rest = {"scaling": factors, "ranks": torch.tensor(batch.ranks), "dropout_p": p, "training": True, "seed": SEED}
        return lk.multi_lora_linear(**tensors, adapter_ids=batch.ids_tensor(), bias=bias, **rest)

    results = zip(
        ("y", "dx", "dA", "dB"),
        run(batch, problem, *dtypes, ours),
        run(batch, problem, dtypes[0], dtypes[0], torch_code),
        run(batch, problem, FP64, FP64, torch_code),
    )
    for name, a, b, c in results:
        assert a.dtype == (dtypes[1] if name in ("dA", "dB") else dtypes[0])
        assert_as_accurate(a, b, c, f"{name} at p={p}, bias={bias}")


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values_and_gradients(batch, dtypes, backend):
    """Kills: rows of one adapter computed with another's factors; ranks that the adapter does not use (they hold NaN);
    gradients of adapters without rows left as they were; the mask of the row's place
    among its adapter's rows instead of its own.
    """
    for p, bias in ((0.0, True), (0.3, False)):
        check_values(batch, dtypes, p, bias)


@ON_CPU
@pytest.mark.parametrize("schedule", ["aten", "onednn", "upcast"])
@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_every_schedule_of_the_base(batch, schedule, monkeypatch):
    if schedule == "onednn" and not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(cpu, "matmul_verdict", lambda *_, **__: Verdict(schedule, "asked for"))
    monkeypatch.setattr(cpu, "FEW_ROWS", 0)
    dtypes = (BF16, FP32) if schedule == "upcast" else (FP32, FP32)
    for p, bias in ((0.0, True), (0.3, False)):
        check_values(batch, dtypes, p, bias)


def grads_of(t, grad_y=None, **how):
    y = lk.multi_lora_linear(**t, **how)
    grad_y = torch.ones_like(y) if grad_y is None else grad_y
    return [y, *torch.autograd.grad(y, [t["x"], t["lora_A"], t["lora_B"]], grad_y)]


# Of a size where vendors' products and our tiles have borders within.
SIZES = [(5, 24, 40), (23, 70, 90), (140, 64, 96)]


@ON_CPU
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_row_has_the_same_bits_whatever_others_have(m, k, n, dtype, p):
    """Kills: another kernel for adapters with few rows; a product over all rows that some adapter takes part in."""
    how = {"dropout_p": p, "training": True, "seed": 5, "scaling": 0.7}
    grad_y = torch.randn(m, n).to(dtype)

    def results(ids):
        y, dx, *_ = grads_of({**t, "adapter_ids": torch.tensor(ids)}, grad_y, **how)
        return y, dx

    t = small(Batch(scattered(m, 4), (5, 5, 5, 5), k, n), dtype)
    ids = list(scattered(m, 4))
    y, dx = results(ids)
    base, dbase = results([-1] * m)
    frozen = lk.frozen_linear(t["x"].detach(), t["weight"], t["bias"])
    none = torch.tensor(ids) < 0
    assert none.any()
    assert torch.equal(y[none], base[none])
    assert torch.equal(dx[none], dbase[none])
    assert torch.equal(base, frozen)
    for slot in range(4):
        mine = torch.tensor(ids) == slot
        for others in (-1, (slot + 1) % 4, slot):
            y2, dx2 = results([i if i == slot else others for i in ids])
            assert torch.equal(y[mine], y2[mine])
            assert torch.equal(dx[mine], dx2[mine])


def test_an_adapter_that_holds_nan_spoils_its_own_rows(backend):
    batch = BATCHES[1]
    t = small(batch)
    grad_y = torch.randn(len(batch.ids), batch.n)
    clean = grads_of(t, grad_y)
    with torch.no_grad():
        t["lora_A"][2], t["lora_B"][2] = torch.nan, torch.nan
    y, dx, dA, dB = grads_of(t, grad_y)
    mine = t["adapter_ids"] == 2
    for a, b in zip((y, dx), clean):
        assert a[mine].isnan().all()
        assert torch.equal(a[~mine], b[~mine])
    for a, b in zip((dA, dB), clean[2:]):
        assert torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]])


def test_a_row_that_holds_nan_spoils_its_own_adapter(backend):
    """Its result and its adapter's gradients: no row is multiplied with another's adapter, not even by zero."""
    batch = BATCHES[1]
    t = small(batch)
    clean = grads_of(t)
    with torch.no_grad():
        t["x"][6] = torch.nan  # of none
        t["x"][3] = torch.nan  # of adapter 3
    y, _, dA, dB = grads_of(t)
    rows = [0, 1, 2, 4, 5, 7]
    assert torch.equal(y[rows], clean[0][rows])
    for a, b in zip((dA, dB), clean[2:]):
        assert torch.equal(a[[0, 1, 2, 4]], b[[0, 1, 2, 4]])


def test_gradients_per_adapter_and_zeros_without_rows(backend):
    batch = Batch((3, 0, -1, 3, 0), (4, 4, 4, 4), 24, 16)
    t = small(batch)
    _, _, dA, dB = grads_of(t)
    for grad in (dA, dB):
        assert [bool(of_slot.any()) for of_slot in grad] == [True, False, False, True]
        assert grad.isfinite().all()
    for slot in (0, 3):
        rows = t["adapter_ids"] == slot
        x, A, B = (v.detach().requires_grad_() for v in (t["x"][rows], t["lora_A"][slot], t["lora_B"][slot]))
        alone = lk.lora_linear(x, t["weight"], A, B, t["bias"])
        for a, b in zip((dA[slot], dB[slot]), torch.autograd.grad(alone.sum(), (A, B))):
            torch.testing.assert_close(a, b)


@ON_CPU
def test_bits_do_not_depend_on_threads():
    """Of all but the base product, which is the vendor's: it is zero here."""
    batch = BATCHES[2]
    t = small(batch, bias=False)
    t["weight"].zero_()
    grad_y = torch.randn(len(batch.ids), batch.n)
    try:
        one = grads_of(t, grad_y, dropout_p=0.2, training=True, seed=3)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(one, grads_of(t, grad_y, dropout_p=0.2, training=True, seed=3)):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_per_row_or_per_sample(dtype, backend):
    batch = Batch((1, 1, 1, -1, -1, -1, 0, 0, 0, 1, 1, 1), (4, 3), 24, 16)
    t = small(batch)
    y, *grads = grads_of(t)
    x = t["x"].detach().view(2, 2, 3, 24).requires_grad_()
    for ids in (torch.tensor(batch.ids, dtype=dtype).view(2, 2, 3),):
        y2, dx2, *others = grads_of({**t, "x": x, "adapter_ids": ids})
        assert torch.equal(y2.view(y.shape), y)
        assert torch.equal(dx2.reshape(grads[0].shape), grads[0])
        assert all(torch.equal(a, b) for a, b in zip(others, grads[1:]))
    x = t["x"].detach().view(4, 3, 24).requires_grad_()
    y3, *_ = grads_of({**t, "x": x, "adapter_ids": torch.tensor([1, -1, 0, 1], dtype=dtype)})
    assert torch.equal(y3.view(y.shape), y)


def test_operands_lie_anyhow(backend):
    """Pools that are views, ids and ranks with gaps between them, rows of x apart."""
    batch = BATCHES[0]
    t = small(batch)
    ranks = torch.tensor(batch.ranks)
    y, *grads = grads_of(t, ranks=ranks)
    strided = {
        "x": torch.randn(len(batch.ids), batch.k + 8)[:, 3 : batch.k + 3].copy_(t["x"].detach()),
        "lora_A": t["lora_A"].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "lora_B": t["lora_B"].detach().permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }
    gaps = torch.stack([batch.ids_tensor()] * 2, 1)[:, 0]
    leaves = {**t, **{k: v.requires_grad_() for k, v in strided.items()}, "adapter_ids": gaps}
    y2, *grads2 = grads_of(leaves, ranks=torch.stack([ranks] * 2, 1)[:, 1])
    for a, b in zip((y, *grads), (y2, *grads2)):
        torch.testing.assert_close(a, b)


def test_s_is_zero_where_no_adapter_writes(backend):
    """Of rows of none, of adapters of no rank, and beyond an adapter's rank. Kills: these left as they were."""
    batch = BATCHES[0]
    t = {k: v.detach() for k, v in small(batch).items()}
    tensors = (t[n] for n in ("x", "weight", "lora_A", "lora_B", "adapter_ids"))
    for _ in range(3):
        torch.full((len(batch.ids), batch.rank), torch.nan)  # freed, and likely to be s
    _, s = torch.ops.lora_kernels.multi_lora_linear(*tensors, torch.tensor(batch.ranks), *(None,) * 3, 1.0, 0.0)
    for row, slot in enumerate(batch.ids):
        rank = 0 if slot < 0 else batch.ranks[slot]
        torch.testing.assert_close(s[row, :rank], t["lora_A"][slot, :rank] @ t["x"][row])
        assert not s[row, rank:].any()


def test_scaling(backend):
    t = small()
    factors = torch.tensor(SCALINGS[:4], requires_grad=True)
    y, *_ = grads_of(t, scaling=factors.detach())
    y2 = lk.multi_lora_linear(**t, scaling=factors)
    torch.testing.assert_close(y2, y)
    (grad,) = torch.autograd.grad(y2.sum(), factors)
    for slot in (0, 3):
        rows = t["adapter_ids"] == slot
        update = t["x"][rows] @ t["lora_A"][slot].t() @ t["lora_B"][slot].t()
        torch.testing.assert_close(grad[slot], update.sum(), rtol=1e-4, atol=1e-4)
    for one in (torch.tensor(0.3), torch.tensor([0.3])):
        torch.testing.assert_close(lk.multi_lora_linear(**t, scaling=one), lk.multi_lora_linear(**t, scaling=0.3))


def test_a_base_that_trains(backend):
    t = small(dtype=FP64)
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    leaves = [t[name].requires_grad_() for name in names]
    batch = BATCHES[0]._replace(ranks=(7,) * 4)
    y, want = lk.multi_lora_linear(**t, scaling=torch.tensor(SCALINGS[:4], dtype=FP64)), looped(*leaves, batch)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(a, b)


def test_checkpointing_and_autocast_and_compile():
    t = small(bias=False)
    y, *grads = grads_of(t)
    for reentrant in (False, True):
        y2 = checkpoint(lk.multi_lora_linear, *(t[n] for n in t if n != "bias"), use_reentrant=reentrant)
        y2.sum().backward()
        for name, grad in zip(("x", "lora_A", "lora_B"), grads):
            assert torch.equal(t[name].grad, grad)
            t[name].grad = None
    compiled = torch.compile(lk.multi_lora_linear, backend="aot_eager", fullgraph=True)
    y3 = compiled(**t, ranks=torch.tensor([7, 7, 7, 7]))
    torch.testing.assert_close(y3, y)
    for a, b in zip(grads, torch.autograd.grad(y3.sum(), [t["x"], t["lora_A"], t["lora_B"]])):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", BF16):
        y4 = lk.multi_lora_linear(**t)
    assert y4.dtype == BF16
    torch.testing.assert_close(y4.float(), y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtypes", [*DTYPES, (FP64, FP64)], ids=str)
def test_adapters_that_lie_apart_are_not_stacked(dtypes, backend):
    """The same numbers as of pools; without gradients alone. Kills: an adapter's factor or rank taken of another."""
    batch = BATCHES[0]
    ranks, factors = (4, 1, 3, 7), list(SCALINGS[:4])
    t = {k: v.to(dtypes[1] if "lora" in k else dtypes[0]) for k, v in small(batch).items() if k != "adapter_ids"}
    A = [t["lora_A"][i, :r].detach() for i, r in enumerate(ranks)]
    B = [t["lora_B"][i, :, :r].detach().t().contiguous().t() for i, r in enumerate(ranks)]
    ids = batch.ids_tensor()
    apart = multi_lora_linear_apart(t["x"].detach(), t["weight"], A, B, factors, ids, t["bias"])
    with torch.no_grad():
        rest = {"adapter_ids": ids, "scaling": torch.tensor(factors), "ranks": torch.tensor(ranks)}
        pooled = lk.multi_lora_linear(**t, **rest)
    torch.testing.assert_close(apart, pooled)
    if lk.why("multi_lora_linear", **t, **rest).backend == "cpu":
        assert torch.equal(apart, pooled)
    assert multi_lora_linear_apart(t["x"], t["weight"], [t["lora_A"][0]], [t["lora_B"][0]], [1.0], ids, None) is None
    assert multi_lora_linear_apart(t["x"].detach(), t["weight"], A, B, [ids.sum()] * 4, ids, None) is None


def test_on_meta_there_are_shapes():
    t = small(Batch((1, 0, -1, 1), (2, 3), 8, 6))
    on_meta = grads_of({name: value.to("meta") for name, value in t.items()})
    assert [g.shape for g in on_meta] == [g.shape for g in grads_of(t)]


@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(dropout):
    t = small(Batch((1, 0, -1, 1), (2, 3), 8, 6))
    seed = torch.tensor([5]) if dropout else None
    tensors = (t[n] for n in ("x", "weight", "lora_A", "lora_B", "adapter_ids"))
    args = *tensors, torch.tensor([2, 3]), torch.tensor([0.5, 2.0]), t["bias"], seed, 0.5, 0.25 if dropout else 0.0
    torch.library.opcheck(torch.ops.lora_kernels.multi_lora_linear.default, args)


def test_why_stats_and_costs():
    t = small()
    choice = lk.why("multi_lora_linear", **t)
    assert choice.backend in lk.BACKENDS
    lk.reset_stats()
    lk.multi_lora_linear(**t).sum().backward()
    served = {("multi_lora_linear", choice.backend): 1, ("multi_lora_linear_backward", choice.backend): 1}
    assert lk.stats()["served"] == served
    double = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in t.items()}
    assert lk.why("multi_lora_linear", **double).backend == "reference"
    m, k, n, r = 23, 40, 24, 7
    args = *(t[n] for n in ("x", "weight", "lora_A", "lora_B", "adapter_ids")), None, None, t["bias"], None, 1.0, 0.0
    assert lk.dispatch.specs()["multi_lora_linear"].flops(*args) == 2 * m * n * k + 2 * m * r * (n + k)
