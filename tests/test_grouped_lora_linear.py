"""grouped_lora_linear: values and gradients against a loop in float64, and the contract of its arguments."""

import grouped
import pytest
import torch
from grouped import SCALING, SEED, SIZES, Sizes, looped, make_problem, offsets_of, run
from numerics import assert_as_accurate
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]
BACKENDS = ["reference", None]  # None: what dispatch chooses


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values_and_gradients(sizes, dtypes, backend):
    for p, shared, bias in ((0.0, False, None), (0.3, False, "each"), (0.1, True, "one"), (0.0, True, None)):
        problem = make_problem(sizes, *dtypes, shared=shared, bias=bias)

        def torch_code(p=p, **tensors):
            return looped(**tensors, sizes=sizes, p=p)

        def ours(bias, p=p, **tensors):
            offsets = offsets_of(sizes)
            rest = {"scaling": SCALING, "dropout_p": p, "training": True, "seed": SEED}
            return lk.grouped_lora_linear(**tensors, offsets=offsets, bias=bias, **rest)

        results = zip(
            ("y", "dx", "dA", "dB"),
            run(problem, *dtypes, ours),
            run(problem, dtypes[0], dtypes[0], torch_code),
            run(problem, FP64, FP64, torch_code),
        )
        for name, a, b, c in results:
            assert a.dtype == (dtypes[1] if name in ("dA", "dB") else dtypes[0])
            assert_as_accurate(a, b, c, f"{name} at p={p}, shared={shared}, bias={bias}")


def small(sizes=SIZES[1], dtype=FP32, **kinds):
    """Arguments of the op, leaves that require grad."""
    problem = make_problem(sizes, dtype, dtype, **kinds)
    t = {name: None if v is None else v.to(dtype) for name, v in problem.items() if name != "grad_y"}
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    return {**t, "offsets": offsets_of(sizes)}


def grads_of(t, **how):
    y = lk.grouped_lora_linear(**t, **how)
    return [y, *torch.autograd.grad(y.square().sum(), [t["x"], t["lora_A"], t["lora_B"]])]


def test_rows_of_nobody_are_zero_whatever_they_hold(backend):
    sizes = Sizes((4, 0, 3), 20, 12, 2, behind=6)
    t = small(sizes, bias="each")
    with torch.no_grad():
        t["x"][7:] = torch.nan
    y, dx, dA, dB = grads_of(t)
    assert not torch.cat([y[7:], dx[7:]], dim=1).any()
    for grad in (dA, dB):
        assert grad.isfinite().all()
        assert [bool(of_group.any()) for of_group in grad] == [True, False, True]
    assert y.isfinite().all()


def test_a_group_that_holds_nan_spoils_its_own_rows(backend):
    t = small(Sizes((4, 5, 3), 20, 12, 2))
    with torch.no_grad():
        t["lora_A"][1], t["weight"][1] = torch.nan, torch.nan
    y, dx, dA, dB = grads_of(t)
    for result in (y, dx):
        assert [bool(rows.isnan().any()) for rows in result] == [False] * 4 + [True] * 5 + [False] * 3
    for grad in (dA, dB):
        assert grad[[0, 2]].isfinite().all()


def test_weights_are_read_where_they_lie(backend):
    """[G, K, N], as gpt-oss stores experts, and PEFT's [N, rank * G] with the expert fastest."""
    t = small()
    stored = t["weight"].transpose(1, 2).contiguous()
    n, r, groups = t["weight"].shape[1], t["lora_A"].shape[1], len(t["lora_A"])
    wide = t["lora_B"].detach().permute(1, 2, 0).reshape(n, r * groups).requires_grad_()
    views = {**t, "weight": stored.transpose(1, 2), "lora_B": wide.view(n, r, groups).permute(2, 0, 1)}
    y, dx, dA, dB = grads_of(t)
    y2 = lk.grouped_lora_linear(**views)
    dx2, dA2, dWide = torch.autograd.grad(y2.square().sum(), [t["x"], t["lora_A"], wide])
    for a, b in ((y, y2), (dx, dx2), (dA, dA2), (dB, dWide.view(n, r, groups).permute(2, 0, 1))):
        torch.testing.assert_close(a, b)


def test_a_scaling_per_group(backend):
    sizes = SIZES[0]
    t = small(sizes)
    factors = torch.tensor([0.5, 2.0, -1.0])
    names = ("x", "weight", "lora_A", "lora_B", "bias")

    def plain(dtype):
        leaves = [None if t[k] is None else t[k].detach().to(dtype).requires_grad_() for k in names]
        y = looped(*leaves, sizes=sizes, scaling=factors.tolist())
        return [y, *torch.autograd.grad(y.square().sum(), [leaves[0], *leaves[2:4]])]

    for ours, unfused, exact in zip(grads_of(t, scaling=factors), plain(FP32), plain(FP64)):
        assert_as_accurate(ours, unfused, exact)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", ["one", "each"])
def test_a_base_that_trains(shared, bias, backend):
    sizes = Sizes((4, 0, 3), 20, 12, 2, behind=2)
    t = small(sizes, FP64, shared=shared, bias=bias)
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    leaves = [t[name].requires_grad_() for name in names]
    y = lk.grouped_lora_linear(**t, scaling=SCALING)
    want = looped(*leaves, sizes=sizes)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(a, b)


