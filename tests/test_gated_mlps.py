"""Which modules lora_mlp serves: gated MLPs by what they do, not what only looks like one, or has become another."""

from __future__ import annotations

import copy

import pytest
import torch
from pack_models import fallbacks, fill, served
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.reasons import Reason


class Gated(nn.Module):
    """Stands in for a gated MLP; subclasses only look like one."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Swapped(Gated):
    def forward(self, x):
        return self.down(self.up(x) * nn.functional.gelu(self.gate(x), approximate="tanh"))


class Tanh(Gated):
    def forward(self, x):
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Residual(Gated):
    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x)) + x


class Detached(Gated):
    """Right in value, wrong in gradient."""

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)).detach() * self.up(x))


class Dropping(Gated):
    """Right in eval mode only."""

    def forward(self, x):
        return self.down(nn.functional.dropout(nn.functional.silu(self.gate(x)) * self.up(x), 0.3, self.training))


class Clamped(Gated):
    """Right for small values only."""

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x).clamp(max=7.0)) * self.up(x))


class Bounded(Gated):
    """Right but for what no model computes, one hopes; with a bound that released ones have."""

    def forward(self, x):
        return self.down((nn.functional.silu(self.gate(x)) * self.up(x)).clamp(-1e4, 1e4))


class DroppingChild(Gated):
    """The dropout is a module of its own, in eval mode when it is watched."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.down(self.dropout(nn.functional.silu(self.gate(x)) * self.up(x)))


class ClampedInSinglePrecision(Gated):
    def forward(self, x):
        h = nn.functional.silu(self.gate(x)) * self.up(x)
        return self.down(h.clamp(max=3.0) if h.dtype == torch.float32 else h)


class Twice(Gated):
    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x) + 0.0 * self.up(x))


def one_mlp(kind, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(kind()), LoraConfig(r=2, target_modules=["gate", "up", "down"], **options))
    fill(model)
    return model.eval()


EXAMPLE = {"input": torch.zeros(2, 8)}


@pytest.mark.parametrize("kind", [Gated, Swapped])
def test_an_mlp_of_ones_own(kind):
    stock = one_mlp(kind)
    twin = copy.deepcopy(stock)
    report = lk.patch(twin, packs=EXAMPLE)
    assert [what for _, what in report.fused] == ["lora_mlp"] * 3
    x = torch.randn(5, 8)
    torch.testing.assert_close(twin(x), stock(x))
    assert set(served()) == {"lora_mlp", "lora_pack", "gated_activation", "lora_linear"}


@pytest.mark.parametrize(
    "kind", [Tanh, Residual, Detached, Dropping, DroppingChild, Clamped, Bounded, ClampedInSinglePrecision, Twice]
)
def test_what_only_looks_like_one(kind):
    stock = one_mlp(kind)
    twin = copy.deepcopy(stock)
    report = lk.patch(twin, packs=EXAMPLE)
    if kind is not Twice:  # whose up is called twice: it reads x, but is in no pack
        assert report.apart == [("base_model.model.0", Reason.NOT_GATED)]
    x = torch.randn(5, 8)
    torch.testing.assert_close(twin(x), stock(x))
    assert "lora_mlp" not in served()


def test_parts_that_hold_tensors_make_it_another_module():
    model = one_mlp(Gated)
    model.base_model.model[0].register_buffer("scale", torch.ones(1))
    report = lk.patch(model, packs=EXAMPLE)
    assert [what for _, what in report.fused] == ["lora_pack", "lora_pack", "lora_linear"]
    assert report.apart == []


def test_an_activation_that_is_replaced_later():
    model = one_mlp(Gated)
    mlp = model.base_model.model[0]
    mlp.activation = nn.SiLU()
    lk.patch(model, packs=EXAMPLE)
    model(torch.randn(3, 8))
    assert served()["lora_mlp"] == 1
    mlp.activation = nn.ReLU()
    model(torch.randn(3, 8))
    assert served()["lora_mlp"] == 1
    assert fallbacks() == {("lora_mlp", Reason.NOT_GATED): 1}


class Configured(Gated):
    """By attributes: its activation, a factor, and the probability of a dropout."""

    def __init__(self):
        super().__init__()
        self.act, self.scale, self.dropout = nn.functional.silu, 1.0, nn.Dropout(0.0)

    def forward(self, hidden_states):
        return self.down(self.dropout(self.scale * self.act(self.gate(hidden_states)) * self.up(hidden_states)))


@pytest.mark.parametrize("what", ["act", "scale", "dropout"])
def test_attributes_that_change_later(what):
    model = one_mlp(Configured)
    lk.patch(model, packs={"input": torch.zeros(2, 8)})
    mlp, x = model.base_model.model[0], torch.randn(3, 8)
    for call in (lambda: mlp(x), lambda: mlp(hidden_states=x), lambda: copy.deepcopy(mlp)(x)):
        lk.reset_stats()
        call()
        assert served()["lora_mlp"] == 1
    if what == "dropout":
        mlp.dropout.p = 0.5
    else:
        setattr(mlp, what, {"act": nn.functional.relu, "scale": 3.0}[what])
    stock = copy.deepcopy(model)
    lk.unpatch(stock)
    torch.testing.assert_close(model(x), stock(x))
    assert fallbacks()["lora_mlp", Reason.NOT_GATED] == 1
    with pytest.raises(TypeError):
        mlp(x, x)
