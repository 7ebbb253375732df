"""patch(packs=True) under activation checkpointing and in threads: results wait no longer than their module's call."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from pack_models import fallbacks, llama, lora, patched, served
from test_model_zoo import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

ROWS, K = 333, 24
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


class Projections(nn.Module):
    """q, k and v of one x, called as ``way`` says. All of it is linear, so y = J x with x's gradient Jᵀ grad_y."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n, bias=False) for n in (20, 12, 28))
        self.way = each

    def forward(self, x):
        return self.way(self, x)


def each(self, x):
    return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def some(self, x):
    return torch.cat([self.q(x), self.v(x)], -1)


def late(self, x):
    return torch.cat([self.v(x), self.q(x), self.k(x)], -1)


def again(self, x):
    return torch.cat([self.q(x), self.k(x), self.q(2.0 * x), self.v(x)], -1)


WAYS = pytest.mark.parametrize("way", [each, some, late, again])


def projections(p=0.0):
    torch.manual_seed(0)
    model = lora(Projections(), lora_dropout=p).train()
    assert {what for _, what in lk.patch(model, packs={"x": torch.zeros(2, K)}).fused} == {"lora_pack"}
    return model, model.base_model.model


def assert_linear(run):
    """That backward has the masks of the forward. Two forwards are under way at a time."""
    xs = [torch.randn(ROWS, K, requires_grad=True) for _ in range(2)]
    losses = [(y * torch.randn_like(y)).sum() for y in map(run, xs)]
    for x, loss in zip(xs, losses):
        loss.backward()
        torch.testing.assert_close((x.grad * x).sum(), loss, rtol=1e-3, atol=1e-2)


def living():
    gc.collect()
    return sum(type(t) is torch.Tensor and t.shape[:1] == (ROWS,) for t in gc.get_objects())


@pytest.fixture
def kept():
    """How many results live, beside what other tests of the process have left."""
    gc.collect()
    gc.freeze()  # and is not looked through again
    yield living
    gc.unfreeze()


@REENTRANT
def test_whole_layers(reentrant):
    stock = llama().train()
    twin, _ = patched(stock)
    for model in (stock, twin):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(twin, stock)
    assert served()["lora_mlp"] == 6
    assert fallbacks() == {}


@WAYS
@REENTRANT
def test_a_module(reentrant, way, kept):
    """Kills: a pack that pauses, or tries again, between the first run of a forward and the second."""
    model, layers = projections(p=0.5)
    layers.way = way
    for _ in range(20):  # more than a pack pauses for
        assert_linear(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert served()["lora_pack"] > 0
    assert kept() == 0


@WAYS
@REENTRANT
@pytest.mark.parametrize("before", [True, False])
def test_a_part_of_a_module(before, reentrant, way, kept):
    """Kills: results that wait for the pack's next call, and a second run that goes by layers where the first did not.

    before: whether the part follows a call of the same layer that is not in it.
    """
    model, layers = projections(p=0.5)

    def with_part(self, x):
        part = checkpoint(lambda x: way(self, x), x, use_reentrant=reentrant)
        return torch.cat([self.q(x), part], -1) if before else part

    layers.way = with_part
    for _ in range(4):
        assert_linear(model)
        assert kept() == 0


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept(grad, kept):
    """Of a forward that takes only some of what is computed, of one that raises, and of one outside of its module."""
    model, layers = projections()
    x = torch.randn(ROWS + 1, K)[:ROWS]

    def raises(self, x):
        raise RuntimeError(f"after {self.q(x).shape}")

    with torch.set_grad_enabled(grad):
        for way in (some, late):
            layers.way = way
            model(x)
            assert kept() == 1, "x itself"
        layers.way = raises
        with pytest.raises(RuntimeError, match="after"):
            model(x)
        assert kept() == 1
        each(layers, x)
        assert kept() == 1


def test_threads():
    """Kills: one place for what waits, of all threads, which take each other's turns and make the pack pause."""
    model, layers = projections()
    turns = threading.Barrier(4, timeout=60)

    def in_turn(self, x):
        q = self.q(x)
        turns.wait()
        k = self.k(x)
        turns.wait()
        return torch.cat([q, k, self.v(x)], -1)

    layers.way = in_turn
    lk.reset_stats()
    stock = copy.deepcopy(model)
    lk.unpatch(stock)
    stock.base_model.model.way = each
    wrong = []

    def work(seed):
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(seed))
        for _ in range(8):
            wrong.append(float((model(x) - stock(x)).abs().max().detach()) > 1e-5)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == [False] * 32
    assert fallbacks() == {}
    assert served()["lora_pack"] == 32


# ----------------------------------------------------------------------------------------------- PEFT takes over


def our_classes(model):
    return [name for name, m in model.named_modules() if any("lora_kernels" in c.__module__ for c in type(m).__mro__)]


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_adapters_that_are_unloaded(how):
    """Kills: a module that keeps our class when its layers are PEFT's no more."""
    stock = llama()
    twin, _ = patched(stock)
    ids = torch.tensor([[1, 5, 3, 7]])
    assert our_classes(twin)
    layers = [m for m in twin.modules() if lk.is_fused(m)]  # whoever holds a layer keeps nothing else
    ours, theirs = getattr(twin, how)(), getattr(stock, how)()
    assert len(layers) == 3 * (4 + 3 + 1), "an attention's own forward is no op"
    assert our_classes(ours) == []
    assert [(n, type(m), sorted(m.__dict__)) for n, m in ours.named_modules()] == [
        (n, type(m), sorted(m.__dict__)) for n, m in theirs.named_modules()
    ]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    pickle.dumps(ours)


def test_a_last_adapter_that_is_deleted():
    stock = llama()
    twin, _ = patched(stock)
    ids = torch.tensor([[1, 5, 3, 7]])
    for model in (twin, stock):
        model.delete_adapter("default")
    torch.testing.assert_close(twin.base_model(ids).logits, stock.base_model(ids).logits)
    torch.testing.assert_close(twin.unload()(ids).logits, stock.unload()(ids).logits)
    assert our_classes(twin) == []


def test_one_layer_that_is_replaced():
    stock = llama()
    twin, _ = patched(stock)
    for model in (twin, stock):
        attention = model.base_model.model.model.layers[0].self_attn
        attention.k_proj = attention.k_proj.get_base_layer()
    assert_same(twin, stock)
    assert type(twin.base_model.model.model.layers[0].self_attn) is type(attention)
    assert type(twin.base_model.model.model.layers[1].self_attn) is not type(attention)
