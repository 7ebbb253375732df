"""LoRALinear and FrozenLinear: parameters, merging, errors, and the life of a module."""

import copy
import math
import pickle

import pytest
import torch
from numerics import assert_as_accurate
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import lora_kernels as lk
from lora_kernels.spec import Verdict
from lora_kernels.support import cpu
from lora_kernels.support import cpu_product as _cpu_product

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
K, N, R, ALPHA = 23, 17, 5, 12


def make_layer(dtype=FP32, bias=True, **options) -> lk.LoRALinear:
    layer = lk.LoRALinear(K, N, r=R, alpha=ALPHA, bias=bias, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def exact_weight(layer: lk.LoRALinear) -> torch.Tensor:
    return layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()


# ---------------------------------------------------------------------------------------------- construction


def test_starts_as_the_plain_linear():
    linear = nn.Linear(K, N)
    layer = lk.LoRALinear.from_linear(linear, r=R, alpha=ALPHA)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(K)  # kaiming_uniform_ with a = sqrt(5)
    assert bound * 0.8 < layer.lora_A.abs().max() <= bound


def test_scaling_rules():
    assert make_layer().scaling == ALPHA / R
    assert make_layer(use_rslora=True).scaling == ALPHA / math.sqrt(R)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [(FP32, None, FP32), (FP64, None, FP64), (BF16, None, FP32), (FP16, None, FP32), (BF16, BF16, BF16)],
)
def test_adapter_dtype(dtype, adapter_dtype, expected):
    layer = make_layer(dtype, adapter_dtype=adapter_dtype)
    assert layer.weight.dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected
    assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an integer, got 2.0"),
        ({"r": True}, TypeError, "r must be an integer, got True"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
        ({"alpha": "16"}, TypeError, "alpha must be a number, got '16'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"dropout": math.nan}, ValueError, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_numbers_are_named(bad, error, message):
    linear = nn.Linear(K, N)
    with pytest.raises(error, match=f"from_linear: {message}"):
        lk.LoRALinear.from_linear(linear, **({"r": R, "alpha": ALPHA} | bad))
    with pytest.raises(error, match=f"LoRALinear: {message}"):
        lk.LoRALinear(K, N, **({"r": R, "alpha": ALPHA} | bad))
    assert linear.weight.requires_grad, "a refused layer must stay as it was"


def test_from_linear_refuses_other_layers():
    with pytest.raises(TypeError, match=r"expected a plain nn.Linear, got torch.nn.modules.conv.Conv1d"):
        lk.LoRALinear.from_linear(nn.Conv1d(3, 3, 1), r=R, alpha=ALPHA)


def test_from_peft_refuses_other_layers():
    with pytest.raises(TypeError, match=r"expected a PEFT lora.Linear, got torch.nn.modules.linear.Linear"):
        lk.LoRALinear.from_peft(nn.Linear(K, N))


# --------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(K,), (4, K), (2, 3, K), (0, K)])
def test_forward_and_gradients(bias, shape):
    layer, x = make_layer(bias=bias), torch.randn(shape, requires_grad=True)
    results = []
    for module, inputs in ((layer, x), (None, x), (None, x.detach().double().requires_grad_())):
        p = {k: v.detach().to(inputs.dtype) for k, v in layer.named_parameters()}
        A, B = (layer.lora_A, layer.lora_B) if module else (p["lora_A"].requires_grad_(), p["lora_B"].requires_grad_())
        if module:
            y = module(inputs)
        else:
            y = F.linear(inputs, p["weight"], p.get("bias")) + F.linear(F.linear(inputs, A), B) * layer.scaling
        results.append([y, *torch.autograd.grad(y.square().sum(), [inputs, A, B])])
    for name, ours, unfused, exact in zip(("y", "dx", "dA", "dB"), *results):
        assert_as_accurate(ours, unfused, exact, name)


def test_dropout_only_while_training():
    layer, x = make_layer(dropout=0.5), torch.randn(40, K)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, exact_weight(layer).float(), layer.bias))


def test_autocast():
    layer, x = make_layer(), torch.randn(6, K)
    with torch.autocast("cpu", BF16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == BF16
    assert layer.lora_A.grad.dtype == FP32


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"x must be \[..., 23\]"):
        make_layer()(torch.randn(2, K + 1))
    with pytest.raises(TypeError, match=r"weight must be torch\.bfloat16 like x"):
        make_layer()(torch.randn(2, K, dtype=BF16))


# --------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_merged_weight_is_rounded_once(dtype):
    layer = make_layer(dtype)
    exact = exact_weight(layer)
    layer.merge()
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (layer.weight.double() - exact).abs().max() <= ulp  # half an ulp for the store, the rest for the fp32 sum


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_unmerge(dtype):
    layer = make_layer(dtype)
    before = layer.weight.clone()
    layer.merge(keep_base=True)
    assert not torch.equal(layer.weight, before)
    layer.unmerge()
    assert torch.equal(layer.weight, before), "keep_base restores bitwise"

    merged_scale = exact_weight(layer).abs().max()
    layer.merge()
    layer.unmerge()
    assert (layer.weight.double() - before.double()).abs().max() <= 2 * torch.finfo(dtype).eps * merged_scale


