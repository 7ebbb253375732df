"""patch(packs=True) with dropout, compilers, generate, copies, verify; and taking packs apart."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import torch
from pack_models import block, fallbacks, llama, patched, served
from test_model_zoo import IDS, assert_same, outputs_and_gradients

import lora_kernels as lk
from lora_kernels.integrations.peft import packs as _packs


def test_dropout():
    stock = llama(lora_dropout=0.4)
    twin, _ = patched(stock)
    assert_same(twin, stock)
    twin.train()

    def loss(seed):
        torch.manual_seed(seed)
        return outputs_and_gradients(twin)

    first, again, other = loss(1), loss(1), loss(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["logits"], other["logits"])
    assert served()["lora_mlp"] == 3 * 4


def test_autocast():
    stock = llama()
    twin, _ = patched(stock)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(twin(IDS).logits, stock(IDS).logits, rtol=0.1, atol=0.05)
    assert served()["lora_mlp"] == 3
    assert fallbacks() == {}


def test_compiled():
    stock = llama()
    twin, _ = patched(stock)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(stock)
    twin.zero_grad()
    output = compiled(input_ids=IDS, labels=IDS)
    output.loss.backward()
    torch.testing.assert_close(output.logits.detach(), expected["logits"], rtol=1e-4, atol=1e-5)
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_generate():
    stock = llama()
    twin, _ = patched(stock)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(twin.generate(IDS, **options), stock.generate(IDS, **options))
    assert served()["lora_mlp"] == 15


def test_verify():
    twin, _ = patched(llama())
    found = lk.verify(twin)
    assert found.ok
    assert sum(check.op == "lora_mlp" for check in found.checks) == 3


def test_copies_and_pickles():
    stock = llama()
    twin, _ = patched(stock)
    twin(IDS)
    lk.reset_stats()
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert_same(other, stock)
        pack, place = _packs.of_layer(block(other).self_attn.k_proj)
        assert place == 1
        assert pack.layers[1] is block(other).self_attn.k_proj
        alone = copy.deepcopy(block(other).self_attn.k_proj, _packs.without_pack(block(other).self_attn.k_proj))
        assert _packs.of_layer(alone) is None
    assert served()["lora_mlp"] == 6


def test_copies_and_pickles_once_a_layer_is_gone():
    """As when tools put a layer's successor into ``_modules`` itself. Kills: a pack that is copied with its layers only
    while it has all of them.
    """
    twin, _ = patched(llama())
    attention = block(twin).self_attn
    attention._modules["k_proj"] = attention.k_proj.base_layer
    gc.collect()
    expected = twin(IDS).logits
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        pack, place = _packs.of_layer(block(other).self_attn.v_proj)
        assert pack.layers[1] is None
        assert pack.layers[place] is block(other).self_attn.v_proj
        assert torch.equal(other(IDS).logits, expected)


def test_a_model_is_freed_at_once():
    """Kills: a pack that holds its layers, which hold it."""
    gone = []
    for packs in (False, True):
        model = llama()
        lk.patch(model, packs=packs)
        outputs_and_gradients(model)
        layer = weakref.ref(block(model).self_attn.q_proj)
        gc.collect()
        gc.disable()
        del model
        gone.append(layer() is None)
        gc.enable()
    assert gone == [True, True]


def states(model):
    return [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]


def test_unpatch():
    stock = llama()
    twin, _ = patched(stock)
    lk.unpatch(twin)
    assert states(twin) == states(stock)
    lk.patch(twin, packs=True)
    report = lk.patch(twin)
    assert {what for _, what in report.fused} == {"lora_linear"}
    plain = copy.deepcopy(stock)
    lk.patch(plain)
    assert states(twin) == states(plain)
    twice = copy.deepcopy(stock)
    assert str(lk.patch(twice, packs=True)) == str(lk.patch(twice, packs=True))
    assert_same(twice, stock)
    assert served()["lora_mlp"] == 3
