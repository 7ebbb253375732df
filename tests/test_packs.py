"""patch(packs=True): which layers are served together, that they compute the same, and when they go their own way."""

from __future__ import annotations

import copy

import pytest
import torch
from pack_models import block, fallbacks, fill, llama, lora, patched, served
from peft import LoraConfig
from test_gated_mlps import EXAMPLE, Gated, one_mlp
from test_model_zoo import IDS, ZOO, assert_same, make_base
from tiny_models import tiny_llama
from torch import nn

import lora_kernels as lk
from lora_kernels.reasons import Reason

# family: packs and gated MLPs of its two blocks
FOUND = {
    "Llama": (2, 2), "Llama, biased": (2, 2), "Qwen2": (2, 2), "Qwen3": (2, 2), "Mistral": (2, 2), "Gemma": (2, 2),
    "Phi": (2, 0), "GPT2": (0, 0), "OPT": (2, 0), "BERT": (2, 0), "T5": (6, 0), "Mixtral": (2, 0),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("family", ZOO)
def test_every_family(family):
    stock = lora(make_base(*ZOO[family][:3]))
    twin, report = patched(stock)
    packs, mlps = FOUND[family]
    assert [what for _, what in report.fused].count("lora_mlp") == 3 * mlps
    assert report.apart == []
    assert_same(twin, stock)
    calls = served()
    assert calls.get("lora_mlp", 0) == mlps
    assert calls.get("lora_pack", 0) == packs + mlps  # gate and up are one, inside of the MLP
    assert Reason.PACK_APART not in {reason for _, reason in fallbacks()}


def test_the_report_names_them():
    _, report = patched(llama())
    assert str(report).splitlines() == [
        "21 of 21 LoRA layers fused",
        "  fused  9  lora_pack    base_model.model.model.layers.{0..2}.self_attn.{q_proj,k_proj,v_proj}",
        "  fused  3  lora_linear  base_model.model.model.layers.{0..2}.self_attn.o_proj",
        "  fused  9  lora_mlp     base_model.model.model.layers.{0..2}.mlp.{gate_proj,up_proj,down_proj}",
    ]


def test_some_layers_of_a_block():
    stock = llama(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    twin, report = patched(stock)
    assert {name.rpartition(".")[2] for name, what in report.fused if what == "lora_pack"} == {"q_proj", "v_proj"}
    assert_same(twin, stock)
    assert served()["lora_pack"] == 3
    assert "lora_mlp" not in served()


def test_x_that_is_changed_between_siblings():
    class Between(Gated):
        def forward(self, x):
            x = x.clone()
            gate = self.gate(x)
            x.mul_(2.0)
            return self.down(nn.functional.silu(gate) * self.up(x))

    stock = one_mlp(Between)
    twin = copy.deepcopy(stock)
    assert {what for _, what in lk.patch(twin, packs=EXAMPLE).fused} == {"lora_linear"}
    with torch.inference_mode():
        x = torch.randn(3, 8)
        torch.testing.assert_close(twin(x), stock(x))


class Twice(nn.Module):
    """Layers of one x, between whose calls something may happen."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 8), nn.Linear(24, 12)
        self.between = lambda: None

    def forward(self, x):
        y = self.first(x)
        self.between()
        return y, self.second(x)


@pytest.mark.parametrize("change", ["nothing", "weight", "disable", "scaling", "hook", "autocast", "grad mode"])
def test_a_sibling_that_has_changed_since(change):
    """Kills: results that are handed out by x alone."""
    model = lora(Twice())
    x = torch.randn(2, 24)
    lk.patch(model, packs={"x": x})
    inner = model.base_model.model
    layer, cast = inner.second, torch.autocast("cpu", torch.bfloat16)

    def between():
        if change == "weight":
            layer.lora_B["default"].weight.mul_(3.0)
        elif change == "disable":
            layer.enable_adapters(False)
        elif change == "scaling":
            layer.scaling["default"] = 7.0
        elif change == "hook":
            layer.lora_A["default"].register_forward_hook(lambda m, args, y: 2 * y)
        elif change == "autocast":
            cast.__enter__()
        elif change == "grad mode":
            torch.set_grad_enabled(True)

    inner.between = between
    lk.reset_stats()
    with torch.no_grad():
        _, y = model(x)
        is_wide = change != "autocast"
        assert y.dtype == (torch.float32 if is_wide else torch.bfloat16)
        lk.unpatch(model)
        torch.testing.assert_close(y, layer(x), rtol=1e-5 if is_wide else 1e-2, atol=1e-6 if is_wide else 1e-2)
        if change == "autocast":
            cast.__exit__(None, None, None)
    assert fallbacks().get(("lora_pack", Reason.PACK_APART), 0) == (change != "nothing")
    assert y.requires_grad == (change == "grad mode")


@pytest.mark.parametrize("change", ["hook", "disable", "merge", "lora_bias", "double", "other adapter", "no adapter"])
@pytest.mark.parametrize("place", ["first", "second"])
def test_one_layer_that_is_not_as_the_others(place, change):
    """Kills: layers that are served, without gradients, by what a glance at them shows."""
    model = lora(Twice())
    x = torch.randn(2, 24)
    lk.patch(model, packs={"x": x})
    layer = getattr(model.base_model.model, place)
    if change == "hook":
        layer.lora_B["default"].register_forward_hook(lambda m, args, y: 2 * y)
    elif change == "disable":
        layer.enable_adapters(False)
    elif change == "merge":
        layer.merge()
    elif change == "lora_bias":
        layer.lora_B["default"].bias = nn.Parameter(torch.randn(layer.out_features))
    elif change == "double":
        layer.lora_B["default"].double(), layer.lora_A["default"].double()
    else:
        model.add_adapter("other", LoraConfig(r=2, target_modules=[place], init_lora_weights=False))
        layer.set_adapter("other" if change == "other adapter" else ["other", "default"])
        if change == "no adapter":
            layer.delete_adapter("other"), layer.delete_adapter("default")
    with torch.no_grad():
        ours = [model(x) for _ in range(4)]
        lk.unpatch(model)
        torch.testing.assert_close(ours, [model(x)] * 4, rtol=1e-5, atol=1e-6)


def test_layers_outside_of_their_module():
    """Each computes its own: nobody could tell for how long to keep what the others give."""
    model, _ = patched(llama())
    attention, x = block(model).self_attn, torch.randn(2, 24)
    lk.reset_stats()
    ys = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert fallbacks() == {("lora_pack", Reason.PACK_OUTSIDE): 3}
    lk.unpatch(model)
    torch.testing.assert_close(ys, [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)])


def test_layers_that_are_called_from_elsewhere():
    """Layers whose module has no forward that runs, as those of a ModuleList, are served one by one."""

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(24, 8) for _ in range(3)])

        def forward(self, x):
            return [head(x) for head in self.heads]

    stock = lora(Many())
    twin, x = copy.deepcopy(stock), torch.randn(2, 24)
    report = lk.patch(twin, packs={"x": x})
    assert [what for _, what in report.fused] == ["lora_linear"] * 3
    assert report.apart == []
    torch.testing.assert_close(twin(x), stock(x))


def test_a_model_that_cannot_be_called_is_left_alone():
    model = one_mlp(Gated)
    for given in (True, {"nonsense": 1}):
        with pytest.raises(ValueError, match=r"packs=\{\.\.\.\}"):
            lk.patch(model, packs=given)
    assert not any(map(lk.is_fused, model.modules()))


def test_the_watching_is_not_noticed():
    model = llama(lora_dropout=0.5).train()
    block(model).eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    lk.reset_stats()
    lk.patch(model, packs=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert lk.stats() == {"served": {}, "fallback": {}}
    assert not any(module._forward_pre_hooks for module in model.modules())


# --------------------------------------------------------------------------------------- going one's own way


def shifted(module, args):
    return (args[0] + 1.0, *args[1:])


def test_a_layer_that_is_given_another_input():
    stock = llama()
    block(stock).self_attn.k_proj.register_forward_pre_hook(shifted)
    twin = copy.deepcopy(stock)
    lk.patch(twin, packs=True)
    assert_same(twin, stock)
    # k is in no pack: it was given another tensor when the model was watched, too.
    assert fallbacks() == {}
    late, _ = patched(llama())
    block(late).self_attn.k_proj.register_forward_pre_hook(shifted)
    lk.reset_stats()
    assert_same(late, stock)
    assert fallbacks()[("lora_pack", Reason.PACK_APART)] >= 1
    for _ in range(3):  # it does not pay to compute what nobody takes
        late(IDS)
    before = served()["lora_pack"]
    late(IDS)
    assert served()["lora_pack"] - before == 5, "packs of two blocks and three MLPs are left"


def test_hooks_of_a_layer_are_called():
    stock = llama()
    twin, _ = patched(stock)
    seen = []
    for model in (stock, twin):
        for name in ("gate_proj", "down_proj"):
            getattr(block(model).mlp, name).register_forward_hook(lambda m, args, y: seen.append(y.detach()) or 2 * y)
        block(model).self_attn.v_proj.register_forward_hook(lambda m, args, y: seen.append(y.detach()) or 3 * y)
    outputs = stock(IDS).logits, twin(IDS).logits
    torch.testing.assert_close(*outputs)
    assert len(seen) == 6
    assert fallbacks() == {("lora_mlp", Reason.ADAPTER_HOOKS): 1}


def test_adapters_that_are_disabled_merged_or_switched():
    stock = llama()
    stock.add_adapter("other", LoraConfig(r=5, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]))
    fill(stock)
    twin, _ = patched(stock)

    def same():
        torch.testing.assert_close(twin(IDS).logits, stock(IDS).logits)

    same()
    with twin.disable_adapter(), stock.disable_adapter():
        same()
    for model in (twin, stock):
        model.set_adapter("other")
    same()
    assert_same(twin, stock)
    for model in (twin, stock):
        model.base_model.set_adapter(["default", "other"])
    same()
    for model in (twin, stock):
        model.set_adapter("default")
        model.merge_adapter()
    same()
    for model in (twin, stock):
        model.unmerge_adapter()
    lk.reset_stats()
    assert_same(twin, stock)
    assert served()["lora_mlp"] == 3


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}], ids=str)
def test_variants(options):
    stock = llama(**options) if options != {"bias": "all"} else lora(make_base(*ZOO["Llama, biased"][:3]), **options)
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    twin, report = patched(stock)
    assert_same(twin, stock)
    if "use_dora" in options:
        assert {reason for _, reason in report.apart} == {Reason.PACK_DORA}
        assert fallbacks() == {("lora_mlp", Reason.PACK_DORA): 3}
    else:
        assert fallbacks() == {("lora_mlp", Reason.BIAS_REQUIRES_GRAD): len(stock.base_model.model.model.layers)}


def test_a_quantised_base():
    pytest.importorskip("bitsandbytes")
    base = tiny_llama().eval()
    lk.quantize_(base, "nf4", block=8)
    stock = lora(base, target_modules=["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"])
    report = lk.patch(stock, packs=True)
    assert {reason for _, reason in report.apart} == {Reason.PACK_QUANTIZED}
    stock(IDS)
    assert set(served()) == {"lora_linear_packed", "linear_packed"}


def test_adapter_names_and_routes():
    stock = llama()
    stock.add_adapter("other", LoraConfig(r=5, target_modules="all-linear"))
    fill(stock)
    twin, _ = patched(stock)
    names = ["other", "__base__"]
    torch.testing.assert_close(
        twin(IDS, adapter_names=names).logits, stock(IDS, adapter_names=names).logits, rtol=1e-4, atol=1e-5
    )
    lk.reset_stats()
    with lk.route_adapters(twin, names):
        routed = twin(IDS).logits
    torch.testing.assert_close(routed, stock(IDS, adapter_names=names).logits, rtol=1e-4, atol=1e-5)
    assert "lora_mlp" not in served()
    for _ in range(2):  # the route's hooks go with the first call after it
        twin(IDS)
    assert served()["lora_mlp"] == 3
