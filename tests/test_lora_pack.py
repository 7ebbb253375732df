"""lora_pack: values and gradients against each member by itself in float64, and what a pack shares and what not."""

import math

import pytest
import torch
from numerics import assert_as_accurate
from packs import BF16, FP16, FP32, FP64, PACKS, SEED, Pack, apart, leaves, make_problem, op_arguments, run, small
from poisoned import memory_of_nan  # noqa: F401
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import _native, philox
from lora_kernels.spec import Verdict
from lora_kernels.support import cpu, cpu_product

DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]
ON_CPU = pytest.mark.skipif(_native.cpu is None, reason="lora_kernels._C is not built")


@pytest.fixture(params=["reference", None], ids=str)
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


def check_values(pack, dtypes, p, bias):
    problem = make_problem(pack, *dtypes, bias)

    def torch_code(**tensors):
        return apart(**tensors, scalings=pack.scalings, p=p)

    def ours(**tensors):
        return lk.lora_pack(**tensors, scalings=pack.scalings, dropout_p=p, training=True, seed=SEED)

    exact = run(problem, FP64, FP64, torch_code)
    unfused, found = run(problem, dtypes[0], dtypes[0], torch_code), run(problem, *dtypes, ours)
    for name, a in found.items():
        assert a.dtype == dtypes["A" in name or "B" in name]
        assert_as_accurate(a, unfused[name], exact[name], f"{name} at p={p}, bias={bias}")