def test_merging_twice_is_an_error():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    weight = layer.weight.clone()
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    assert torch.equal(layer.weight, weight)


def test_merge_refuses_nan():
    layer = make_layer()
    layer.lora_B.data[0, 0] = math.nan
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="finite"):
        layer.merge(keep_base=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_merged_layer_passes_gradients_to_x_only():
    layer, x = make_layer(), torch.randn(3, K, requires_grad=True)
    layer.merge()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
    assert layer.lora_A.grad is None


# ---------------------------------------------------------------------------------------- merging a model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def tied_model(targets=("body", "head")):
    model = Tied()
    lk.inject(model, list(targets), r=2, alpha=4)
    for module in model.modules():
        if isinstance(module, lk.LoRALinear):
            nn.init.normal_(module.lora_B)
    return model


def test_merge_adapter_refuses_tied_weights():
    model = tied_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"tied weights: head with embed\.weight; pass untie=True"):
        lk.merge_adapter(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_merge_adapter_unties():
    model, ids = tied_model(), torch.arange(5)
    expected, embedding = model(ids), model.embed.weight.clone()
    lk.merge_adapter(model, untie=True)
    assert torch.equal(model.embed.weight, embedding)
    torch.testing.assert_close(model(ids), expected)


def test_unmerge_adapter_restores_bitwise():
    model = tied_model(["body"])
    before = model.body.weight.clone()
    lk.merge_adapter(model, keep_base=True)
    with pytest.raises(RuntimeError, match="body is already merged"):
        lk.merge_adapter(model)
    lk.unmerge_adapter(model)
    assert torch.equal(model.body.weight, before)
    with pytest.raises(RuntimeError, match="body is not merged"):
        lk.unmerge_adapter(model)


def test_unload_leaves_a_plain_model():
    model, ids = tied_model(["body"]), torch.arange(5)
    expected = model(ids)
    lk.merge_adapter(model, unload=True)
    assert type(model.body) is nn.Linear
    assert model.state_dict().keys() == Tied().state_dict().keys()
    torch.testing.assert_close(model(ids), expected)
    with pytest.raises(ValueError, match="no LoRALinear"):
        lk.merge_adapter(model)


def test_merge_adapter_is_all_or_nothing():
    model = tied_model(["body", "head"])
    model.head.lora_A.data[0, 0] = math.inf
    before = model.body.weight.clone()
    with pytest.raises(ValueError, match="the merged weight of head would not be finite; nothing was merged"):
        lk.merge_adapter(model, untie=True)
    assert torch.equal(model.body.weight, before)
    assert model.head.weight is model.embed.weight


# ------------------------------------------------------------------------------------------ life of a module


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(clone, merged):
    layer, x = make_layer(), torch.randn(3, K)
    base = layer.weight.clone()
    if merged:
        layer.merge(keep_base=True)
    twin = clone(layer)
    assert torch.equal(twin(x), layer(x))
    twin.lora_A.data.zero_()
    assert layer.lora_A.any()
    if merged:
        twin.unmerge()
        assert torch.equal(twin.weight, base)


def test_state_dict():
    layer, other, x = make_layer(), make_layer(), torch.randn(3, K)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_moves_with_to():
    layer = make_layer().to(BF16)
    assert layer.lora_A.dtype == BF16
    assert layer(torch.randn(2, K, dtype=BF16)).dtype == BF16
    assert make_layer(device="meta")(torch.randn(2, K, device="meta")).shape == (2, N)


def test_repr_says_what_it_is():
    assert repr(make_layer(dropout=0.1)) == (
        "LoRALinear(in_features=23, out_features=17, bias=True, r=5, alpha=12, dropout=0.1)"
    )


def test_compiles_without_recompiling():
    layer = make_layer(dropout=0.1)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    try:
        for step in range(3):
            compiled(torch.randn(6, K)).sum().backward()
            if step == 0:
                torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


# ---------------------------------------------------------------------------------------------- FrozenLinear


@pytest.fixture(params=[True, False], ids=["native", "no native"])
def native(request, monkeypatch):
    monkeypatch.setattr(cpu, "has_native_matmul", lambda dtype: request.param or dtype == FP32)
    return request.param


def frozen_linear(dtype) -> lk.FrozenLinear:
    layer = nn.Linear(K, N, dtype=dtype).requires_grad_(False)
    layer.__class__ = lk.FrozenLinear
    return layer


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_frozen_linear_is_nn_linear(dtype, native):
    layer, x = frozen_linear(dtype), torch.randn(9, K, dtype=dtype, requires_grad=True)
    results = []
    for module, inputs in ((layer, x), (F.linear, x), (F.linear, x.detach().double().requires_grad_())):
        weights = [p.to(inputs.dtype) for p in layer.parameters()]
        y = module(inputs) if module is layer else module(inputs, *weights)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for name, ours, unfused, exact in zip(("y", "dx"), *results):
        assert_as_accurate(ours, unfused, exact, name)
    served = sum(n for (op, _), n in lk.stats()["served"].items() if op == "frozen_linear")
    assert served == (dtype == BF16)
    schedule = lk.why("frozen_linear", x, layer.weight, layer.bias).schedule
    assert schedule == ("upcast" if dtype == BF16 and not native else "aten")


@pytest.mark.parametrize("prefers", [True, False])
def test_frozen_linear_in_fp32_takes_the_op_where_it_pays(prefers, onednn, monkeypatch):
    if not prefers:
        monkeypatch.setattr(_cpu_product, "_mode", "mkl")
    few_rows = Verdict("decode" if prefers else "aten", "as the test says")
    monkeypatch.setattr(_cpu_product, "choose_for_few_rows", lambda rows, weight: few_rows)
    layer = frozen_linear(FP32)

    def served(rows):
        lk.reset_stats()
        x = torch.randn(rows, K)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        return lk.stats()["served"] == {("frozen_linear", "cpu"): 1}

    few, many = cpu.FEW_ROWS, _cpu_product.FROM_ROWS
    assert [served(rows) for rows in (0, few, many - 1, many)] == [False, False, False, prefers]
    monkeypatch.setattr(cpu, "LARGE_WEIGHT", K * N)
    assert [served(rows) for rows in (few, few + 1)] == [prefers, False]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(many, K))
    assert lk.stats()["served"] == {}


