"""Launches of the Triton kernels as values, and drivers of GPUs that are not there."""

from __future__ import annotations

import contextlib

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lora_kernels.plain import float32_products
from lora_kernels.triton_kernels import (
    configs,
    grouped_lora_linear,
    lora_linear,
    lora_pack,
    multi_lora_branch,
    multi_lora_linear,
    prompt_embedding,
)  # fmt: skip
from lora_kernels.triton_kernels.launching import Device

BF16, FP32 = torch.bfloat16, torch.float32


class AbsentGpu:
    """A driver that names a GPU to compile for. Nothing can be launched."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target) % 2**31  # kernels are cached by device

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling_for(arch):
    previous = driver._active
    driver.set_active(AbsentGpu(arch))
    try:
        yield
    finally:
        driver._active = previous


def compile_for(arch, launch):
    """The compiled kernel, specialised for its arguments as a real launch would be."""
    counters = {"counters": torch.empty(launch.counters, dtype=torch.int32)} if launch.counters else {}
    with compiling_for(arch):
        return launch.kernel.warmup(
            *launch.args,
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **launch.constants,
            **counters,
        )


def launches(target, m, n, k, rank, dtype=BF16, adapter_dtype=BF16, p=0.0, bias=False):
    """(name, launch) of a forward and a backward on a GPU of 108 SMs."""
    x, weight, y = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
    lora_A, lora_B = torch.empty(rank, k, dtype=adapter_dtype), torch.empty(n, rank, dtype=adapter_dtype)
    s = torch.empty(m, rank, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64) if p > 0 else None
    device, float32 = Device(target, 108), float32_products(dtype)
    forward = lora_linear.forward_task(
        y, s, x, weight, lora_A, lora_B, torch.empty(n, dtype=dtype) if bias else None, seed, 1.7, p
    )
    backward = lora_linear.backward_task(x, s, y, weight, lora_A, lora_B, seed, 1.7, p)
    for name, task, drops in (("forward", forward, "p"), ("backward", backward, "branch")):
        schedule = configs.schedule(target, task.columns, rank, float32)
        for launch in lora_linear.fused_launches(device, schedule, task, drops):
            yield f"{name} {launch.constants['PART']}", launch
    yield "dA", lora_linear.reduce_launch(device, lora_A.t(), x, s, seed, 1.7, p)
    yield "dB", lora_linear.reduce_launch(device, lora_B, y, s, None, 1.7, 0.0)


def grouped_launches(target, m, n, k, rank, groups, adapter_dtype=BF16, p=0.0, bias=False):
    """The same of rows in groups, each with a weight of its own."""
    x, weight, y = (torch.empty(*size, dtype=BF16) for size in ((m, k), (groups, n, k), (m, n)))
    lora_A = torch.empty(groups, rank, k, dtype=adapter_dtype)
    lora_B = torch.empty(groups, n, rank, dtype=adapter_dtype)
    s, ends = torch.empty(m, rank, dtype=BF16), torch.zeros(groups, dtype=torch.int32)
    seed = torch.zeros(1, dtype=torch.int64) if p > 0 else None
    bias = torch.empty(groups, n, dtype=BF16) if bias else None
    device, schedule = Device(target, 108), configs.TARGETS[target].schedule
    forward = grouped_lora_linear.forward_operands(y, s, x, weight, lora_A, lora_B, bias, seed, 1.7, p)
    backward = grouped_lora_linear.backward_operands(x, s, y, weight, lora_A, lora_B, seed, 1.7, p)
    for name, operands, drops in (("forward", forward, "p"), ("backward", backward, "branch")):
        for launch in grouped_lora_linear.fused_launches(device, schedule, *operands, ends, drops):
            yield f"{name} {launch.constants['PART']}", launch
    yield "dA", grouped_lora_linear.reduce_launch(device, lora_A.mT, x, s, ends, seed, 1.7, p)
    yield "dB", grouped_lora_linear.reduce_launch(device, lora_B, y, s, ends, None, 1.7, 0.0)


def multi_launches(target, m, n, k, rank, adapters, adapter_dtype=BF16, p=0.0, mixed=True):
    """The same of rows that have adapters in pools, by row and by adapter; ``mixed``: of ranks and factors of their
    own.
    """
    x, weight, y, s = (torch.empty(*size, dtype=BF16) for size in ((m, k), (n, k), (m, n), (m, rank)))
    lora_A = torch.empty(adapters, rank, k, dtype=adapter_dtype)
    lora_B = torch.empty(adapters, n, rank, dtype=adapter_dtype)
    ids = torch.zeros(m, dtype=torch.int64)
    of_each = (torch.zeros(adapters, dtype=torch.int32), torch.zeros(adapters)) if mixed else (None, None)
    seed = torch.zeros(1, dtype=torch.int64) if p > 0 else None
    device = Device(target, 108)
    forward = multi_lora_linear.forward_operands(y, s, x, weight, lora_A, lora_B, *of_each, seed, 1.7, p)
    backward = multi_lora_linear.backward_operands(x, s, y, weight, lora_A, lora_B, *of_each, seed, 1.7, p)
    yield from zip(("inner of a row", "out of a row"), multi_lora_linear.row_launches(*forward, ids))
    order, look_up = multi_lora_linear.order_launch(ids, adapters)
    yield "order", look_up
    for name, operands, drops in (("forward", forward, "p"), ("backward", backward, "branch")):
        launches = multi_lora_linear.branch_launches(device, *operands, order, drops)
        yield from zip((f"{name} inner", f"{name} out"), launches)
    pools = lora_A, lora_B, *of_each
    yield "dA", multi_lora_linear.reduce_launch(device, lora_A.mT, x, s, order, *pools, seed, 1.7, p)
    yield "dB", multi_lora_linear.reduce_launch(device, lora_B, y, s, order, *pools, None, 1.7, 0.0)


def multi_half_launches(target, m, n, k, rank, adapters):
    """(name, launch) of a branch's halves: the first of three slices, the second of the middle third of y's columns."""
    x, y, s = (torch.empty(*size, dtype=BF16) for size in ((m, k), (m, 3 * n), (m, 3 * rank)))
    lora_A = torch.empty(adapters, 3 * rank, k, dtype=BF16)
    lora_B = torch.empty(adapters, n, rank, dtype=BF16)
    ids, ranks = (torch.zeros(size, dtype=torch.int32) for size in (m, adapters))
    shrink = multi_lora_branch.shrink_operands(s, x, lora_A, ranks)
    expand = multi_lora_branch.expand_operands(y[:, n : 2 * n], s[:, :rank], lora_B, ranks, torch.zeros(adapters), 1.0)
    order, _ = multi_lora_linear.order_launch(ids, adapters)
    for half, (name, operands) in enumerate({"shrink": shrink, "expand": expand}.items()):
        yield f"{name} of a row", multi_lora_linear.row_launches(*operands, ids)[half]
        yield name, multi_lora_linear.branch_launches(Device(target, 108), *operands, order, "p")[half]


def pack_launches(target, m, k, ns, ranks, adapter_dtype=BF16, p=0.0, bias=False):
    """(name, launch) of a pack's forward and of its gradient of x; dA and dB are launches as above."""
    x, weights = torch.empty(m, k, dtype=BF16), [torch.empty(n, k, dtype=BF16) for n in ns]
    As = [torch.empty(r, k, dtype=adapter_dtype) for r in ranks]
    Bs = [torch.empty(n, r, dtype=adapter_dtype) for n, r in zip(ns, ranks)]
    ys, s = [torch.empty(m, n, dtype=BF16) for n in ns], torch.empty(m * sum(ranks), dtype=BF16)
    biases = [torch.empty(n, dtype=BF16) for n in ns] if bias else []
    seed = torch.zeros(1, dtype=torch.int64) if p > 0 else None
    numbers = seed, [1.7] * len(ns), [p] * len(ns)
    device, schedule = Device(target, 108), configs.TARGETS[target].schedule
    forward = lora_pack.forward_tasks(ys, s, x, weights, As, Bs, biases, *numbers)
    backward = lora_pack.backward_tasks(x, s, ys, weights, As, Bs, *numbers)
    for name, tasks in (("forward", forward), ("backward", backward)):
        for launch in lora_pack.fused_launches(device, schedule, tasks, is_sum=name == "backward"):
            yield f"{name} {launch.constants['PART']}", launch


