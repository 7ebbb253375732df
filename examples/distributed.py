"""LoRA training on several processes through fused layers, with torch's own engines, DDP, FSDP2 (``fully_shard``) and
tensor parallelism (``parallelize_module``), with accelerate and with DeepSpeed's ZeRO-3.

Trains a small random Llama on one process's whole batch, then again with every strategy, each process on its share of
the batch, and compares the losses, which must agree up to rounding. Works on CPUs (gloo) and on GPUs (nccl).

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --strategy tp
    torchrun --nproc-per-node 4 examples/distributed.py --strategy fsdp2+tp --checkpoint build/checkpoint  # two by two
    torchrun --nproc-per-node 2 examples/distributed.py --strategy tp --resume build/checkpoint  # goes on from there
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2 --out build/adapter
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2 --base nf4  # QLoRA: a base in four bits
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2 --base experts  # a mixture of experts
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2 --together  # packs of layers, and no logits
    torchrun --nproc-per-node 2 examples/distributed.py --strategy zero3  # needs deepspeed
    accelerate launch --config_file examples/accelerate.yaml examples/distributed.py --strategy accelerate  # on GPUs
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_kernels as lk

BATCH, TOKENS, VOCABULARY = 8, 16, 61
STRATEGIES = ("ddp", "fsdp2", "accelerate", "tp")
"""What ``--strategy all`` means; "fsdp2+tp" needs four processes, "zero3" DeepSpeed."""
TENSOR_PARALLEL = ("tp", "fsdp2+tp")
LAYER_BY_LAYER = (*TENSOR_PARALLEL, "zero3")
"""Neither packs nor a loss without logits, and a plain base."""
BY_ROWS = ("o_proj", "down_proj")
"""The layers whose input is spread over the processes, by the layers in front of them."""
BASES = ("plain", "nf4", "experts")
TOLERANCE = 1e-5
"""Relative difference of losses: the processes sum the same gradients in another order."""


def make_model(device: torch.device, base: str, together: bool) -> PeftModel:
    """The same model in every process, with its LoRA layers fused, and, if ``together``, served by blocks."""
    torch.manual_seed(0)
    size = 64 if base == "nf4" else 32  # as many weights share a scale
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    targets = {"target_modules": "all-linear"}
    if base == "experts":
        config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=size, head_dim=8)
        causal_lm = Qwen3MoeForCausalLM(config)
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": parameters}
    else:
        causal_lm = LlamaForCausalLM(LlamaConfig(**sizes))
    if base == "nf4":
        in_4_bits(causal_lm.model)
        causal_lm.is_loaded_in_4bit = True  # what transformers says of a model that it has loaded so
    model = get_peft_model(causal_lm.to(device), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets))
    lk.patch(model, packs=together, loss=together)
    return model


def in_4_bits(model: nn.Module) -> None:
    """Gives ``model`` bitsandbytes' layers for its linear ones, as transformers does it when it loads a model."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                # FSDP shards bytes as elements of a dtype that the gradients could have.
                options = {"quant_type": "nf4", "quant_storage": torch.float32}
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.float32, **options
                )
                layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, module=layer, **options)
                setattr(parent, name, layer)


def split_layers(model: PeftModel, mesh: DeviceMesh) -> None:
    """Spreads every LoRA layer over the processes of ``mesh``, as PEFT does it for a model with transformers' plan."""
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        if name.endswith(BY_ROWS):
            plan = {"base_layer": RowwiseParallel(), "lora_A.default": RowwiseParallel()}
        else:
            plan = {"base_layer": ColwiseParallel(), "lora_B.default": ColwiseParallel()}
        parallelize_module(layer, mesh, plan)


