"""lora_embedding, LoRAEmbedding and the fused PEFT embedding: values, gradients, merging, and what falls back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from numerics import ResultSizes, assert_as_accurate
from peft import LoraConfig, get_peft_model
from peft_layers import BF16, FP16, FP32, FP64, randomise, run
from torch import nn

import lora_kernels as lk
from lora_kernels.functional.dora import dora_embedding
from lora_kernels.reasons import Reason

V, H, R, SCALING = 29, 18, 5, 1.7
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP64, FP64)]


def make_problem(dtype=FP32, adapter_dtype=FP32):
    """weight, lora_A, lora_B; representable in their dtypes, as float64."""
    shapes = ((V, H), dtype), ((R, V), adapter_dtype), ((H, R), adapter_dtype)
    return [torch.randn(shape).to(kind).double() for shape, kind in shapes]


def unfused(ids, weight, lora_A, lora_B, scaling=SCALING, padding_idx=None):
    s = F.embedding(ids, lora_A.t(), padding_idx)
    return F.embedding(ids, weight, padding_idx) + F.linear(s, lora_B) * scaling


def call(function, ids, tensors, dtypes, **options):
    """[y, dweight, dA, dB] of function, for a random output gradient."""
    leaves = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(tensors, dtypes)]
    y = function(ids, *leaves, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 40), (2, 0), (2, 3, 5)], ids=str)
def test_values_and_gradients(shape, dtype, adapter_dtype, backend):
    problem, ids = make_problem(dtype, adapter_dtype), torch.randint(V, shape)
    options = {"scaling": SCALING, "padding_idx": 3}
    exact = call(unfused, ids, problem, [FP64] * 3, **options)
    bound = call(unfused, ids, problem, [dtype] * 3, **options)
    with lk.use_backend(backend):
        ours = call(lk.lora_embedding, ids, problem, [dtype, adapter_dtype, adapter_dtype], **options)
    assert [t.dtype for t in ours] == [dtype, dtype, adapter_dtype, adapter_dtype]
    for name, *results in zip(("y", "dweight", "dA", "dB"), ours, bound, exact):
        value, limit, reference = results
        assert_as_accurate(value.to(limit.dtype), limit, reference, name)
    assert lk.stats()["served"] == {("lora_embedding", backend): 1, ("lora_embedding_backward", backend): 1}


def test_padding_row_gets_no_gradient():
    ids = torch.tensor([3, 4, 3])
    _, grad_weight, grad_A, _ = call(lk.lora_embedding, ids, make_problem(), [FP32] * 3, padding_idx=3)
    assert not grad_weight[3].any()
    assert not grad_A[:, 3].any()
    assert grad_A[:, 4].any()


def test_int32_strided_ids_and_tensor_scaling():
    problem = [t.float() for t in make_problem()]
    ids = torch.randint(V, (6, 8), dtype=torch.int32)[:, ::2].t()
    scaling = torch.tensor(0.3, requires_grad=True)
    y = lk.lora_embedding(ids, *problem, scaling=scaling)
    torch.testing.assert_close(y, unfused(ids, *problem, scaling=0.3))
    y.sum().backward()
    expected = F.linear(F.embedding(ids, problem[1].t()), problem[2]).sum()
    torch.testing.assert_close(scaling.grad, expected, rtol=1e-4, atol=1e-4)


def test_saves_ids_and_s_only():
    weight, A, B = (t.float().requires_grad_(i > 0) for i, t in enumerate(make_problem()))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        lk.lora_embedding(torch.randint(V, (2, 7)), weight, A, B)
    assert sorted(sizes) == sorted([(2, 7), (14, R), (R, V), (H, R)])


def test_opcheck_gradcheck_and_compile():
    problem, ids = make_problem(), torch.randint(V, (2, 7))
    leaves = [t.clone().requires_grad_() for t in problem]
    assert torch.autograd.gradcheck(lambda *t: lk.lora_embedding(ids, *t, scaling=SCALING), leaves)
    for leaf in leaves:
        leaf.data = leaf.data.float()
    torch.library.opcheck(torch.ops.lora_kernels.lora_embedding.default, (ids, *leaves, SCALING, 3))
    torch.compiler.reset()
    compiled = torch.compile(lk.lora_embedding, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(call(f, ids, problem, [FP32] * 3) for f in (compiled, lk.lora_embedding))):
        torch.testing.assert_close(ours, eager)


def test_adapter_files_refuse_what_they_cannot_hold(tmp_path):
    model = torch.nn.Sequential(
        lk.LoRAEmbedding.from_embedding(torch.nn.Embedding(7, 4), r=2, alpha=2), lk.LoRALinear(4, 4, r=2, alpha=2)
    )
    with pytest.raises(ValueError, match="save_adapter: 0 is a LoRAEmbedding"):
        lk.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_why_names_the_backend():
    problem = [t.float() for t in make_problem()]
    choice = lk.why("lora_embedding", torch.randint(V, (3,)), *problem)
    assert (choice.backend, choice.schedule) == ("cpu", "aten")


ERRORS = {
    "ids dtype": ({"ids": torch.zeros(2)}, TypeError, "ids must be int64 or int32, got torch.float32"),
    "no tensor": ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
    "integer weight": ({"weight": torch.ones(V, H).int()}, TypeError, "weight must be float32"),
    "weight": ({"weight": torch.randn(V)}, ValueError, r"weight must be \[vocabulary, features\]"),
    "lora_A": ({"lora_A": torch.randn(V, R)}, ValueError, r"lora_A must be \[rank, 29\]"),
    "lora_B": ({"lora_B": torch.randn(H, R + 1)}, ValueError, r"lora_B must be \[18, 5\]"),
    "adapter dtype": (
        {"lora_A": torch.randn(R, V).half(), "lora_B": torch.randn(H, R).half()},
        TypeError,
        "lora_A must be torch.float32 like weight",
    ),
    "device": ({"ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "ids must be on cpu"),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling must be finite, got nan"),
    "padding_idx": ({"padding_idx": V}, ValueError, r"padding_idx must be in \[0, 29\), got 29"),
    "id": ({"ids": torch.tensor([V])}, IndexError, "out of range"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_arguments(change, error, message):
    weight, lora_A, lora_B = (t.float() for t in make_problem())
    arguments = {"ids": torch.zeros(2, dtype=torch.int64), "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    with pytest.raises(error, match=message):
        lk.lora_embedding(**(arguments | change))


# ------------------------------------------------------------------------------------------------------- module


def make_module(dtype=FP32, **options):
    module = lk.LoRAEmbedding(V, H, r=R, alpha=8, dtype=dtype, **options)
    nn.init.normal_(module.lora_A)
    return module


def test_module_starts_as_the_plain_embedding():
    embedding, ids = nn.Embedding(V, H, padding_idx=2), torch.randint(V, (3, 4))
    module = lk.LoRAEmbedding.from_embedding(embedding, r=R, alpha=8, use_rslora=True)
    assert torch.equal(module(ids), embedding(ids))
    assert module.weight is embedding.weight
    assert not module.weight.requires_grad
    assert module.scaling == pytest.approx(8 / R**0.5)
    assert repr(module) == f"LoRAEmbedding({V}, {H}, padding_idx=2, r=5, alpha=8, use_rslora=True)"
    assert module.state_dict().keys() == {"weight", "lora_A", "lora_B"}


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_module_merges_and_unmerges(dtype, keep_base):
    module, ids = make_module(dtype), torch.arange(V)
    before, y = module.weight.clone(), module(ids)
    module.merge(keep_base)
    torch.testing.assert_close(module(ids), y, rtol=0, atol=2 * torch.finfo(dtype).eps * y.abs().max().item())
    module.unmerge()
    assert torch.equal(module.weight, before) if keep_base else (module.weight - before).abs().max() < 0.1


def test_merge_adapter_serves_embeddings():
    head, ids = nn.Linear(H, V, bias=False), torch.arange(V)
    model = nn.Sequential(make_module(), head)
    expected = model(ids)
    model[0].weight = nn.Parameter(head.weight.data, requires_grad=False)
    with pytest.raises(ValueError, match=r"tied weights: 0 with 1\.weight"):
        lk.merge_adapter(model)
    model[0].weight = nn.Parameter(model[0].weight.clone(), requires_grad=False)
    expected = model(ids)
    lk.merge_adapter(model, unload=True)
    assert type(model[0]) is nn.Embedding
    torch.testing.assert_close(model(ids), expected)
    assert vars(model[0]).keys() == vars(nn.Embedding(V, H)).keys()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_module_copies(clone):
    module, ids = make_module(), torch.arange(V)
    twin = clone(module)
    assert torch.equal(twin(ids), module(ids))


def test_module_refuses():
    for bad, error, message in (
        (nn.Linear(2, 2), TypeError, "expected a plain nn.Embedding"),
        (nn.Embedding(V, H, max_norm=1.0), ValueError, "max_norm"),
    ):
        with pytest.raises(error, match=message):
            lk.LoRAEmbedding.from_embedding(bad, r=2, alpha=1)
    with pytest.raises(ValueError, match="r must be at least 1"):
        lk.LoRAEmbedding(V, H, r=0, alpha=1)


# --------------------------------------------------------------------------------------------------------- PEFT


class Net(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed = embedding
        self.lin = nn.Linear(H, 3)

    def forward(self, ids, **kwargs):
        return self.lin(self.embed(ids, **kwargs))


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    embed_scale = torch.tensor(3.0)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def make_peft(embedding=None, dtype=FP32, **options):
    config = LoraConfig(**({"r": R, "lora_alpha": 8, "target_modules": ["embed"]} | options))
    model = get_peft_model(Net(embedding or nn.Embedding(V, H)).to(dtype), config)
    randomise(model)
    return model


def embed(model):
    return model.base_model.model.embed


def both(model, **options):
    model.add_adapter("second", LoraConfig(**({"r": 2, "target_modules": ["embed"]} | options)))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, None),
        ({"use_rslora": True, "lora_dropout": 0.5}, None),  # PEFT's embeddings have no dropout
        ({}, both),
        ({}, lambda m: embed(m).scaling.update(default=torch.tensor(0.3))),
        ({"embedding": nn.Embedding(V, H, padding_idx=3)}, None),
        ({"dtype": BF16}, None),
        ({"dtype": BF16}, both),
    ],
    ids=["plain", "rsLoRA", "two adapters", "tensor scaling", "padding_idx", "bf16", "bf16, two adapters"],
)
def test_fused_and_as_accurate_as_peft(options, change):
    stock = make_peft(**copy.deepcopy(options))
    if change is not None:
        change(stock)
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).fused == [("base_model.model.embed", "lora_embedding")]
    dtype, ids = options.get("dtype", FP32), torch.randint(V, (4, 6))
    exact = run(embed(copy.deepcopy(stock).double()), ids)
    bound, ours = run(embed(copy.deepcopy(stock).to(dtype)), ids), run(embed(patched), ids)
    assert ours.keys() == bound.keys()
    assert len(ours) > 2
    for name, value in ours.items():
        assert_as_accurate(value.to(bound[name].dtype), bound[name], exact[name], name)
    assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, None),
        ({"use_rslora": True, "lora_dropout": 0.5}, None),
        ({}, lambda m: embed(m).scaling.update(default=torch.tensor(0.3))),
        ({"embedding": nn.Embedding(V, H, padding_idx=3)}, None),
        ({"dtype": BF16}, None),
        ({"dtype": FP16}, None),
    ],
    ids=["plain", "rsLoRA", "tensor scaling", "padding_idx", "bf16", "fp16"],
)
def test_dora_is_fused_and_as_accurate_as_peft(options, change):
    stock = make_peft(**copy.deepcopy(options), use_dora=True)
    if change is not None:
        change(stock)
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).fused == [("base_model.model.embed", "dora_embedding")]
    dtype, ids = options.get("dtype", FP32), torch.randint(V, (4, 6))
    exact = run(embed(copy.deepcopy(stock).double()), ids)
    bound, ours = run(embed(copy.deepcopy(stock).to(dtype)), ids), run(embed(patched), ids)
    assert ours.keys() == bound.keys()
    assert "lora_magnitude_vector.default.weight" in ours
    for name, value in ours.items():
        assert_as_accurate(value.to(bound[name].dtype), bound[name], exact[name], name)
    assert ours["y"].dtype == dtype
    assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dora_starts_as_the_plain_embedding(dtype):
    """To the bit, as PEFT's: lora_A is zero, and the norm is that of the table, in the magnitude's dtype."""
    config = LoraConfig(r=R, target_modules=["embed"], use_dora=True)
    model = get_peft_model(Net(nn.Embedding(V, H)).to(dtype), config, autocast_adapter_dtype=False)
    assert torch.equal(embed(model)(torch.arange(V)), embed(model).base_layer.weight)
    lk.patch(model)
    assert torch.equal(embed(model)(torch.arange(V)), embed(model).base_layer.weight)
    assert lk.stats()["fallback"] == {}


def test_dora_forms_no_table():
    """Nothing but the gradient of lora_A, which is as long as the table, has the vocabulary's length."""
    vocabulary, features, r = 500, 40, 3
    weight, A, B = torch.randn(vocabulary, features), torch.randn(r, vocabulary), torch.randn(features, r)
    leaves = A.requires_grad_(), B.requires_grad_(), (torch.rand(features) + 0.5).requires_grad_()
    with ResultSizes(weight) as made:
        dora_embedding(torch.randint(vocabulary, (7,)), weight, *leaves).sum().backward()
    assert max(made.sizes) == r * vocabulary


