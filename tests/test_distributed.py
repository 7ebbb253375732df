"""gloo processes run the example that the documentation recommends; they must reach the losses of one process."""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WRAPPERS = {
    "ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM", "accelerate": "DistributedDataParallel",
    "tp": "PeftModelForCausalLM",
}  # fmt: skip


def torchrun(*options):
    command = [*TORCHRUN, str(EXAMPLES / "distributed.py"), *options]
    environment = os.environ | processes.ENVIRONMENT
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def launch(*options, count=2):
    """As ``torchrun``, without its seconds of imports in every process."""
    with tempfile.TemporaryDirectory() as folder:
        return processes.run_script(count, EXAMPLES / "distributed.py", options, folder).splitlines()


@pytest.fixture
def example():
    """The example as a module, in a group of this process alone."""
    spec = importlib.util.spec_from_file_location("distributed_example", EXAMPLES / "distributed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield module
    dist.destroy_process_group()


def check_resumes_here(example, checkpoint, steps, base="plain", together=False):
    """What two processes have written after ``steps`` is read by one, which goes on as one that never stopped."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(example.VOCABULARY, (example.BATCH, example.TOKENS), generator=generator)] * steps
    model = example.make_model(device, base, together)
    expected = example.train(model, example.optimizer_of(model), batches * 2)[steps:]
    options = argparse.Namespace(base=base, together=together, resume=checkpoint, checkpoint=None)
    _, found = example.train_with("fsdp2", batches, device, options)
    assert found == pytest.approx([loss.item() for loss in expected], rel=1e-5)


def launch_three_steps(strategy, folder, *options):
    """Adapters are saved in ``folder``; FSDP2 leaves a checkpoint, too."""
    checkpoint = ["--checkpoint", str(folder / "c")] if strategy == "fsdp2" else []
    return launch("--steps", "3", "--strategy", strategy, "--out", str(folder), *checkpoint, *options)


def losses(lines, name):
    return [float(v) for line in lines if line.startswith(name) for v in line.removeprefix(name).split()]


def test_two_processes_have_the_losses_of_one(tmp_path):
    lines = torchrun("--steps", "4", "--out", str(tmp_path))
    expected = losses(lines, "one process")
    assert expected[-1] < expected[0] - 0.05, "nothing was learned"
    for strategy, wrapper in WRAPPERS.items():
        tolerance = 1e-6 if strategy == "tp" else 1e-5
        assert losses(lines, strategy) == pytest.approx(expected, rel=tolerance)
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


def test_layers_that_two_processes_share_and_a_resume(tmp_path):
    """Two by two processes leave a checkpoint; two that share every layer go on from it, to where one would be."""
    lines = launch(
        "--strategy", "fsdp2+tp", "--steps", "3", "--checkpoint", str(tmp_path / "c"), "--out", str(tmp_path),
        count=4,
    )  # fmt: skip
    first = losses(lines, "one process")
    assert losses(lines, "fsdp2+tp") == pytest.approx(first, rel=1e-6)
    wrapper = "FSDPPeftModelForCausalLM, 4 processes, 42 fused calls in this one, fallbacks {}"
    assert any(wrapper in line for line in lines), lines
    one, four = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "fsdp2+tp"))
    torch.testing.assert_close(four, one, rtol=1e-3, atol=1e-6)

    lines = launch("--strategy", "tp", "--steps", "3", "--resume", str(tmp_path / "c"))
    then = losses(lines, "one process")
    assert then[0] < first[-1] - 0.01, "one process did not go on"
    assert losses(lines, "tp") == pytest.approx(then, rel=1e-6)
    assert any("PeftModelForCausalLM, 2 processes, 42 fused calls in this one, fallbacks {}" in line for line in lines)


def test_two_processes_with_packs_and_no_logits(tmp_path, example):
    """FSDP2 shards a block with its layers, whose parameters are whole again when the block is called."""
    for strategy in ("ddp", "fsdp2"):
        lines = launch_three_steps(strategy, tmp_path, "--together")
        expected = losses(lines, "one process")
        assert expected[-1] < expected[0] - 0.03, "nothing was learned"
        assert losses(lines, strategy) == pytest.approx(expected, rel=1e-5)
        assert any("fused calls in this one, fallbacks {}" in line for line in lines), lines
    one, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "ddp", "fsdp2"))
    for other in others:
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)
    check_resumes_here(example, tmp_path / "c", 3, together=True)


def test_two_processes_over_a_base_in_four_bits(tmp_path, example):
    """FSDP2 shards the packed bytes and makes plain parameters of them; the layers keep their state."""
    pytest.importorskip("bitsandbytes", reason="the layers are bitsandbytes'")
    for strategy in ("ddp", "fsdp2"):
        lines = launch_three_steps(strategy, tmp_path, "--base", "nf4")
        expected = losses(lines, "one process")
        assert expected[-1] < expected[0] - 0.03, "nothing was learned"
        assert losses(lines, strategy) == pytest.approx(expected, rel=1e-5)
        assert any("42 fused calls in this one, fallbacks {}" in line for line in lines), lines
    ddp, fsdp2 = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ddp", "fsdp2"))
    assert ddp.keys() == fsdp2.keys()
    for name, value in ddp.items():
        torch.testing.assert_close(fsdp2[name], value)
    check_resumes_here(example, tmp_path / "c", 3, base="nf4")


def test_two_processes_over_a_mixture_of_experts(tmp_path, example):
    """FSDP2 shards the experts and their factors; what is saved is what one process has learned."""
    for strategy in ("ddp", "fsdp2"):
        lines = launch_three_steps(strategy, tmp_path, "--base", "experts")
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
    check_resumes_here(example, tmp_path / "c", 3, base="experts")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_under_zero3(tmp_path):
    """DeepSpeed gathers what the layers read around them; what it does to the parameters of others is as before."""
    lines = launch("--strategy", "zero3", "--steps", "3", "--out", str(tmp_path))
    expected = losses(lines, "one process")
    assert expected[-1] < expected[0] - 0.03, "nothing was learned"
    assert losses(lines, "zero3") == pytest.approx(expected, rel=1e-6)
    wrapper = "DeepSpeedEngine, 2 processes, 42 fused calls in this one, fallbacks {}"
    assert any(wrapper in line for line in lines), lines
    one, zero3 = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "zero3"))
    torch.testing.assert_close(zero3, one, rtol=1e-3, atol=1e-6)


def test_accelerate_reads_the_example_config():
    config = load_config_from_file(str(EXAMPLES / "accelerate.yaml"))
    assert (config.distributed_type, config.num_processes) == ("FSDP", 2)
    assert config.fsdp_config["fsdp_version"] == 2
