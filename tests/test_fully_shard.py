"""Patched models under FSDP2, which puts a class of its own in front of a module's: patch and unpatch find ours."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.peft_model import PeftModelForCausalLM
from peft.tuners.lora import Embedding, Linear, LoraModel
from tiny_models import tiny_llama
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import lora_kernels as lk
from lora_kernels.integrations.peft import linear as _peft_linear
from lora_kernels.integrations.peft import prompt_models as _peft_prompt
from lora_kernels.reasons import Reason

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def served(model):
    """(logits, ops that served the call)."""
    lk.reset_stats()
    logits = model(input_ids=TOKENS).logits
    return logits, {op for op, _ in lk.stats()["served"]}


def assert_sharded(module, kind):
    """``module`` is one of ``kind``, and FSDP2's."""
    assert isinstance(module, FSDPModule)
    assert type(module).__bases__ == (FSDPModule, kind)
    assert type(module).__name__ == f"FSDP{kind.__name__}"


@pytest.mark.parametrize(
    ("config", "op"), [(PromptTuningConfig, "prompt_embedding"), (PrefixTuningConfig, "prefix_kv")]
)
def test_a_prompt_model(mesh, config, op):
    model = get_peft_model(tiny_llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    expected, _ = served(model)
    report = lk.patch(model)
    fully_shard(model, mesh=mesh)
    assert_sharded(model, _peft_prompt.FusedCausalLM)
    logits, ops = served(model)
    assert op in ops
    torch.testing.assert_close(logits, expected)

    assert lk.patch(model).fused == report.fused
    for _ in range(2):  # without anything of ours, unpatch does nothing
        lk.unpatch(model)
        assert_sharded(model, PeftModelForCausalLM)
        logits, ops = served(model)
        assert not ops
        torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    grad = model.prompt_encoder["default"].embedding.weight.grad
    assert grad.full_tensor().any()


def test_layers_and_the_tuner(mesh):
    config = LoraConfig(target_modules=["embed_tokens", "q_proj", "lm_head"], task_type="CAUSAL_LM", r=4)
    model = get_peft_model(tiny_llama(tie_word_embeddings=False), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    expected, _ = served(model)
    lk.patch(model)
    llama = model.get_base_model()
    for module in (llama.model.embed_tokens, llama.lm_head, model.base_model):
        fully_shard(module, mesh=mesh)
    assert_sharded(llama.model.embed_tokens, _peft_linear.FusedEmbedding)
    assert_sharded(llama.lm_head, _peft_linear.FusedLinear)
    logits, ops = served(model)
    assert ops == {"lora_linear", "lora_embedding"}
    torch.testing.assert_close(logits, expected)

    # Between calls their weights are shards.
    assert {reason for _, reason in lk.patch(model).kept} == {Reason.DTENSOR}
    lk.unpatch(model)
    assert_sharded(llama.model.embed_tokens, Embedding)
    assert_sharded(llama.lm_head, Linear)
    assert_sharded(model.base_model, LoraModel)
    assert "_create_new_module" not in model.base_model.__dict__
    logits, ops = served(model)
    assert not ops
    torch.testing.assert_close(logits, expected)


def test_a_frozen_linear(mesh):
    linear = lk.FrozenLinear(6, 5)
    fully_shard(linear, mesh=mesh)
    lk.unpatch(linear)
    assert_sharded(linear, nn.Linear)


def test_a_subclass_that_somebody_wrote_is_left_alone():
    class Doubled(lk.FrozenLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Tagged(lk.FrozenLinear):
        kind = "tagged"

    for kind in (Doubled, Tagged):
        linear = kind(6, 5)
        lk.unpatch(linear)
        assert type(linear) is kind
