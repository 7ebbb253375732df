"""A small PEFT model with one LoRA layer ``lin``, and what one call of the layer yields."""

import contextlib
import copy

import torch
from numerics import assert_as_accurate
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
K, N = 23, 18  # neither a power of two nor a multiple of 8


class Net(nn.Module):
    def __init__(self, bias=True, linear=nn.Linear):
        super().__init__()
        self.lin = linear(N, K) if linear is Conv1D else linear(K, N, bias=bias)
        self.out = nn.Linear(N, 3)

    def forward(self, x, **kwargs):
        return self.out(self.lin(x, **kwargs))


def make(dtype=FP32, net=None, autocast_adapter_dtype=True, **options):
    """A stock PEFT model with a LoRA layer ``lin`` whose B is not zero."""
    config = LoraConfig(**({"r": 5, "lora_alpha": 12, "target_modules": ["lin"]} | options))
    model = get_peft_model((net or Net()).to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(model)
    return model


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter)
        elif "lora_magnitude_vector" in name:  # starts as the norm, so that DoRA starts as the base layer
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)


def lin(model):
    return model.base_model.model.lin


def run(layer, x, **kwargs):
    """The output and every gradient of a layer call, by name."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = layer(x, **kwargs)
    results = {"y": y.detach()}
    if y.requires_grad:
        (y.float() if y.dtype != FP64 else y).square().sum().backward()
        results |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        if x.grad is not None:
            results["dx"] = x.grad
    return results


def second_adapter(model, **options):
    model.add_adapter("second", LoraConfig(**({"r": 3, "target_modules": ["lin"]} | options)))
    randomise(model)


def both_adapters(model, **options):
    second_adapter(model, **options)
    model.base_model.set_adapter(["default", "second"])


def assert_fused_and_accurate(stock, x, unfused=None, context=contextlib.nullcontext, op="lora_linear"):
    """One call of a patched layer is one call of ``op``, and as accurate as PEFT's own.

    ``unfused`` is the layer that sets the error bound: stock PEFT, or PEFT with its adapters in x's dtype."""
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    exact = run(lin(copy.deepcopy(stock).double()), x.detach().double().requires_grad_(x.requires_grad))
    with context():
        bound = run(lin(unfused or stock), x)
        ours = run(lin(patched), x)
    assert ours.keys() == bound.keys() == exact.keys()
    for name, value in ours.items():
        # A float32 gradient is judged by the bound of the 16-bit arithmetic that all of them come from.
        assert_as_accurate(value.to(bound[name].dtype), bound[name], exact[name], name)
    assert lk.stats()["fallback"] == {}
    assert sum(n for (served, _), n in lk.stats()["served"].items() if served == op) == 1
    return ours