@pytest.mark.parametrize("dynamic", [False, True])
def test_dora_compiles(dynamic):
    torch.compiler.reset()
    stock, ids = make_peft(use_dora=True), torch.randint(V, (4, 6))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    compiled = torch.compile(embed(patched), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = run(embed(stock), ids)
    for name, value in run(compiled, ids).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=2e-5, atol=1e-5)


def test_dora_trains_merges_and_verifies():
    stock, ids = make_peft(use_dora=True), torch.randint(V, (4, 6))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    assert lk.verify(patched).ok
    curves = []
    for model in (stock, patched):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(5):
            loss = model(ids).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    expected = patched(ids)
    patched.merge_adapter()
    torch.testing.assert_close(patched(ids), expected, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_dtype_of_the_table():
    stock, ids = make_peft(), torch.randint(V, (4, 6))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    exact = embed(copy.deepcopy(stock).double())(ids)
    with torch.autocast("cpu", BF16):
        ours, theirs = embed(patched)(ids), embed(stock)(ids)
    assert ours.dtype == theirs.dtype == FP32
    assert_as_accurate(ours, theirs, exact)
    assert lk.stats()["fallback"] == {}


FALLBACKS = {
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), Reason.DISABLED),
    "merged": ({}, lambda m: m.merge_adapter(), Reason.MERGED),
    "DoRA, two adapters": ({"use_dora": True}, lambda m: both(m), Reason.DORA),
    "DoRA, hook": (
        {"use_dora": True},
        lambda m: (
            embed(m).lora_magnitude_vector["default"].register_forward_hook(lambda _m, _args, out: (out[0] * 2, out[1]))
        ),
        Reason.ADAPTER_HOOKS,
    ),
    "MiCA": ({"init_lora_weights": "mica"}, None, Reason.VARIANT),
    "elsewhere": (
        {},
        lambda m: m.add_adapter("x", LoraConfig(target_modules=["lin"])) or m.set_adapter("x"),
        Reason.NO_ACTIVE_ADAPTER,
    ),
    "subclass": ({"embedding": ScaledEmbedding(V, H)}, None, Reason.BASE_LAYER),
    "max_norm": ({"embedding": nn.Embedding(V, H, max_norm=1.0)}, None, Reason.BASE_LAYER),
    "sparse": ({"embedding": nn.Embedding(V, H, sparse=True)}, None, Reason.BASE_LAYER),
    "embed_scale": ({}, lambda m: setattr(embed(m).base_layer, "embed_scale", 3.0), Reason.BASE_LAYER),
    "base trains": ({}, lambda m: embed(m).base_layer.weight.requires_grad_(), Reason.BASE_REQUIRES_GRAD),
    "hook": (
        {},
        lambda m: embed(m).base_layer.register_forward_hook(lambda _m, _args, out: out * 2),
        Reason.ADAPTER_HOOKS,
    ),
    "dtypes": ({}, lambda m: embed(m).lora_embedding_A.half() and None, Reason.MIXED_DTYPES),
}


