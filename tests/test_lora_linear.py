"""lora_linear on the CPU backend: values and gradients against float64, and the gradient contract."""

import itertools
import math

import misfits
import pytest
import torch
import torch.nn.functional as F
from numerics import ResultSizes, assert_as_accurate
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import philox
from lora_kernels.ops import lora_linear as _lora_op
from lora_kernels.support import cpu as _cpu
from lora_kernels.support import cpu_product as _cpu_product

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# (dtype of x and weight, dtype of the adapters)
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)]
# (tokens, in, out, rank): ragged everywhere, ranks from 1 to 256, more than one block of rows, no tokens at all. Every
# result has several elements: the error of a single one is luck, on our side and on the yardstick's.
SHAPES = [
    (0, 8, 8, 1),
    (1, 33, 117, 5),
    (300, 1, 30, 2),
    (300, 30, 1, 9),
    (5, 7, 3, 2),
    (37, 100, 65, 17),
    (130, 576, 70, 16),
    (64, 1100, 33, 8),
    (9, 64, 48, 256),
    (2050, 24, 20, 4),
]
SCALING, SEED = 1.7, 2026


def make_problem(m, k, n, r, dtype, adapter_dtype, bias):
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


def unfused(x, weight, lora_A, lora_B, bias, keep, p):
    """What PEFT computes, with a given mask."""
    dropped = x if keep is None else torch.where(keep, x * philox.keep_scale(p), torch.zeros((), dtype=x.dtype))
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_A), lora_B) * SCALING


def run(problem, dtype, adapter_dtype, function):
    """[y, dx, dA, dB] of function in these dtypes."""
    cast = {k: None if v is None else v.to(adapter_dtype if "lora" in k else dtype) for k, v in problem.items()}
    grad_y = cast.pop("grad_y")
    leaves = [cast[k].requires_grad_() for k in ("x", "lora_A", "lora_B")]
    y = function(**cast)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


@pytest.fixture
def library(request, monkeypatch):
    """Has fp32 products made by the library of this name, whatever dispatch would choose on this CPU."""
    if request.param == "onednn":
        request.getfixturevalue("onednn")
    else:
        monkeypatch.setattr(_cpu_product, "_mode", "mkl")
    monkeypatch.setattr(_cpu_product, "FROM_ROWS", 0)
    monkeypatch.setattr(_cpu, "FEW_ROWS", 1 << 20 if request.param == "decode" else 0)
    return request.param


def test_library_is_what_dispatch_says(onednn):
    def schedule(rows, dtype=FP32):
        sizes = (rows, 8), (24, 8), (2, 8), (24, 2)
        return lk.why("lora_linear", *(torch.randn(size, dtype=dtype) for size in sizes)).schedule

    assert schedule(_cpu_product.FROM_ROWS) == "onednn"
    assert schedule(_cpu_product.FROM_ROWS - 1) == "aten"
    assert schedule(_cpu.FEW_ROWS + 1) == "aten"
    assert schedule(_cpu.FEW_ROWS) == "decode"
    assert schedule(_cpu_product.FROM_ROWS, dtype=FP64) == "aten"
    with torch.backends.mkldnn.flags(enabled=False):
        assert schedule(_cpu_product.FROM_ROWS) == "aten"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "library"),
    [*((*dtypes, "aten") for dtypes in DTYPES), (FP32, FP32, "onednn"), (FP32, FP32, "decode")],
    ids=str,
    indirect=["library"],
)
def test_values_and_gradients(shape, dtype, adapter_dtype, library):
    m, k = shape[:2]
    for p, bias in itertools.product((0.0, 0.1, 0.5), (False, True)):
        problem = make_problem(*shape, dtype, adapter_dtype, bias)
        keep = philox.keep_mask(torch.tensor([SEED]), m, k, p) if p else None

        def torch_code(keep=keep, p=p, **tensors):
            return unfused(**tensors, keep=keep, p=p)

        def ours(bias, p=p, **tensors):
            return lk.lora_linear(**tensors, bias=bias, scaling=SCALING, dropout_p=p, training=True, seed=SEED)

        exact = run(problem, FP64, FP64, torch_code)
        for name, a, b, c in zip(
            ("y", "dx", "dA", "dB"),
            run(problem, dtype, adapter_dtype, ours),
            run(problem, dtype, dtype, torch_code),
            exact,
        ):
            assert a.dtype == (adapter_dtype if name in ("dA", "dB") else dtype)
            assert_as_accurate(a, b, c, f"{name} at p={p}, bias={bias}")
    assert set(lk.stats()["served"]) == {("lora_linear", "cpu"), ("lora_linear_backward", "cpu")}
    assert lk.stats()["fallback"] == {}


