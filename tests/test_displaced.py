"""A weight or bias that is no parameter of its module is not absent: PEFT's own forward, which finds it, is used."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_layers import BF16, K, N, Net, lin, make, run
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import lora_kernels as lk
from lora_kernels.reasons import Reason

# ------------------------------------------------------------------------------- ways to put a parameter elsewhere


def _taken_out(module, name):
    parameter = getattr(module, name)
    delattr(module, name)
    return parameter.detach().clone()


def as_buffer(module, name):
    module.register_buffer(name, _taken_out(module, name))


def as_attribute(module, name):
    setattr(module, name, _taken_out(module, name))


def as_view(module, name):
    """As the wrappers that train slices of one flat parameter."""
    flat = _taken_out(module, name)
    module.flat = nn.Parameter(flat.flatten())
    setattr(module, name, module.flat.view_as(flat))


def as_property(module, name):
    value = _taken_out(module, name)
    module.__class__ = type(type(module).__name__, (type(module),), {name: property(lambda self: value)})


class _Doubled(nn.Module):
    def forward(self, value):
        return value * 2


def pruned(module, name):
    prune.random_unstructured(module, name, amount=0.5)


def pruned_without_its_hook(module, name):
    """What is left where somebody clears a module's hooks: the masked tensor as an attribute."""
    pruned(module, name)
    module._forward_pre_hooks.clear()


DISPLACED = {
    "buffer": (as_buffer, Reason.DISPLACED),
    "attribute": (as_attribute, Reason.DISPLACED),
    "view": (as_view, Reason.DISPLACED),
    "property": (as_property, None),
    "pruned": (pruned, Reason.ADAPTER_HOOKS),
    "pruned, no hook": (pruned_without_its_hook, Reason.DISPLACED),
    "weight_norm, old": (lambda m, name: weight_norm(m, name), Reason.ADAPTER_HOOKS),
    "spectral_norm, old": (lambda m, name: spectral_norm(m, name), Reason.ADAPTER_HOOKS),
    "weight_norm": (lambda m, name: parametrizations.weight_norm(m, name), Reason.PARAMETRIZED),
    "spectral_norm": (lambda m, name: parametrizations.spectral_norm(m, name), Reason.PARAMETRIZED),
    "parametrized": (lambda m, name: parametrize.register_parametrization(m, name, _Doubled()), Reason.PARAMETRIZED),
}
PLACES = {
    "base weight": ("base_layer", "weight"),
    "base bias": ("base_layer", "bias"),
    "lora_A weight": ("lora_A.default", "weight"),
    "lora_B weight": ("lora_B.default", "weight"),
    "lora_B bias": ("lora_B.default", "bias"),
}


def displace(model, kind, place):
    path, name = PLACES[place]
    torch.manual_seed(1)
    DISPLACED[kind][0](lin(model).get_submodule(path), name)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", DISPLACED)
def test_displaced_parameters_are_pefts_own(kind, place):
    """Dropping a bias, which is what is taken for absent, would change y by what ``nonzero`` sees."""
    stock = make(lora_bias=True)
    for bias in (lin(stock).base_layer.bias, lin(stock).lora_B.default.bias):
        nn.init.uniform_(bias, 1, 2)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(6, K, requires_grad=True)
    plain = lin(stock)(x).detach()
    for model in (stock, patched):
        displace(model, kind, place)
    expected, ours = run(lin(stock), x), run(lin(patched), x)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    changes_values = kind not in ("buffer", "attribute", "view", "property")
    assert changes_values or torch.equal(expected["y"], plain)
    reason = DISPLACED[kind][1] or (Reason.BASE_LAYER if "base" in place else Reason.ADAPTER_MODULES)
    if reason == Reason.ADAPTER_HOOKS and "base" in place:
        reason = Reason.DISPLACED  # the base's hooks are looked at after its parameters
    assert lk.stats() == {"served": {}, "fallback": {("lora_linear", str(reason)): 1}}
    assert ("base_model.model.lin", reason) in lk.patch(patched).kept


@pytest.mark.parametrize("place", ["base bias", "lora_B bias"])
def test_displaced_bias_in_a_compiled_layer(place):
    stock = make(lora_bias=True)
    nn.init.uniform_(lin(stock).lora_B.default.bias, 1, 2)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    displace(patched, "buffer", place)
    x = torch.randn(6, K)
    torch.compiler.reset()
    compiled = torch.compile(lin(patched), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), lin(stock)(x))


@pytest.mark.parametrize("place", ["base bias", "lora_B bias"])
def test_displaced_bias_in_a_mixed_batch(place):
    stock = make(lora_bias=True).eval()
    nn.init.uniform_(lin(stock).lora_B.default.bias, 1, 2)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    displace(patched, "buffer", place)
    x, names = torch.randn(3, K), ["default", "__base__", "default"]
    torch.testing.assert_close(lin(patched)(x, adapter_names=names), lin(stock)(x, adapter_names=names))


@pytest.mark.parametrize("kind", ["buffer", "attribute", "view", "pruned, no hook"])
def test_displaced_magnitude(kind):
    stock = make(use_dora=True)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(6, K)
    for model in (stock, patched):
        torch.manual_seed(1)
        DISPLACED[kind][0](lin(model).lora_magnitude_vector["default"], "weight")
    assert torch.equal(lin(patched)(x), lin(stock)(x))
    assert lk.stats() == {"served": {}, "fallback": {("lora_linear", str(Reason.DISPLACED)): 1}}


