"""A small PEFT model with one LoRA layer ``lin``, and what one call of the layer yields."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

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
        if "lora_B" in name:
            nn.init.normal_(parameter)


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


def second_adapter(model):
    model.add_adapter("second", LoraConfig(r=3, target_modules=["lin"]))
    randomise(model)


def both_adapters(model):
    second_adapter(model)
    model.base_model.set_adapter(["default", "second"])
