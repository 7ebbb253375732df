"""Two gloo processes run the example that the documentation recommends; they must reach the losses of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WRAPPERS = {
    "ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM", "accelerate": "DistributedDataParallel",
}  # fmt: skip


def launch(*options):
    command = [*TORCHRUN, str(EXAMPLES / "distributed.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def losses(lines, name):
    return [float(v) for line in lines if line.startswith(name) for v in line.removeprefix(name).split()]


def test_two_processes_have_the_losses_of_one(tmp_path):
    lines = launch("--steps", "4", "--out", str(tmp_path))
    expected = losses(lines, "one process")
    assert expected[-1] < expected[0] - 0.05, "nothing was learned"
    for strategy, wrapper in WRAPPERS.items():
        assert losses(lines, strategy) == pytest.approx(expected, rel=1e-5)
        assert any(f"{wrapper}, 2 processes, 56 fused calls in this one, fallbacks {{}}" in line for line in lines)

    weights = [load_file(tmp_path / strategy / "adapter_model.safetensors") for strategy in WRAPPERS]
    for name, value in weights[0].items():
        for other in weights[1:]:
            assert other.keys() == weights[0].keys()
            torch.testing.assert_close(other[name], value)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = PeftModel.from_pretrained(LlamaForCausalLM(config), tmp_path / "fsdp2")
    assert model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.any()


def test_two_processes_with_packs_and_no_logits(tmp_path):
    """FSDP2 shards a block with its layers, whose parameters are whole again when the block is called."""
    for strategy in ("ddp", "fsdp2"):
        lines = launch("--steps", "3", "--strategy", strategy, "--together", "--out", str(tmp_path))
        expected = losses(lines, "one process")
        assert expected[-1] < expected[0] - 0.03, "nothing was learned"
        assert losses(lines, strategy) == pytest.approx(expected, rel=1e-5)
        assert any("fused calls in this one, fallbacks {}" in line for line in lines), lines
    one, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "ddp", "fsdp2"))
    for other in others:
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)


def test_two_processes_over_a_base_in_four_bits(tmp_path):
    """FSDP2 shards the packed bytes and makes plain parameters of them; the layers keep their state."""
    pytest.importorskip("bitsandbytes", reason="the layers are bitsandbytes'")
    for strategy in ("ddp", "fsdp2"):
        lines = launch("--steps", "3", "--strategy", strategy, "--base", "nf4", "--out", str(tmp_path))
        expected = losses(lines, "one process")
        assert expected[-1] < expected[0] - 0.03, "nothing was learned"
        assert losses(lines, strategy) == pytest.approx(expected, rel=1e-5)
        assert any("42 fused calls in this one, fallbacks {}" in line for line in lines), lines
    ddp, fsdp2 = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ddp", "fsdp2"))
    assert ddp.keys() == fsdp2.keys()
    for name, value in ddp.items():
        torch.testing.assert_close(fsdp2[name], value)


def test_two_processes_over_a_mixture_of_experts(tmp_path):
    """FSDP2 shards the experts and their factors; what is saved is what one process has learned."""
    for strategy in ("ddp", "fsdp2"):
        lines = launch("--steps", "3", "--strategy", strategy, "--base", "experts", "--out", str(tmp_path))
        expected = losses(lines, "one process")
        assert expected[-1] < expected[0] - 0.03, "nothing was learned"
        assert losses(lines, strategy) == pytest.approx(expected, rel=1e-5)
        assert any("24 fused calls in this one, fallbacks {}" in line for line in lines), lines
    one, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "ddp", "fsdp2"))
    assert any("experts.lora_B" in key for key in one)
    for other in others:
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_accelerate_reads_the_example_config():
    config = load_config_from_file(str(EXAMPLES / "accelerate.yaml"))
    assert (config.distributed_type, config.num_processes) == ("FSDP", 2)
    assert config.fsdp_config["fsdp_version"] == 2
