"""Fused layers under DeepSpeed's ZeRO-3: what they read is made whole around them, or their parts are called.

Here a stand-in cuts the parameters; ``test_distributed.py`` runs DeepSpeed itself.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from zero3_stub import Status, Zero3, make_whole

import lora_kernels as lk
from lora_kernels.reasons import Reason
from lora_kernels.report import FUSED_GATHERED

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
LAYERS = 21
HOOKS = {("lora_linear", Reason.ADAPTER_HOOKS): 1}


def make(**options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(tiny_llama(), config)


def q_proj(model):
    return model.base_model.model.model.layers[1].self_attn.q_proj


def train(model):
    """The loss of a step, and its gradients."""
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def test_parameters_are_whole_where_layers_read_them(monkeypatch):
    stock = make()
    model = copy.deepcopy(stock)
    lk.patch(model)
    zero3 = Zero3(model, monkeypatch)
    for _ in range(2):  # in the first step layers name what they read, in the second the hooks gather it
        torch.testing.assert_close(train(model), train(stock))
        zero3.release()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, stock(input_ids=TOKENS).logits)
    assert {p.ds_status for p in model.parameters()} == {Status.NOT_AVAILABLE}
    assert lk.stats()["fallback"] == {}
    assert lk.stats()["served"]["lora_linear", "cpu"] == 3 * LAYERS


def test_nothing_that_was_gathered_is_kept_for_backward(monkeypatch):
    """Kills: saving another tensor than the parameter, such as a view of it."""
    model = make()
    lk.patch(model)
    Zero3(model, monkeypatch)
    model(input_ids=TOKENS)
    gathered = []
    q_proj(model).register_forward_pre_hook(
        lambda layer, args: gathered.extend(StorageWeakRef(p.untyped_storage()) for p in layer.parameters())
    )
    lk.reset_stats()
    y = q_proj(model)(torch.randn(3, 24, requires_grad=True))
    assert lk.stats()["served"] == {("lora_linear", "cpu"): 1}
    assert [storage.expired() for storage in gathered] == [True] * 3
    assert y.requires_grad


def test_another_adapter_is_gathered_once_it_is_active(monkeypatch):
    stock = make()
    stock.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = copy.deepcopy(stock)
    lk.patch(model)
    zero3 = Zero3(model, monkeypatch)
    model(input_ids=TOKENS)
    others = q_proj(model).lora_A["other"].weight, q_proj(model).lora_B["other"].weight
    assert not {id(p) for p in others} & q_proj(model)._external_params.keys()
    for each in (model, stock):
        each.base_model.set_adapter(["default", "other"])
    lk.reset_stats()
    torch.testing.assert_close(train(model), train(stock))
    zero3.release()
    assert {id(p) for p in others} < q_proj(model)._external_params.keys()
    assert lk.stats()["fallback"] == {}


def test_dora(monkeypatch):
    stock = make(use_dora=True)
    model = copy.deepcopy(stock)
    lk.patch(model)
    Zero3(model, monkeypatch)
    torch.testing.assert_close(train(model), train(stock))
    assert lk.stats()["fallback"] == {}


def hook_of_another(model):
    q_proj(model).lora_A["default"].register_forward_hook(lambda module, args, out: out * 2)


def backward_hook_of_another(model):
    q_proj(model).base_layer.register_full_backward_hook(lambda module, gx, gy: (gx[0] * 2,))


def on_its_way(model):
    if hasattr(q_proj(model).lora_B["default"].weight, "ds_status"):
        q_proj(model).lora_B["default"].weight.ds_status = Status.INFLIGHT


def never_cut(model):
    torch.manual_seed(1)
    q_proj(model).lora_A["default"].weight = nn.Parameter(torch.randn(4, 24))


@pytest.mark.parametrize("change", [hook_of_another, backward_hook_of_another, on_its_way, never_cut])
def test_layers_whose_parts_are_called(change, monkeypatch):
    stock = make()
    model = copy.deepcopy(stock)
    lk.patch(model)
    zero3 = Zero3(model, monkeypatch)
    for each in (model, stock):
        change(each)
    torch.testing.assert_close(train(model), train(stock))
    assert lk.stats()["fallback"] == HOOKS
    assert lk.stats()["served"]["lora_linear", "cpu"] == LAYERS - 1
    zero3.release()
    train(model)
    still = 0 if change is on_its_way else 1
    assert lk.stats()["fallback"] == {("lora_linear", Reason.ADAPTER_HOOKS): 1 + still}


def test_a_forward_that_no_hook_surrounds(monkeypatch):
    """The parts' own hooks gather for each of them."""
    stock, x = make(), torch.randn(3, 24)
    model = copy.deepcopy(stock)
    lk.patch(model)
    Zero3(model, monkeypatch)
    torch.testing.assert_close(q_proj(model).forward(x), q_proj(stock)(x))
    assert lk.stats() == {"served": {}, "fallback": HOOKS}