def small(dtype=FP32, m=12, k=40, n=24, r=4, grad=True):
    problem = make_problem(m, k, n, r, dtype, dtype, True)
    t = {name: problem[name].to(dtype) for name in ("x", "weight", "lora_A", "lora_B", "bias")}
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_(grad)
    return t


def test_everything_is_dropped_at_p_1():
    t = small()
    y = lk.lora_linear(**t, dropout_p=1.0, training=True)
    assert torch.equal(y, F.linear(t["x"], t["weight"], t["bias"]))
    dx, dA = torch.autograd.grad(y.sum(), (t["x"], t["lora_A"]))
    torch.testing.assert_close(dx, torch.ones_like(y) @ t["weight"])
    assert torch.count_nonzero(dA) == 0


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_one_token_one_feature_rank_one(p):
    x, weight, A, B = (torch.tensor([[v]]) for v in (3.0, 5.0, 7.0, 11.0))
    keep = lk.dropout_mask(1, 1, 0.5, SEED).item() if p else True
    y = lk.lora_linear(x, weight, A, B, scaling=2.0, dropout_p=p, training=True, seed=SEED)
    assert y.item() == 3.0 * 5.0 + 2.0 * (3.0 * 7.0 * 11.0) * (2.0 if p else 1.0) * keep


def test_dropout_spares_the_base_layer():
    t = small()
    torch.nn.init.zeros_(t["lora_B"])
    assert torch.equal(
        lk.lora_linear(**t, dropout_p=0.5, training=True), lk.lora_linear(**t, dropout_p=0.5, training=False)
    )


def test_no_dropout_in_eval_mode():
    t = small()
    assert torch.equal(lk.lora_linear(**t, dropout_p=0.5, training=False), lk.lora_linear(**t))


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0, 3)], ids=str)
def test_any_leading_shape(lead):
    t = small()
    x = torch.randn(*lead, 40)
    y = lk.lora_linear(**{**t, "x": x}, scaling=2.0)
    assert y.shape == (*lead, 24)
    expected = F.linear(x, t["weight"], t["bias"]) + 2.0 * x @ t["lora_A"].t() @ t["lora_B"].t()
    torch.testing.assert_close(y, expected)


def strided_inputs():
    base = torch.randn(4, 6, 80)
    return {
        "columns of a wider tensor": base[..., :40],
        "offset": base[1:, :, 40:],
        "transposed leading dimensions": base[..., :40].transpose(0, 1),
        "every second column": base[..., ::2],
        "columns outermost": torch.randn(40, 24).t(),
        "expanded rows": torch.randn(1, 40).expand(5, 40),
        "expanded batch": torch.randn(1, 6, 40).expand(4, 6, 40),
    }