def mesh_of(strategy: str, device: torch.device) -> DeviceMesh:
    """[data parallel, tensor parallel]: processes that see other data, and those that share a layer."""
    world = dist.get_world_size()
    tensor_parallel = {"tp": world, "fsdp2+tp": 2}.get(strategy, 1)
    return init_device_mesh(device.type, (world // tensor_parallel, tensor_parallel), mesh_dim_names=("data", "tensor"))


def distribute(model: PeftModel, strategy: str, device: torch.device, mesh: DeviceMesh) -> nn.Module:
    """``model`` as the strategy wants it. Wrap after ``lk.patch``."""
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])
    if strategy in TENSOR_PARALLEL:
        split_layers(model, mesh["tensor"])
    if strategy == "tp":
        return model
    mesh = mesh["data"]
    for layer in model.modules():
        # A whole block is one group: the fused layers read the weights of their base layer and adapters themselves.
        if type(layer).__name__.endswith("DecoderLayer"):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def under_zero3(model: PeftModel) -> nn.Module:
    """DeepSpeed's engine around ``model``: every parameter is cut over the processes, and gathered where it is read."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        # 0: also those that are so small that DeepSpeed would leave them whole, which here are all.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)[0]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # One by one: some are spread over processes, some are not, and torch puts no list of them together.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], backward=Tensor.backward) -> list:
    """The loss of each step, on this process's batches."""
    losses = []
    for tokens in batches:
        loss = model(input_ids=tokens, labels=tokens).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """What a checkpoint holds: the adapter's parameters and the optimizer's state, spread over the processes."""
    parameters = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    adapter = {name: value for name, value in parameters.items() if "lora_" in name}
    return {"adapter": adapter, "optimizer": get_optimizer_state_dict(model, optimizer)}


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Reads a checkpoint of any number of processes and any strategy."""
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(
        model, optimizer, model_state_dict=state["adapter"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # the frozen parameters are not in it
    )  # fmt: skip


def train_with(
    strategy: str, batches: list[Tensor], device: torch.device, options: argparse.Namespace
) -> tuple[nn.Module, list[float]]:
    """The trained model, and the losses over all processes."""
    base, together = options.base, options.together
    mesh = mesh_of(strategy, device)
    shares = [batch.chunk(mesh["data"].size())[mesh["data"].get_local_rank()] for batch in batches]
    if strategy == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device.type == "cpu")
        model = make_model(accelerator.device, base, together)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        losses = train(model, optimizer, shares, accelerator.backward)
    elif strategy == "zero3":
        model = under_zero3(make_model(device, base, together))
        losses = train(model, model, shares, model.backward)  # the engine steps, too
    else:
        model = distribute(make_model(device, base, together), strategy, device, mesh)
        optimizer = optimizer_of(model)  # of the sharded parameters
        if options.resume is not None:
            resume(model, optimizer, options.resume)
        losses = train(model, optimizer, shares)
        if options.checkpoint is not None:
            dcp.save(state_of(model, optimizer), checkpoint_id=options.checkpoint)
    for loss in losses:
        dist.all_reduce(loss)
    return model, [loss.item() / dist.get_world_size() for loss in losses]


def save_adapter(model: nn.Module, directory: Path) -> None:
    """PEFT's files, written by the first process from everybody's shards."""
    if type(model).__name__ == "DeepSpeedEngine":
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
            if dist.get_rank() == 0:
                lk.save_adapter(model, directory)
        return
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        state = {name.removeprefix("module."): value for name, value in state.items()}
        getattr(model, "module", model).save_pretrained(directory, state_dict=state)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=("all", *STRATEGIES, "fsdp2+tp", "zero3"), default="all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--base", choices=BASES, default="plain", help="nf4: in four bits (needs bitsandbytes)")
    parser.add_argument("--together", action="store_true", help="lk.patch(model, packs=True, loss=True)")
    parser.add_argument("--out", type=Path, help="where to save the adapters, one directory per strategy")
    parser.add_argument("--checkpoint", type=Path, help="where to save adapter and optimizer, in shards")
    parser.add_argument("--resume", type=Path, help="such a checkpoint, after as many steps, to go on from")
    options = parser.parse_args()
    strategies = STRATEGIES if options.strategy == "all" else (options.strategy,)
    if options.base != "plain" or options.together:
        strategies = tuple(strategy for strategy in strategies if strategy not in LAYER_BY_LAYER)
    if not strategies:
        parser.error(f"{options.strategy} is for layers by themselves, over a plain base")
    if {"accelerate", "zero3"} & {*strategies} and options.resume is not None:
        parser.error("name a strategy of torch's with --resume")

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator).to(device)] * options.steps

    model = make_model(device, options.base, options.together)
    steps_before = options.steps if options.resume is not None else 0
    expected = [loss.item() for loss in train(model, optimizer_of(model), batches[:1] * (steps_before + options.steps))]
    expected = expected[steps_before:]
    if rank == 0:
        print(f"{'one process':12}", *(f"{loss:.6f}" for loss in expected))
        if options.out is not None:
            model.save_pretrained(options.out / "one")

    agree = True
    for strategy in strategies:
        lk.reset_stats()
        model, losses = train_with(strategy, batches, device, options)
        difference = max(abs(ours - one) / one for ours, one in zip(losses, expected))
        agree = agree and difference <= TOLERANCE
        stats = lk.stats()
        calls = sum(n for (op, _), n in stats["served"].items() if not op.endswith("_backward"))
        if rank == 0:
            print(f"{strategy:12}", *(f"{loss:.6f}" for loss in losses))
            print(f"{'':12} {type(model).__name__}, {world} processes, {calls} fused calls in this one, ", end="")
            print(f"fallbacks {stats['fallback']}, largest relative difference {difference:.1e}")
        if options.out is not None:
            save_adapter(model, options.out / strategy)
    dist.destroy_process_group()
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