class Marked(torch.Tensor):
    """A tensor with a life of its own, as a DTensor is."""


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_frozen_linear_leaves_to_torch_what_the_op_cannot_do(dtype, onednn, monkeypatch):
    monkeypatch.setattr(_cpu_product, "FROM_ROWS", 1)
    layer, x = frozen_linear(dtype), torch.randn(3, 9, K, dtype=dtype)

    def stock(x):
        return F.linear(x, layer.weight, layer.bias)

    expected = stock(x)
    assert torch.equal(torch.vmap(layer)(x), torch.vmap(stock)(x))
    for ours, theirs in zip(torch.func.jvp(layer, (x,), (x,)), torch.func.jvp(stock, (x,), (x,))):
        assert torch.equal(ours, theirs)
    marked = layer(x.as_subclass(Marked))
    assert type(marked) is Marked
    assert torch.equal(marked.as_subclass(torch.Tensor), expected)
    nested = layer(torch.nested.nested_tensor([x[0], x[1, :4]]))
    for ours, sample in zip(nested.unbind(), (x[0], x[1, :4])):
        torch.testing.assert_close(ours, stock(sample))
    with lk.use_backend("triton"):
        layer(x)
    assert lk.stats()["served"] == {}
    layer(x)
    assert lk.stats()["served"] == {("frozen_linear", "cpu"): 1}


def test_frozen_linear_that_is_unfrozen_trains(native):
    layer = frozen_linear(BF16)
    layer.bias.requires_grad_()
    layer(torch.randn(3, K, dtype=BF16)).sum().backward()
    assert layer.bias.grad.float().eq(3).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_result_may_be_changed_in_place(kind, leading, backend):
    if kind == "linear":
        layer, inputs = lk.LoRALinear.from_linear(nn.Linear(8, 6), r=2, alpha=4), torch.randn(*leading, 8)
    else:
        layer = lk.LoRAEmbedding.from_embedding(nn.Embedding(9, 6), r=2, alpha=4)
        inputs = torch.randint(0, 9, leading)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    residual = torch.randn(*leading, 6)
    results = []
    for in_place in (False, True):
        layer.zero_grad()
        with lk.use_backend(backend):
            y = layer(inputs)
            y = y.add_(residual) if in_place else y + residual
            y.square().sum().backward()
        results.append((y, layer.lora_A.grad, layer.lora_B.grad))
    for ours, expected in zip(*results):
        assert torch.equal(ours, expected)


def pruned(layer):
    prune.l1_unstructured(layer, "lora_B", amount=1)


def parametrized(layer):
    parametrize.register_parametrization(layer, "lora_A", nn.Tanh())


@pytest.mark.parametrize("change", [pruned, parametrized])
def test_parameters_that_became_attributes(change):
    torch.manual_seed(0)
    layer, x = lk.LoRALinear.from_linear(nn.Linear(6, 5), r=2, alpha=4), torch.randn(3, 6)
    nn.init.normal_(layer.lora_B)
    change(layer)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias) + 2 * x @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), expected)


def test_replica():
    layer, x = lk.LoRALinear.from_linear(nn.Linear(6, 5), r=2, alpha=4), torch.randn(3, 6)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach())
    torch.testing.assert_close(replica(x), layer(x))