@pytest.mark.parametrize("layout", list(strided_inputs()))
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "library"),
    [(FP32, "aten"), (FP32, "onednn"), (FP32, "decode"), (BF16, "aten")],
    ids=str,
    indirect=["library"],
)
def test_non_contiguous_inputs_and_gradients(layout, p, dtype, library):
    x = strided_inputs()[layout].to(dtype)
    t = small(dtype)
    results = []
    for strided in (True, False):
        tensors = {
            "x": x if strided else x.contiguous(),
            "weight": t["weight"].t().contiguous().t() if strided else t["weight"],
            "lora_A": t["lora_A"].detach().t().contiguous().t() if strided else t["lora_A"].detach(),
            "lora_B": t["lora_B"].detach().t().contiguous().t() if strided else t["lora_B"].detach(),
        }
        leaves = [tensors[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
        y = lk.lora_linear(**tensors, scaling=2.0, dropout_p=p, training=True, seed=3)
        # A gradient with stride 0, as sum() makes it, and one with a gap.
        grads = torch.autograd.grad(y.sum() + y[..., ::2].square().sum(), leaves)
        results.append((y, *grads))
    for a, b in zip(*results):
        # Another layout is another summation order in the vendor library: a few ulp of the largest element.
        assert (a - b).abs().max() <= 8 * torch.finfo(dtype).eps * b.abs().max()


def test_saves_x_s_and_seed_only():
    t = small(m=64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        lk.lora_linear(**t, dropout_p=0.5, training=True)
    given = {t[name].data_ptr() for name in ("x", "weight", "lora_A", "lora_B")}
    extra = [s for s in saved if s is not None and s.data_ptr() not in given]
    assert sorted((tuple(s.shape), s.dtype) for s in extra) == [((1,), torch.int64), ((64, 4), FP32)]


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(("x", "lora_A", "lora_B"), n)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_needs_input_grad_is_honoured(wanted, p, dtype):
    t = small(dtype)
    y = lk.lora_linear(**t, dropout_p=p, training=True, seed=1)
    all_grads = dict(zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y.sum(), (t["x"], t["lora_A"], t["lora_B"]))))
    for name in ("x", "lora_A", "lora_B"):
        t[name] = t[name].detach().requires_grad_(name in wanted)
    lk.lora_linear(**t, dropout_p=p, training=True, seed=1).sum().backward()
    for name, grad in all_grads.items():
        if name in wanted:
            torch.testing.assert_close(t[name].grad, grad)
        else:
            assert t[name].grad is None


def test_base_weight_and_bias_get_their_gradients():
    t = small()
    t["weight"].requires_grad_()
    t["bias"].requires_grad_()
    lk.lora_linear(**t).square().sum().backward()
    expected = {name: v.detach().clone().requires_grad_() for name, v in t.items()}
    unfused_y = F.linear(expected["x"], expected["weight"], expected["bias"])
    unfused_y = unfused_y + expected["x"] @ expected["lora_A"].t() @ expected["lora_B"].t()
    unfused_y.square().sum().backward()
    for name in t:
        torch.testing.assert_close(t[name].grad, expected[name].grad, msg=name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    t = small(FP64, m=3, k=5, n=4, r=2)
    with lk.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x, A, B: lk.lora_linear(x, t["weight"], A, B, t["bias"], scaling=0.5),
            (t["x"], t["lora_A"], t["lora_B"]),
        )


def test_gradcheck_under_dropout():
    t = small(FP64, m=3, k=5, n=4, r=2)
    assert torch.autograd.gradcheck(
        lambda x, A, B: lk.lora_linear(x, t["weight"], A, B, dropout_p=0.4, training=True, seed=11),
        (t["x"], t["lora_A"], t["lora_B"]),
    )
    # float64 dropout is the reference's: the kernel is fp32, and says so.
    assert ("lora_linear", "dtype not served") in lk.stats()["fallback"]


# ------------------------------------------------------------------------------------- randomness and recompute


def test_manual_seed_reproduces_the_mask():
    t = small(grad=False)
    torch.manual_seed(5)
    first = lk.lora_linear(**t, dropout_p=0.5, training=True)
    second = lk.lora_linear(**t, dropout_p=0.5, training=True)
    torch.manual_seed(5)
    assert torch.equal(lk.lora_linear(**t, dropout_p=0.5, training=True), first)
    assert not torch.equal(first, second)


def test_seed_is_an_int_or_a_tensor():
    t = small(grad=False)
    results = [
        lk.lora_linear(**t, dropout_p=0.5, training=True, seed=seed)
        for seed in (-3, torch.tensor([-3]), torch.tensor(-3), 2**64 - 3)
    ]
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recompute_sees_the_same_mask(use_reentrant):
    def gradients(wrap):
        torch.manual_seed(9)
        t = small()
        torch.manual_seed(10)

        def block(x):
            for _ in range(2):
                y = lk.lora_linear(**{**t, "x": x}, dropout_p=0.5, training=True)
                x = x + F.pad(y, (0, 16))
            return x

        out = checkpoint(block, t["x"], use_reentrant=use_reentrant) if wrap else block(t["x"])
        out.square().sum().backward()
        return [t[name].grad for name in ("x", "lora_A", "lora_B")]

    for plain, recomputed in zip(gradients(False), gradients(True)):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_adapter_gradients_do_not_depend_on_threads(dtype, p):
    def gradients(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        t = small(dtype, m=300, k=200)
        y = lk.lora_linear(**t, dropout_p=p, training=True, seed=1)
        # The base GEMM's summation order is the vendor library's affair, so dX and y itself are left out.
        return torch.autograd.grad(y, (t["lora_A"], t["lora_B"]), torch.randn_like(y))

    try:
        one = gradients(1)
        for threads in (2, 3):
            for a, b in zip(gradients(threads), one):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------- torch's machinery


def op_arguments(dtype, p, adapter_dtype=None):
    t = small(dtype)
    if adapter_dtype:
        t["lora_A"], t["lora_B"] = (t[n].detach().to(adapter_dtype).requires_grad_() for n in ("lora_A", "lora_B"))
    seed = torch.tensor([3]) if p else None
    return t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"], seed, 2.0, p


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP32, None), (BF16, None), (BF16, FP32)])
def test_opcheck(dtype, adapter_dtype, p):
    args = op_arguments(dtype, p, adapter_dtype)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear.default, args)
    x, weight, A, B, _, seed, scaling, p = (a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    s, grad_y = x @ A.to(x.dtype).t(), torch.randn(12, 24, dtype=dtype)
    for needs in itertools.product((True, False), repeat=3):
        torch.library.opcheck(
            torch.ops.lora_kernels.lora_linear_backward.default,
            (grad_y, x, s, weight, A, B, seed, scaling, p, *needs),
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_equals_eager(backend, p):
    torch._dynamo.reset()
    t = small()

    def step(x, A, B):
        y = lk.lora_linear(x, t["weight"], A, B, t["bias"], scaling=2.0, dropout_p=p, training=True, seed=4)
        return torch.tanh(y).sum()

    leaves = (t["x"], t["lora_A"], t["lora_B"])
    eager = torch.autograd.grad(step(*leaves), leaves)
    lk.reset_stats()
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=backend)(*leaves), leaves)
    assert lk.stats()["served"] == {("lora_linear", "cpu"): 1, ("lora_linear_backward", "cpu"): 1}
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_draws_a_new_mask_each_step_without_recompiling():
    torch._dynamo.reset()
    t = small(grad=False)
    compiled = torch.compile(lambda x: lk.lora_linear(**{**t, "x": x}, dropout_p=0.5, training=True), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(1)
        first, second = compiled(t["x"]), compiled(t["x"])
        torch.manual_seed(1)
        assert torch.equal(lk.lora_linear(**t, dropout_p=0.5, training=True), first)
    assert not torch.equal(first, second)


def test_function_and_registered_op_have_equal_gradients():
    x, weight, A, B, bias, seed, scaling, p = op_arguments(FP32, 0.3)
    grad_y = torch.randn(12, 24)
    by_op = torch.ops.lora_kernels.lora_linear.default(x, weight, A, B, bias, seed, scaling, p)[0]
    by_function = lk.LoRALinearFunction.apply(x, weight, A, B, bias, seed, scaling, p)
    assert torch.equal(by_op, by_function)
    for a, b in zip(torch.autograd.grad(by_op, (x, A, B), grad_y), torch.autograd.grad(by_function, (x, A, B), grad_y)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [FP32, None], ids=["fp32 adapters", "16-bit adapters"])
def test_autocast_follows_linear(dtype, adapter_dtype):
    t = small(FP32)
    if adapter_dtype is None:
        t["lora_A"], t["lora_B"] = (t[n].detach().to(dtype).requires_grad_() for n in ("lora_A", "lora_B"))
    explicit = {n: v if n.startswith("lora") else v.detach().to(dtype) for n, v in t.items()}
    expected = lk.lora_linear(**explicit, scaling=2.0)
    with torch.autocast("cpu", dtype):
        y = lk.lora_linear(**t, scaling=2.0)
        by_op = torch.ops.lora_kernels.lora_linear.default(
            t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"], None, 2.0, 0.0
        )[0]
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(by_op, expected)
    y.sum().backward()
    assert t["x"].grad.dtype == FP32
    assert t["lora_A"].grad.dtype == t["lora_A"].dtype


@pytest.mark.parametrize("library", ["aten", "decode"], indirect=True)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (1, 1), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_without_gradients_the_bits_are_the_same(lead, library, monkeypatch):
    """Few rows are then computed by an op of their own, which returns no s."""
    decodes = []
    native_decode = _lora_op._decode
    monkeypatch.setattr(_lora_op, "_decode", lambda *args: decodes.append(args) or native_decode(*args))
    for k, n, r in ((40, 24, 4), (17, 33, 1), (130, 9, 40)):
        t = small(k=k, n=n, r=r)
        x = torch.randn(2 * k, *lead).movedim(0, -1)[..., ::2]
        for bias in (t["bias"], None):
            kept = lk.lora_linear(**t | {"x": x, "bias": bias}, scaling=SCALING)
            with torch.no_grad():
                y = lk.lora_linear(**t | {"x": x, "bias": bias}, scaling=SCALING)
            assert kept.requires_grad
            assert y.shape == (*lead, n)
            assert torch.equal(y, kept)
    assert lk.stats()["served"] == {("lora_linear", "cpu"): 12}
    assert len(decodes) == (6 if library == "decode" or 0 in lead else 0)


def test_inference_mode_and_no_grad():
    t = small()
    expected = lk.lora_linear(**t).detach()
    with torch.no_grad():
        assert torch.equal(lk.lora_linear(**t), expected)
    with torch.inference_mode():
        y = lk.lora_linear(**t)
    assert y.is_inference()
    assert torch.equal(y, expected)


def test_double_backward_vmap_and_jvp_raise_clearly():
    t = small()
    by_op = torch.ops.lora_kernels.lora_linear.default(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"], None, 1.0, 0.0
    )[0]
    for y in (lk.lora_linear(**t), by_op):
        (dx,) = torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            dx.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transform"):
        torch.vmap(lambda x: lk.lora_linear(**{**t, "x": x}))(torch.randn(3, 12, 40))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t["x"].detach(), torch.ones(12, 40))
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            lk.lora_linear(**{**t, "x": dual})


