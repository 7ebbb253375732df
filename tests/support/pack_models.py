"""Models with packs, and what served them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from torch import nn

import lora_kernels as lk


def lora(base, **options):
    model = get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | options)))
    fill(model)
    return model.eval()


def fill(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def llama(**options):
    torch.manual_seed(0)
    return lora(tiny_llama().eval(), **options)


def patched(stock, **options):
    twin = copy.deepcopy(stock)
    return twin, lk.patch(twin, packs=True, **options)


def served():
    found = {}
    for (op, _), calls in lk.stats()["served"].items():
        found[op] = found.get(op, 0) + calls
    return found


def fallbacks():
    return lk.stats()["fallback"]


def block(model):
    return model.base_model.model.model.layers[0]
