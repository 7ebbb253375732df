"""Several gloo processes on one machine, what they send to each other, and models whose layers they share."""

import datetime
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk

BY_ROWS = ("o_proj", "down_proj")


PRELOADED = [
    "processes", "accelerate", "lora_kernels.integrations.peft.linear", "torch._dynamo", "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict", "transformers.models.qwen3_moe.modeling_qwen3_moe",
]  # fmt: skip
"""What takes seconds to import: one process does, once, and those of every test are forked from it."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LIMIT_S = 300


def start(count, function, *arguments):
    """Runs ``function(rank, *arguments)`` in ``count`` new processes.

    Raises:
        ProcessRaisedException, ProcessExitedException: one has failed, and the others were ended.
        TimeoutError: they were all ended.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # the first of them imports what this one does
    with mock.patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=path, PYTHONSAFEPATH="1"):
        context = mp.start_processes(function, arguments, count, join=False, start_method="forkserver")
    end = time.monotonic() + LIMIT_S
    while not context.join(max(0.0, end - time.monotonic())):
        if time.monotonic() >= end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{count} processes were not done after {LIMIT_S} s")


def run(count, scenarios, folder):
    """{scenario: tracebacks} of ``scenarios(rank, folder)``, all run in the same ``count`` processes."""
    start(count, _work, count, scenarios, str(folder))
    found = [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]
    return {of.__name__: "\n".join(filter(None, (each[of.__name__] for each in found))) for of in scenarios}


def run_script(count, path, options, folder):
    """What the first process prints that runs a script, as torchrun starts it; it and the others must succeed."""
    failure = ""
    try:
        start(count, _run_script, count, str(path), options, str(folder))
    except (mp.ProcessExitedException, mp.ProcessRaisedException, TimeoutError) as error:
        failure = str(error)
    outputs = [file.read_text() for rank in range(count) if (file := Path(folder, f"{rank}.txt")).exists()]
    assert failure == "", "\n".join([failure, *outputs])
    return outputs[0]


def _join_group(rank, count, folder):
    """What is needed to be one of ``count`` processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    limit = datetime.timedelta(seconds=60)  # where one process has failed, the others wait for it
    store = dist.FileStore(f"{folder}/store", count)
    return {"store": store, "rank": rank, "world_size": count, "timeout": limit}


def _run_script(rank, count, path, options, folder):
    # A script that finds a group's address in the environment, as torchrun tells it, is given a file instead.
    dist.init_process_group = partial(dist.init_process_group, **_join_group(rank, count, folder))
    sys.argv = [path, *options]
    with open(f"{folder}/{rank}.txt", "w") as output, redirect_stdout(output):
        try:
            runpy.run_path(path, run_name="__main__")
        except Exception:
            traceback.print_exc(file=output)
            raise


def _work(rank, count, scenarios, folder):
    dist.init_process_group("gloo", **_join_group(rank, count, folder))
    found = {}
    for scenario in scenarios:
        torch.manual_seed(0)
        lk.reset_stats()
        try:
            scenario(rank, folder)
            found[scenario.__name__] = ""
        except Exception:
            found[scenario.__name__] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """What this process sends: a list of (collective, shape, bytes)."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        for kind in ("allreduce", "allgather", "reducescatter", "broadcast", "alltoall"):
            if "c10d" in name and kind in name.replace("_", ""):
                first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
                self.messages.append((kind, tuple(first.shape), first.numel() * first.element_size()))
        return function(*args, **(kwargs or {}))


def llama(**options):
    """A tiny random Llama that two processes can share: one head for each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12, **options,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fill(model, only="bias")
    return model


@contextmanager
def sent():
    """The messages, sorted once the block is left."""
    with Sent() as found:
        yield found.messages
    found.messages.sort()


def spread(layer, mesh, by_rows, adapter="default", column=ColwiseParallel, row=RowwiseParallel):
    """One of PEFT's linear layers over the processes, by torch's own styles."""
    if by_rows:
        plan = {"base_layer": row(), f"lora_A.{adapter}": row()}
    else:
        plan = {"base_layer": column(), f"lora_B.{adapter}": column()}
    parallelize_module(layer, mesh, plan)


def spread_model(model, mesh):
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            spread(layer, mesh, name.endswith(BY_ROWS))
        elif name.endswith(BY_ROWS):
            parallelize_module(layer, mesh, RowwiseParallel())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(model, only="lora_", std=0.2):
    """The same random values in every process, however they are spread."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if only in name:
            value = torch.randn(parameter.shape, generator=generator) * std
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)


def gradients(model):
    """As they are in this process; ``wholes`` gathers them."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def wholes(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)


def train(model, optimizer, batches):
    """The losses, and the gradients of the first step."""
    losses, first = [], None
    for tokens in batches:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        first = first or gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first