def test_meta_tensors_give_shapes():
    t = {name: v.detach().to("meta") for name, v in small().items()}
    y = lk.lora_linear(**t)
    assert y.device.type == "meta"
    assert y.shape == (12, 24)


def test_nothing_is_written_into_the_inputs():
    t = small()
    before = {name: v.detach().clone() for name, v in t.items()}
    y = lk.lora_linear(**t, dropout_p=0.3, training=True)
    grad_y = torch.randn_like(y)
    kept = grad_y.clone()
    y.backward(grad_y)
    assert torch.equal(grad_y, kept)
    for name, v in t.items():
        assert torch.equal(v.detach(), before[name]), name


# ------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.randn(12, 41)}, ValueError, r"x must be \[\.\.\., 40\] to fit weight \(24, 40\)"),
        ({"x": torch.randn(12, 40, dtype=BF16)}, TypeError, "weight must be torch.bfloat16 like x"),
        ({"x": torch.ones(12, 40, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"x": torch.randn(12, 40, device="meta")}, ValueError, "weight must be on meta like x"),
        ({"weight": torch.randn(24)}, ValueError, r"weight must be \[out_features, in_features\]"),
        ({"lora_A": torch.randn(4, 39)}, ValueError, r"lora_A must be \[rank, 40\]"),
        ({"lora_A": torch.randn(0, 40), "lora_B": torch.randn(24, 0)}, ValueError, "rank >= 1"),
        ({"lora_A": torch.ones(4, 40, dtype=torch.int32)}, TypeError, "lora_A must be floating point"),
        ({"lora_B": torch.randn(24, 5)}, ValueError, r"lora_B must be \[24, 4\]"),
        ({"lora_B": torch.randn(24, 4, dtype=BF16)}, TypeError, "lora_B must be torch.float32 like lora_A"),
        ({"bias": torch.randn(23)}, ValueError, r"bias must be \[24\]"),
        ({"bias": torch.randn(24, dtype=BF16)}, TypeError, "bias must be torch.float32 like weight"),
        ({"scaling": float("nan")}, ValueError, "scaling must be finite, got nan"),
        ({"scaling": float("inf")}, ValueError, "scaling must be finite"),
        ({"scaling": "1"}, TypeError, "scaling must be a number, got str"),
        ({"scaling": torch.ones(2)}, ValueError, r"scaling must be .* a floating-point tensor of one element, got"),
        ({"scaling": torch.tensor(1)}, ValueError, "scaling must be .* got torch.int64"),
        ({"scaling": torch.ones((), device="meta")}, ValueError, "scaling must be on cpu like x, got meta"),
        ({"dropout_p": 1.1}, ValueError, r"dropout_p must be a number in \[0, 1\]"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
        ({"seed": 1.5, "dropout_p": 0.5}, TypeError, "seed must be an int"),
        ({"seed": torch.tensor([1.0]), "dropout_p": 0.5}, ValueError, "seed must be an int64 tensor"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=f"lora_linear: .*{message}"):
        lk.lora_linear(**{**small(grad=False), "training": True, **change})


@pytest.mark.parametrize("rows", [1, misfits.M])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_registered_ops_read_nothing_that_does_not_fit(rows, dtype):
    ops = torch.ops.lora_kernels
    for name in misfits.FORWARD:
        for drops in (True, name == "seed"):  # without dropout, few rows are the decode kernel's
            with pytest.raises(RuntimeError, match=misfits.message(name)):
                ops.lora_linear(*misfits.lora_linear(name, rows, dtype, drops=drops))
    for name in misfits.FORWARD.keys() - {"seed"}:
        x, weight, lora_A, lora_B, bias, _, scaling, _ = misfits.lora_linear(name, rows, dtype, drops=False)
        with pytest.raises(RuntimeError, match=misfits.message(name)):
            torch.ops.lora_kernels_native.lora_decode(x, weight, lora_A, lora_B, bias, scaling)
    for name in misfits.BACKWARD:
        with pytest.raises(RuntimeError, match=misfits.message(name)):
            ops.lora_linear_backward(*misfits.lora_linear_backward(name, rows, dtype))
    x, weight, lora_A, lora_B = torch.randn(rows, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    native = torch.ops.lora_kernels_native
    for wrong in ((x.to(BF16), weight.to(BF16)), (x, weight.t().contiguous().t())):
        with pytest.raises(RuntimeError, match="the decode schedule serves fp32 with unit column stride"):
            native.lora_decode(*wrong, lora_A, lora_B, None, 2.0)
    with pytest.raises(RuntimeError, match="the decode schedule serves fp32"):
        native.frozen_linear(x.to(BF16), weight.to(BF16), None, "decode")
    with pytest.raises(RuntimeError, match="the onednn schedule serves fp32"):
        native.frozen_linear(x.to(BF16), weight.to(BF16), None, "onednn")
    with pytest.raises(RuntimeError, match="seed must be one int64 number"):
        ops.dropout_mask(misfits.FORWARD["seed"], rows, 8, 0.5)
    x, weight, bias = torch.randn(rows, 8).to(dtype), torch.randn(6, 8).to(dtype), torch.randn(6).to(dtype)
    for args in (
        (x, weight[:, 1:], bias),
        (x, weight, bias[1:]),
        (x, weight.double(), bias),
        (x, weight, bias.double()),
    ):
        with pytest.raises(RuntimeError, match="must"):
            ops.frozen_linear(*args)
    with pytest.raises(RuntimeError, match="must"):
        ops.frozen_linear_backward(x, weight)


def test_what_serves_no_dropout_refuses_a_seed():
    """Kills: a seed that the kernel for few rows does not look at; fp32 gradients written into memory of fp64."""
    native, seed = torch.ops.lora_kernels_native, torch.tensor([3])
    x, weight, lora_A, lora_B = torch.randn(70, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with pytest.raises(RuntimeError, match="no dropout, so seed must be None"):
        native.lora_linear(x[:1], weight, lora_A, lora_B, None, seed, 2.0, 0.5, "decode")
    with pytest.raises(RuntimeError, match="no dropout, so seed must be None"):
        native.lora_pack(x[:1], [weight], [lora_A], [lora_B], [], seed, [2.0], [0.5], "decode")
    wide = [t.double() for t in (x, weight, lora_A, lora_B)]
    with pytest.raises(RuntimeError, match="x must not be float64 under dropout"):
        native.lora_linear(*wide, None, seed, 2.0, 0.5, "aten")
    grad_y, s = torch.randn(70, 6).double(), torch.randn(70, 2).double()
    with pytest.raises(RuntimeError, match="x must not be float64 under dropout"):
        native.lora_linear_backward(grad_y, wide[0], s, *wide[1:], seed, 2.0, 0.5, True, True, True, "aten")


def test_float16_adapters_over_bfloat16_are_refused():
    t = small(BF16, grad=False)
    t["lora_A"], t["lora_B"] = t["lora_A"].half(), t["lora_B"].half()
    with pytest.raises(TypeError, match=r"lora_A must be torch\.bfloat16 like weight"):
        lk.lora_linear(**t)


# ---------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_merge_rounds_once_and_unmerge_returns(dtype):
    t = small(dtype, k=1500, n=1000, grad=False)
    exact = t["weight"].double() + 0.5 * t["lora_B"].double() @ t["lora_A"].double()
    weight = t["weight"].clone()
    assert lk.merge_(weight, t["lora_A"], t["lora_B"], 0.5) is weight
    unfused_merge = t["weight"] + (0.5 * (t["lora_B"] @ t["lora_A"])).to(dtype)
    assert_as_accurate(weight, unfused_merge, exact)
    if dtype != FP32:
        assert (weight.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    lk.unmerge_(weight, t["lora_A"], t["lora_B"], 0.5)
    assert (weight - t["weight"]).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_merge_refuses_nan_and_leaves_the_weight():
    t = small(grad=False)
    weight = t["weight"].clone()
    t["lora_B"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        lk.merge_(weight, t["lora_A"], t["lora_B"])
    with pytest.raises(ValueError, match="scaling must be finite"):
        lk.merge_(weight, t["lora_A"], t["lora_A"].t()[:24], float("nan"))
    assert torch.equal(weight, t["weight"])


def test_merge_refuses_to_overflow():
    weight = torch.full((4, 3), 6e4, dtype=FP16)
    before = weight.clone()
    with pytest.raises(ValueError, match="merged weight must be finite"):
        lk.merge_(weight, torch.full((1, 3), 100.0), torch.full((4, 1), 100.0))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_merge_forms_no_update_of_the_weights_size(dtype, monkeypatch):
    monkeypatch.setattr("lora_kernels.functional.merging._MERGE_BLOCK", 512)
    weight, A, B = torch.randn(64, 32, dtype=dtype), torch.randn(2, 32), torch.randn(64, 2)
    with ResultSizes(weight) as made:
        lk.merge_(weight, A, B, 2.0)
    assert max(made.sizes) == 512


@pytest.mark.parametrize("native", [False, True])
def test_a_scaled_loss_does_not_overflow_in_fp16(monkeypatch, native):
    """dY B may be too large for fp16 where what it is scaled to is not."""
    monkeypatch.setattr(_cpu, "has_native_matmul", lambda dtype: native or dtype in (FP32, FP64))
    x = torch.full((8, 16), 0.01, dtype=torch.float16, requires_grad=True)
    A, B = (
        torch.full(size, value, dtype=torch.float16, requires_grad=True)
        for size, value in (((2, 16), 0.1), ((32, 2), 4.0))
    )
    y = lk.lora_linear(x, torch.zeros(32, 16, dtype=torch.float16), A, B, scaling=1 / 16)
    gradients = torch.autograd.grad(y, (x, A, B), torch.full_like(y, 1000.0))
    assert all(gradient.isfinite().all() for gradient in gradients)