def prompt_launches(hidden, dtype=BF16, prompt_dtype=FP32, embeds=False, full=True, batch=4, tokens=100, rows=20):
    """(name, launch) of a forward and a backward of prompt embedding, with every optional argument or with none."""
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    weight, inputs = torch.empty(50, hidden, dtype=dtype), torch.empty(batch, tokens, hidden, dtype=dtype)
    out, prompt = (
        torch.empty(batch, rows + tokens, hidden, dtype=dtype),
        torch.empty(3, rows, hidden, dtype=prompt_dtype),
    )
    column = torch.empty(batch, rows + tokens, dtype=torch.int64)
    layout, index = torch.empty(batch, 3, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32)
    source = (None, None, inputs) if embeds else (ids, weight, None)
    options = (ids.bool(), ids, index, index) if full else (None,) * 4
    prompt, tasks = (prompt, index) if full else (prompt[0], None)
    outputs = out, column.bool() if full else column, column, column if full else None, layout
    yield "forward", prompt_embedding.forward_launch(outputs, prompt, *source, *options, full)
    yield "prompt", prompt_embedding.prompt_gradient_launch(prompt, out, layout, tasks, rows)
    yield "embeds", prompt_embedding.embeds_gradient_launch(inputs, out, layout, rows)
    order = ids.view(-1)
    yield "weight", prompt_embedding.weight_gradient_launch(weight, out, layout, order, order, rows)
