"""A swapped class goes by the name of the one that it replaces: PEFT asks layers for it."""

import ast
import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny_models import tiny_llama
from torch import nn
from transformers import PreTrainedModel

import lora_kernels as lk
from lora_kernels import class_swaps
from lora_kernels.integrations.peft import linear as _peft_linear
from lora_kernels.integrations.peft import prompt_models as _peft_prompt
from lora_kernels.reasons import Reason

IDS = torch.arange(14).view(2, 7)
WITH_PARAMETERS = {
    "target_modules": ["q_proj", "embed_tokens"],
    "target_parameters": ["mlp.up_proj.weight", "lm_head.weight"],
}
SWAPS = _peft_linear.SWAPS | _peft_prompt.FUSED | {nn.Linear: lk.FrozenLinear}


def make(**options) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama().eval(), LoraConfig(r=4, init_lora_weights=False, **options))


def patched_twin(stock: nn.Module) -> nn.Module:
    twin = copy.deepcopy(stock)
    lk.patch(twin)
    return twin


@pytest.mark.parametrize("theirs", SWAPS, ids=lambda kind: kind.__name__)
def test_names(theirs):
    ours = SWAPS[theirs]
    assert ours is not theirs
    assert issubclass(ours, theirs)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_person_sees_no_difference_and_asks_is_fused():
    stock = make(**WITH_PARAMETERS)
    patched = patched_twin(stock)
    assert repr(patched) == repr(stock)
    assert patched.get_layer_status() == stock.get_layer_status()
    assert patched.get_model_status() == stock.get_model_status()
    fused = [name for name, module in patched.named_modules() if lk.is_fused(module)]
    assert len(fused) == 3 + 1 + 3 + 1
    assert not any(map(lk.is_fused, stock.modules()))
    assert lk.is_fused(lk.LoRALinear(4, 4, r=2, alpha=2))


def test_no_code_of_peft_compares_the_exact_type_of_a_class_that_is_swapped():
    """Names can be kept, identity cannot: should PEFT begin to ask for it, this test finds where."""
    swapped = {theirs.__name__ for theirs in _peft_linear.SWAPS | _peft_prompt.FUSED}
    found = []
    for file in Path(peft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            asks_type = any(
                (isinstance(side, ast.Call) and getattr(side.func, "id", "") == "type")
                or (isinstance(side, ast.Attribute) and side.attr == "__class__")
                for side in sides
            )
            names = {getattr(leaf, "id", getattr(leaf, "attr", "")) for side in sides for leaf in ast.walk(side)}
            if asks_type and names & swapped:
                found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    # GLoRA asks base layers, which `frozen_linears` swaps, too: it refuses a model that was patched before.
    assert [place for place in found if not place.startswith("model.py:")] == []
    assert all("target_base_layer" in place for place in found)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_every_kind(clone):
    model = make(**WITH_PARAMETERS)
    lk.patch(model, frozen_linears=True)
    linear = nn.Linear(3, 2)
    linear.__class__ = lk.FrozenLinear
    twin = clone(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert type(clone(linear)) is lk.FrozenLinear
    lk.unpatch(twin)
    assert not any(map(lk.is_fused, twin.modules()))


def test_a_subclass_of_ours_is_pickled_as_itself():
    layer = Subclass(3, 2)
    assert type(pickle.loads(pickle.dumps(layer))) is Subclass
    assert class_swaps.swapped_in(layer) is None, "a subclass that somebody wrote is theirs"


class Subclass(lk.FrozenLinear):
    pass


# ------------------------------------------------------------------------------- what PEFT does by the class's name


@pytest.mark.parametrize("patch_when", ["before", "after"])
def test_target_parameters_live_on(patch_when, tmp_path):
    """Adding, switching, generating, merging, deleting, saving and unloading: each looks for "ParamWrapper"."""
    models = [make(**WITH_PARAMETERS), make(**WITH_PARAMETERS)]
    stock, patched = models
    if patch_when == "before":
        lk.patch(patched)
    for model in models:
        torch.manual_seed(1)
        model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, **WITH_PARAMETERS))
    if patch_when == "after":
        lk.patch(patched)
    for adapter in ("second", "default"):
        for model in models:
            model.set_adapter(adapter)
        torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)
    for model in models:
        model.generation_config.eos_token_id = None
    tokens = [m.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in models]
    assert torch.equal(*tokens)
    for model in models:
        model.merge_adapter()
    torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)
    for model in models:
        model.unmerge_adapter()
        model.delete_adapter("second")
        model.save_pretrained(tmp_path / "adapter")
        model.load_adapter(tmp_path / "adapter", "loaded")
    torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)
    merged, expected = patched.merge_and_unload(), stock.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits)
    assert [type(m) for m in merged.modules()] == [type(m) for m in expected.modules()]


def test_adapters_on_a_frozen_linear_of_ours():
    """PEFT goes by the class of the base layer, too."""
    net = nn.Sequential(nn.Linear(6, 5).requires_grad_(False))
    net[0].__class__ = lk.FrozenLinear
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
    assert type(model.base_model.model[0]) is LoraLinear
    lk.patch(model)
    model(torch.randn(2, 6))
    assert lk.stats()["fallback"] == {}


# -------------------------------------------------------------------------------------- layers that are not swapped


def test_calls_of_layers_that_are_not_swapped_are_counted():
    model = get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"]))
    report = lk.patch(model)
    assert {reason for _, reason in report.kept} == {f"{Reason.LAYER_TYPE}: Linear"}
    lk.patch(model)
    model(IDS)
    assert lk.stats() == {"served": {}, "fallback": {("lora_linear", Reason.LAYER_TYPE): 3}}, "once a call"
    lk.unpatch(model)
    lk.reset_stats()
    model(IDS)
    assert lk.stats()["fallback"] == {}