def test_packs_and_a_loss_leave_it_to_the_layers(monkeypatch):
    """Kills: reading a sibling's weights before DeepSpeed has gathered them."""
    stock = make()
    model = copy.deepcopy(stock)
    lk.patch(model, packs=True, loss=True)
    zero3 = Zero3(model, monkeypatch)
    for _ in range(2):
        torch.testing.assert_close(train(model), train(stock))
        zero3.release()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=TOKENS).logits, stock(input_ids=TOKENS).logits)
    stats = lk.stats()
    assert stats["served"]["lora_linear", "cpu"] == 4 * LAYERS
    assert not {"lora_pack", "lora_mlp", "linear_cross_entropy"} & {op for op, _ in stats["served"]}
    assert stats["fallback"]["lora_pack", Reason.ADAPTER_HOOKS] > 0
    assert stats["fallback"]["lora_mlp", Reason.ADAPTER_HOOKS] > 0
    assert stats["fallback"]["linear_cross_entropy", Reason.ADAPTER_HOOKS] == 2


def test_what_is_whole_by_chance_is_not_read(monkeypatch):
    """Kills: asking only whether parameters are whole: those of others, gathered ahead, may be gone in backward."""
    stock = make()
    model = copy.deepcopy(stock)
    lk.patch(model, packs=True)
    Zero3(model, monkeypatch)
    for parameter in model.parameters():
        make_whole(parameter)
    torch.testing.assert_close(train(model), train(stock))
    assert {op for op, _ in lk.stats()["served"]} == {"lora_linear", "lora_linear_backward"}


def test_a_model_that_is_patched_under_zero3(monkeypatch):
    stock = make()
    model = copy.deepcopy(stock)
    Zero3(model, monkeypatch)
    report = lk.patch(model, packs=True)
    assert {what for _, what in report.fused} == {FUSED_GATHERED}
    assert (len(report.fused), report.kept) == (LAYERS, [])
    assert {why for _, why in report.apart} == {Reason.ADAPTER_HOOKS}
    torch.testing.assert_close(train(model), train(stock))
    assert lk.stats()["served"]["lora_linear", "cpu"] == LAYERS


def test_a_hook_in_another_wrapper_is_somebody_elses(monkeypatch):
    """Of a DeepSpeed that wraps its hooks in another way: PEFT's forward, and no error."""
    model = make()
    lk.patch(model)
    Zero3(model, monkeypatch)
    name, other = "of the range", print

    def wrapped(*args):
        return None if (name, other) else args

    def bare(*args):
        return None

    for hook in (wrapped, bare):
        hook.__module__ = "deepspeed.utils.nvtx"
        handle = q_proj(model).base_layer.register_forward_hook(hook)
        lk.reset_stats()
        q_proj(model)(torch.randn(3, 24))
        assert lk.stats()["fallback"] == HOOKS
        handle.remove()