@pytest.mark.parametrize("pack", PACKS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values_and_gradients(pack, dtypes, backend):
    """Kills: one member's factors, scaling, bias or mask taken of another; a member's part of grad_x left out."""
    for p, bias in ((0.0, True), (0.3, False)):
        check_values(pack, dtypes, p, bias)


@ON_CPU
@pytest.mark.parametrize("schedule", ["aten", "onednn", "upcast", "onednn, aten, onednn", "aten, onednn, aten"])
@pytest.mark.parametrize("pack", [p for p in PACKS if len(p.ns) == 3], ids=str)
def test_every_schedule_of_the_base(pack, schedule, monkeypatch):
    if "onednn" in schedule and not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    each = schedule.split(", ") * (1 if "," in schedule else 3)
    given = iter(each * 100)
    monkeypatch.setattr(cpu, "matmul_verdict", lambda *_, **__: Verdict(next(given), "asked for"))
    monkeypatch.setattr(cpu, "FEW_ROWS", 0)
    dtypes = (BF16, FP32) if schedule == "upcast" else (FP32, FP32)
    for p, bias in ((0.0, True), (0.3, False)):
        check_values(pack, dtypes, p, bias)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("pack", PACKS[:4], ids=str)
def test_a_member_is_its_own_layer(pack, p, dtype, backend):
    """With the layer's seed its result is the layer's. Kills: masks of a seed that ``member_seed`` does not name."""
    t = small(pack, dtype)
    rest = {"dropout_p": p, "training": True}
    ys = lk.lora_pack(**t, scalings=pack.scalings, seed=SEED, **rest)
    for i, y in enumerate(ys):
        seed = philox.member_seed(SEED, i)
        args = t["x"], t["weights"][i], t["lora_As"][i], t["lora_Bs"][i], t["biases"][i]
        alone = lk.lora_linear(*args, scaling=pack.scalings[i], seed=seed, **rest)
        tolerance = {} if dtype == FP32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(y, alone, **tolerance)


def test_masks_are_bit_for_bit_those_of_the_layers(backend):
    """x is ones, and A and B pick its features: what is left of y is the mask."""
    k, p = 24, 0.4
    eye, zero = [torch.eye(k)] * 2, [torch.zeros(k, k)] * 2
    ys = lk.lora_pack(torch.ones(8, k), zero, eye, eye, dropout_p=p, training=True, seed=-5)
    for i, y in enumerate(ys):
        keep = lk.dropout_mask(8, k, p, philox.member_seed(-5, i))
        assert torch.equal(y != 0, keep)
    assert not torch.equal(ys[0] != 0, ys[1] != 0)


def test_member_seed():
    assert philox.member_seed(7, 0) == 7
    for seed in (7, -1, 2**63 - 1, -(2**63), 2**64 - 1):
        found = [philox.member_seed(seed, i) for i in range(100)]
        assert len(set(found)) == 100
        assert all(-(2**63) <= one < 2**63 and (one - seed - i * 0xD1B54A32D192ED03) % 2**64 == 0
                   for i, one in enumerate(found))  # fmt: skip
        tensor = torch.tensor([(seed + 2**63) % 2**64 - 2**63])
        assert [philox.member_seed(tensor, i).item() for i in range(100)] == found


def test_probabilities_of_each_member(backend):
    """A member that drops nothing, one that drops all, and numbers for all."""
    pack = PACKS[0]
    t = small(pack, bias=False)
    ys = lk.lora_pack(**t, dropout_p=[0.0, 1.0, 0.25], training=True, seed=3)
    args = [(t["x"], t["weights"][i], t["lora_As"][i], t["lora_Bs"][i]) for i in range(3)]
    torch.testing.assert_close(ys[0], lk.lora_linear(*args[0]))
    torch.testing.assert_close(ys[1], lk.frozen_linear(*args[1][:2]))
    seed = philox.member_seed(3, 2)
    torch.testing.assert_close(ys[2], lk.lora_linear(*args[2], dropout_p=0.25, training=True, seed=seed))
    for a, b in zip(lk.lora_pack(**t, scalings=2, dropout_p=0.5), lk.lora_pack(**t, scalings=(2.0, 2, 2.0))):
        assert torch.equal(a, b)


def grads_of(t, ys):
    return torch.autograd.grad(sum(y.float().sum() for y in ys), leaves(t), materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("pack", [PACKS[0], PACKS[2]], ids=str)
def test_operands_lie_anyhow(pack, backend):
    t = small(pack)
    want = lk.lora_pack(**t, seed=1)
    strided = {
        "x": torch.randn(pack.m, 2, pack.k)[:, 1].copy_(t["x"].detach()).requires_grad_(),
        "weights": [w.t().contiguous().t() for w in t["weights"]],
        "lora_As": [A.detach().t().contiguous().t().requires_grad_() for A in t["lora_As"]],
        "lora_Bs": [B.detach().t().contiguous().t().requires_grad_() for B in t["lora_Bs"]],
        "biases": [None if b is None else torch.stack([b, b], 1)[:, 0] for b in t["biases"]],
    }
    found = lk.lora_pack(**strided, seed=1)
    for a, b in zip((*found, *grads_of(strided, found)), (*want, *grads_of(t, want))):
        torch.testing.assert_close(a, b)
    # Gradients that are views, and a leading shape.
    x3 = strided["x"].detach()[None].expand(2, -1, -1).requires_grad_()
    ys = lk.lora_pack(**{**t, "x": x3})
    assert [y.shape for y in ys] == [(2, pack.m, n) for n in pack.ns]
    wide = [torch.randn(*y.shape, 2) for y in ys]
    first = torch.autograd.grad(ys, leaves(t)[1:], [g[..., 0] for g in wide], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(ys, leaves(t)[1:], [g[..., 0].contiguous() for g in wide])):
        torch.testing.assert_close(a, b)


def test_saves_x_s_and_seed_once():
    t = small()
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lk.lora_pack(**t, dropout_p=0.5, training=True)
    own = {p.data_ptr() for p in (t["x"], *t["weights"], *t["lora_As"], *t["lora_Bs"])}
    sizes = sorted(s.numel() for pointer, s in saved.items() if pointer not in own)
    assert sizes == [1, PACKS[0].m * sum(PACKS[0].ranks)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("wanted", [("x",), ("lora_As",), ("lora_Bs",), ("x", "lora_Bs")], ids=str)
def test_needs_input_grad_is_honoured(wanted, p, backend):
    """Also of one member alone, and of one whose result nobody uses."""
    t = small(PACKS[1])
    rest = {"scalings": PACKS[1].scalings, "dropout_p": p, "training": True, "seed": 3}
    full = dict(zip(map(id, leaves(t)), grads_of(t, lk.lora_pack(**t, **rest))))
    for name in ("x", "lora_As", "lora_Bs"):
        for i, leaf in enumerate(t[name] if isinstance(t[name], list) else [t[name]]):
            leaf.requires_grad_(name in wanted and i != 1)
    some = [leaf for leaf in leaves(t) if leaf.requires_grad]
    for leaf, grad in zip(some, torch.autograd.grad(sum(y.sum() for y in lk.lora_pack(**t, **rest)), some)):
        torch.testing.assert_close(grad, full[id(leaf)])
    ys = lk.lora_pack(**t, **rest)
    alone = torch.autograd.grad(ys[2].sum(), some, allow_unused=True)
    for leaf, grad in zip(some, alone):
        if any(leaf is other for other in (t["lora_As"][0], t["lora_Bs"][0])):
            assert grad is None  # of zeros, an optimizer would decay the adapter
        elif leaf is not t["x"]:
            torch.testing.assert_close(grad, full[id(leaf)])


def test_a_base_that_trains(backend):
    t = small(PACKS[4], FP64)
    bases = [*t["weights"], *(b for b in t["biases"] if b is not None)]
    every = [*leaves(t), *(base.requires_grad_() for base in bases)]
    ys, want = lk.lora_pack(**t, scalings=PACKS[4].scalings), apart(**t, scalings=PACKS[4].scalings)
    grads = [torch.randn_like(y) for y in ys]
    for a, b in zip(torch.autograd.grad(ys, every, grads), torch.autograd.grad(want, every, grads)):
        torch.testing.assert_close(a, b)


def test_scalings_in_tensors(backend):
    t = small()
    factors = [torch.tensor(0.5, requires_grad=True), 2.0, torch.tensor([3.0])]
    ys = lk.lora_pack(**t, scalings=factors)
    for a, b in zip(ys, lk.lora_pack(**t, scalings=[0.5, 2.0, 3.0])):
        torch.testing.assert_close(a, b)
    (grad,) = torch.autograd.grad(ys[0].sum(), factors[0])
    want = (t["x"] @ t["lora_As"][0].t() @ t["lora_Bs"][0].t()).sum()
    torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recompute_sees_the_same_masks(reentrant, p):
    t = small(bias=False)

    def call(x, *tensors):
        weights, As, Bs = tensors[:3], tensors[3:6], tensors[6:]
        return lk.lora_pack(x, weights, As, Bs, dropout_p=p, training=True)

    flat = t["x"], *t["weights"], *t["lora_As"], *t["lora_Bs"]
    torch.manual_seed(5)
    want = grads_of(t, call(*flat))
    torch.manual_seed(5)
    sum(y.sum() for y in checkpoint(call, *flat, use_reentrant=reentrant)).backward()
    for leaf, grad in zip(leaves(t), want):
        assert torch.equal(leaf.grad, grad)


@ON_CPU
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapter_gradients_do_not_depend_on_threads(p):
    t = small(PACKS[1])
    with torch.no_grad():
        for weight in t["weights"]:
            weight.zero_()  # the base product is the vendor's
    rest = {"dropout_p": p, "training": True, "seed": 3}
    try:
        one = grads_of(t, lk.lora_pack(**t, **rest))
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(one[1:], grads_of(t, lk.lora_pack(**t, **rest))[1:]):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("pack", [Pack(4, 8, (6, 3), (2, 3)), Pack(4, 8, (6, 3, 5), (2, 0, 1))], ids=str)
def test_opcheck(pack, p, bias):
    torch.library.opcheck(torch.ops.lora_kernels.lora_pack.default, op_arguments(pack, p, bias=bias))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("pack", [PACKS[0], PACKS[3], PACKS[4]], ids=str)
def test_compiled_equals_eager(pack, p):
    t = small(pack)

    def call(**given):
        return lk.lora_pack(**given, scalings=pack.scalings, dropout_p=p, training=True, seed=3)

    ys, found = call(**t), torch.compile(call, fullgraph=True, backend="aot_eager")(**t)
    for a, b in zip((*found, *grads_of(t, found)), (*ys, *grads_of(t, ys))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast_follows_linear(dtype):
    t = small()
    with torch.autocast("cpu", dtype):
        ys, want = lk.lora_pack(**t), apart(**t, scalings=[1.0] * 3)
        compiled = torch.compile(lk.lora_pack, backend="aot_eager")(**t)
    for y, c, w in zip(ys, compiled, want):
        assert y.dtype == c.dtype == w.dtype == dtype
        torch.testing.assert_close(y, w, rtol=0.05, atol=0.05)
        torch.testing.assert_close(c, y)
    assert all(grad.dtype == FP32 for grad in grads_of(t, ys))


@pytest.mark.parametrize("pack", PACKS[:4], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_without_gradients_the_bits_are_the_same(pack, dtype):
    t = small(pack, dtype)
    ys = lk.lora_pack(**t, scalings=pack.scalings)
    with torch.no_grad():
        found = lk.lora_pack(**t, scalings=pack.scalings)
    with torch.inference_mode():
        others = lk.lora_pack(**t, scalings=pack.scalings)
    for y, a, b in zip(ys, found, others):
        assert torch.equal(y, a)
        assert torch.equal(y, b)


def test_results_may_be_changed_in_place():
    t = small()
    y, *_ = lk.lora_pack(**t)
    y.add_(1.0).sum().backward()
    assert t["lora_As"][0].grad.isfinite().all()


def test_on_meta_there_are_shapes():
    t = small(PACKS[4])
    ys = lk.lora_pack(
        **{name: [None if v is None else v.to("meta") for v in given] if isinstance(given, list) else given.to("meta")
           for name, given in t.items()}
    )  # fmt: skip
    assert [y.shape for y in ys] == [(66, n) for n in PACKS[4].ns]


@ON_CPU
def test_decode_is_what_dispatch_says():
    assert lk.why("lora_pack", **small(PACKS[2])).schedule == "decode"
    t = small(Pack(cpu.FEW_ROWS + 1, 40, (24, 30), (2, 7)))
    assert lk.why("lora_pack", **t).schedule == "aten"
    t = {**small(PACKS[2]), "weights": [w.t().contiguous().t() for w in small(PACKS[2])["weights"]]}
    assert lk.why("lora_pack", **t).schedule == "aten"


@ON_CPU
def test_members_whose_products_differ(monkeypatch):
    verdicts = iter([Verdict("onednn", ""), Verdict("aten", "")])
    monkeypatch.setattr(cpu_product, "choose", lambda *_: next(verdicts))
    choice = lk.why("lora_pack", **small(Pack(40, 40, (24, 30), (2, 7))))
    assert choice.schedule == "onednn, aten"
    assert "differ" in choice.reason


def test_stats_and_costs():
    pack = PACKS[0]
    t = small(pack)
    choice = lk.why("lora_pack", **t)
    lk.reset_stats()
    sum(y.sum() for y in lk.lora_pack(**t)).backward()
    assert lk.stats()["served"] == {("lora_pack", choice.backend): 1, ("lora_pack_backward", choice.backend): 1}
    double = small(pack, FP64)
    assert lk.why("lora_pack", **double, dropout_p=0.5, training=True).backend == "reference"
    spec, m, k = lk.dispatch.specs()["lora_pack"], pack.m, pack.k
    args = op_arguments(pack, 0.0)
    expansions = sum(n * r for n, r in zip(pack.ns, pack.ranks))
    n, r = sum(pack.ns), sum(pack.ranks)
    assert spec.flops(*args) == 2 * m * k * (n + r) + 2 * m * expansions
    assert spec.bytes(*args) == 4 * (m * (k + n + r) + n * k + r * k + expansions)
    grads = [torch.empty(m, n) for n in pack.ns]
    needs = (True, [True] * 3, [False] * 3)
    backward = (grads, args[0], torch.empty(m * r), *args[1:4], None, pack.scalings, [0.0] * 3, *needs)
    spec = lk.dispatch.specs()["lora_pack_backward"]
    assert spec.flops(*backward) == 2 * m * (expansions + k * (n + r) + r * k)
    assert math.isclose(spec.bytes(*backward), 4 * (m * (n + r + 2 * k) + n * k + 2 * r * k + expansions))