@pytest.mark.parametrize(("options", "change", "reason"), FALLBACKS.values(), ids=FALLBACKS.keys())
def test_falls_back_to_peft(options, change, reason):
    stock = make_peft(**copy.deepcopy(options))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    for model in (stock, patched):
        if change is not None:
            torch.manual_seed(1)
            change(model)
        if reason == Reason.MIXED_DTYPES:
            embed(model).lora_embedding_B.half()
    ids = torch.randint(V, (4, 6))
    if options.get("embedding") is not None and options["embedding"].sparse:
        expected, ours = {"y": embed(stock)(ids)}, {"y": embed(patched)(ids)}
    else:
        expected, ours = run(embed(stock), ids), run(embed(patched), ids)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert lk.stats() == {"served": {}, "fallback": {("lora_embedding", reason): 1}}
    assert ("base_model.model.embed", reason) in lk.patch(patched).kept


def test_mixed_batch_is_pefts():
    stock, ids = make_peft().eval(), torch.randint(V, (3, 6))
    both(stock)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    names = ["second", "__base__", "default"]
    assert torch.equal(embed(patched)(ids, adapter_names=names), embed(stock)(ids, adapter_names=names))
    assert lk.stats()["fallback"] == {("lora_embedding", Reason.ADAPTER_NAMES): 1}


def test_unpatch_and_merge_and_unload():
    stock, ids = make_peft().eval(), torch.randint(V, (3, 6))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    merged = copy.deepcopy(patched).merge_and_unload()
    assert type(merged.embed) is nn.Embedding
    torch.testing.assert_close(merged(ids), stock(ids))
    lk.unpatch(patched)
    assert torch.equal(patched(ids), stock(ids))