def test_gradients_are_the_same_bits_on_every_run(backend):
    t = small(Sizes((50, 3, 200), 64, 96, 16))
    first, *others = (grads_of(t, dropout_p=0.1, training=True, seed=7) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


def test_checkpointing_and_autocast_and_compile():
    t = small(Sizes((6, 0, 9), 24, 32, 4))
    y, *grads = grads_of(t)
    names = [name for name in t if name != "bias"]
    for reentrant in (False, True):
        y2 = checkpoint(lk.grouped_lora_linear, *(t[name] for name in names), use_reentrant=reentrant)
        y2.square().sum().backward()
        for name, grad in zip(("x", "lora_A", "lora_B"), grads):
            assert torch.equal(t[name].grad, grad)
            t[name].grad = None
    compiled = torch.compile(lk.grouped_lora_linear, backend="aot_eager", fullgraph=True)
    y3 = compiled(**t)
    torch.testing.assert_close(y3, y)
    for a, b in zip(grads, torch.autograd.grad(y3.square().sum(), [t["x"], t["lora_A"], t["lora_B"]])):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        y4 = lk.grouped_lora_linear(**t)
    assert y4.dtype == BF16
    torch.testing.assert_close(y4.float(), y, rtol=0.05, atol=0.05)


def test_shapes_alone():
    """On meta, and under modes that trace: no offset is read."""
    t = small(Sizes((6, 0, 9), 24, 32, 4), bias="each")
    on_meta = {name: value.to("meta") for name, value in t.items()}
    y, *grads = grads_of(on_meta)
    assert [g.shape for g in (y, *grads)] == [g.shape for g in grads_of(t)]
    with FakeTensorMode() as mode:
        y = lk.grouped_lora_linear(**{name: mode.from_tensor(value) for name, value in t.items()})
    assert y.shape == (15, 32)
    traced = make_fx(lambda t: lk.grouped_lora_linear(**t), tracing_mode="fake")(t)
    assert "grouped_lora_linear" in traced.code


@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(dropout):
    t = small(Sizes((3, 0, 4), 8, 6, 2, behind=1), bias="each")
    seed = torch.tensor([5]) if dropout else None
    args = *(t[n] for n in ("x", "weight", "lora_A", "lora_B", "offsets", "bias")), seed, 0.5, 0.25 if dropout else 0.0
    torch.library.opcheck(torch.ops.lora_kernels.grouped_lora_linear.default, args)


def test_bad_arguments():
    def refused(error, message, **changed):
        t = {k: v.detach() if v is not None else None for k, v in small(SIZES[0]).items()}
        with pytest.raises(error, match=message):
            lk.grouped_lora_linear(**{**t, **changed})

    x = torch.randn(24, 40)
    refused(TypeError, "offsets must be int32", offsets=torch.tensor([5, 12, 24]))
    refused(ValueError, "offsets must not decrease", offsets=torch.tensor([5, 4, 24], dtype=torch.int32))
    refused(ValueError, "offsets must not decrease", offsets=torch.tensor([-1, 4, 24], dtype=torch.int32))
    refused(ValueError, "nor exceed x's 24 rows", offsets=torch.tensor([5, 12, 25], dtype=torch.int32))
    refused(ValueError, r"offsets must be \[groups\]", offsets=torch.tensor(5, dtype=torch.int32))
    refused(TypeError, "offsets must be a tensor", offsets=[5, 12, 24])
    refused(ValueError, r"x must be \[rows, in_features\]", x=torch.randn(2, 12, 40))
    refused(ValueError, r"x must be \[rows, 40\]", x=torch.randn(24, 41))
    refused(TypeError, "weight must be torch.float32 like x", weight=torch.randn(3, 24, 40).double())
    refused(ValueError, "to fit offsets", weight=torch.randn(2, 24, 40))
    refused(ValueError, r"lora_A must be \[3, rank, 40\]", lora_A=torch.randn(3, 4, 41))
    refused(ValueError, r"lora_A must be \[3, rank, 40\]", lora_A=torch.randn(3, 0, 40))
    refused(ValueError, r"lora_B must be \[3, 24, 4\]", lora_B=torch.randn(3, 24, 5))
    refused(TypeError, "lora_B must be torch.float32 like lora_A", lora_B=torch.randn(3, 24, 4).half())
    refused(ValueError, r"bias must be \[24\] or \[3, 24\]", bias=torch.randn(3))
    refused(TypeError, "x must be float32", x=x.int())
    refused(TypeError, "x must be a dense tensor", x=x.to_sparse())
    refused(ValueError, r"one element or \[3\]", scaling=torch.ones(2))
    refused(ValueError, "scaling must be finite", scaling=float("inf"))
    refused(ValueError, "dropout_p must be", dropout_p=1.5)
    refused(ValueError, "weight must be on cpu", weight=torch.empty(3, 24, 40, device="meta"))


def test_why_and_costs():
    t = small(SIZES[0])
    assert lk.why("grouped_lora_linear", **t).backend in lk.BACKENDS
    m, k, n, r = 24, 40, 24, 4
    spec = lk.dispatch.specs()["grouped_lora_linear"]
    args = *(t[name] for name in ("x", "weight", "lora_A", "lora_B", "offsets", "bias")), None, 1.0, 0.0
    assert spec.flops(*args) == 2 * m * n * k + 2 * m * r * (n + k)
    assert grouped.offsets_of(SIZES[0]).tolist() == [5, 12, 24]