@pytest.mark.parametrize("where", ["base weight", "lora_A", "lora_B"])
def test_displaced_embedding(where):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, ids):
            return self.embed(ids)

    stock = get_peft_model(Words(), LoraConfig(r=2, target_modules=["embed"], init_lora_weights=False))
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    ids = torch.arange(9)
    expected, embed = stock(ids), patched.base_model.model.embed
    if where == "base weight":
        as_buffer(embed.base_layer, "weight")
    else:
        container = getattr(embed, where.replace("lora", "lora_embedding"))
        value = container._parameters.pop("default").detach()
        container.__dict__["default"] = value  # ParameterDict reads its entries as attributes
    assert torch.equal(patched(ids), expected)
    assert lk.stats() == {"served": {}, "fallback": {("lora_embedding", str(Reason.DISPLACED)): 1}}


# ---------------------------------------------------------------------------------------- linears without an adapter


@pytest.mark.parametrize("place", ["weight", "bias"])
@pytest.mark.parametrize("kind", DISPLACED)
def test_patching_frozen_linears_leaves_displaced_ones_to_torch(kind, place, monkeypatch):
    monkeypatch.setattr("lora_kernels.support.cpu.has_native_matmul", lambda dtype: dtype == torch.float32)
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, N)).to(BF16).requires_grad_(False)
    torch.manual_seed(1)
    DISPLACED[kind][0](model.eval()[0], place)  # a spectral norm changes in every call that trains
    x = torch.randn(6, K, dtype=BF16)
    expected = model(x)
    report = lk.patch(model, frozen_linears=True)
    assert [name for name, _ in report.fused] == ["1"]
    assert type(model[0]) is not lk.FrozenLinear
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("place", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["buffer", "pruned", "view"])
def test_a_frozen_linear_whose_parameter_moves_later(kind, place, monkeypatch):
    """The layer asks for the attribute; gradients of what it comes from are torch's."""
    monkeypatch.setattr("lora_kernels.support.cpu.has_native_matmul", lambda dtype: dtype == torch.float32)
    plain = nn.Linear(K, N).to(BF16).requires_grad_(False)
    frozen = copy.deepcopy(plain)
    lk.patch(frozen, frozen_linears=True)
    assert type(frozen) is lk.FrozenLinear
    for layer in (plain, frozen):
        torch.manual_seed(1)
        DISPLACED[kind][0](layer, place)
    results = []
    for layer in (plain, frozen):
        y = layer(torch.ones(6, K, dtype=BF16))
        results.append(y.detach())
        if y.requires_grad:
            y.float().sum().backward()
            results.append(next(p.grad for p in layer.parameters() if p.grad is not None))
    half = len(results) // 2
    for theirs, ours in zip(results[:half], results[half:]):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------- our own layers

MERGES = {
    "layer": (lambda model: model[0].merge(), "merge: {}"),
    "model": (lk.merge_adapter, "merge_adapter: 0: {}"),
}


@pytest.mark.parametrize(("merge", "message"), MERGES.values(), ids=MERGES.keys())
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("kind", ["buffer", "view", "pruned", "weight_norm, old"])
def test_merging_what_is_elsewhere_is_refused(kind, name, merge, message):
    """What is written to the attribute would be made anew by the next call, or is not what that call uses."""
    model = nn.Sequential(lk.LoRALinear(K, N, r=3, alpha=6))
    nn.init.normal_(model[0].lora_B)
    DISPLACED[kind][0](model[0], name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message.format(f"{name} is not a parameter of its module")):
        merge(model)
    assert not model[0].merged
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merging_a_parametrized_adapter():
    layer, x = lk.LoRALinear(K, N, r=3, alpha=6), torch.randn(4, K)
    nn.init.normal_(layer.lora_B)
    parametrize.register_parametrization(layer, "lora_B", _Doubled())
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer = lk.LoRALinear(K, N, r=3, alpha=6)
    parametrize.register_parametrization(layer, "weight", _Doubled())
    with pytest.raises(ValueError, match="merge: weight is not a parameter of its module"):
        layer.merge()


@pytest.mark.parametrize("kind", ["buffer", "pruned", "weight_norm, old", "spectral_norm, old"])
def test_our_layer_reads_what_is_elsewhere(kind):
    layer, x = lk.LoRALinear(K, N, r=3, alpha=6), torch.randn(4, K)
    nn.init.normal_(layer.lora_B)
    for name in ("weight", "bias", "lora_A", "lora_B"):
        DISPLACED[kind][0](layer.eval(), name)
    layer(x)  # pruning and norms write the attribute in a hook
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    expected = expected + nn.functional.linear(nn.functional.linear(x, layer.lora_A), layer.lora_B) * layer.scaling
    torch.testing.assert_close(layer(x), expected)


def test_from_peft_refuses_what_it_cannot_share():
    for place, (path, name) in PLACES.items():
        model = make(net=Net())
        if place == "lora_B bias":
            lin(model).lora_B.default.bias = nn.Parameter(torch.ones(N))
        as_buffer(lin(model).get_submodule(path), name)
        with pytest.raises(ValueError, match=f"not plain LoRA on a plain nn.Linear: {Reason.DISPLACED}"):
            lk.LoRALinear.from_peft(lin(model))
