"""Models with adapters that tests save and load, and what they compute."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_llama
from torch import nn

import lora_kernels as lk

IDS = torch.arange(14).view(2, 7)
TARGETS = ["q_proj", "down_proj"]


def twin(model):
    """Another model with the weights of ``model``."""
    other = tiny_llama().eval()
    other.load_state_dict(model.state_dict())
    return other


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def injected(model, **options):
    lk.inject(model, **({"r": 4, "alpha": 6, "target_modules": TARGETS} | options))
    return randomise(model)


def with_peft(model, **options):
    return randomise(
        get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options)))
    ).eval()


MAKERS = {"injected": injected, "peft": with_peft}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def as_peft_reads(base, directory):
    """What PEFT computes with the files in ``directory``."""
    return logits(PeftModel.from_pretrained(twin(base), directory).eval())


def snapshot(model):
    return {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now.keys() == before.keys()
    for name, (identity, value, requires_grad) in before.items():
        assert now[name][0] == identity, name
        assert value.is_meta or torch.equal(now[name][1], value), name
        assert now[name][2] == requires_grad, name
