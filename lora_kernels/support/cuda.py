"""What the CUDA kernels of several ops agree on."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from .. import _native
from ..plain import float32_products
from ..reasons import Reason
from ..spec import Verdict

OLDEST = (8, 0)
"""Compute capability: bf16 mma and cp.async."""
MAX_RANK = 256
MAX_SIZE = 2**31 - 1024
"""Rows, columns and tiles are counted in int32; the margin is what the last, partly filled tiles reach beyond."""
MAX_ROW = 2**25
"""Elements of a row: within a tile, the distance between rows is reckoned in 32 bits."""
SMALLEST_TILE = 64
SMALLEST_RANK_TILE = 16

_PLAN_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}
"""Of x, by what ``lora_kernels._cuda`` calls its products."""
PROMPT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TENSOR_CORES = Verdict("tensor cores", "bf16, fp16 and, where torch allows it, tf32 on sm_80 and newer")
"""The schedule depends on sizes, alignment and the GPU, and is chosen when the launch is planned: see ``planned``."""
WGMMA = "wgmma"
"""y and dX of 16 bits on a GPU of capability 9.0 alone, by kernels that have run on no GPU yet: never unasked."""
CLUSTERS = "wgmma, clusters"
"""The same, forwards in clusters of two blocks, which no GPU has shown to be faster."""
_SCHEDULES = {
    "auto": TENSOR_CORES,
    "one launch": Verdict("one launch", "asked for: the product and the branch in one kernel"),
    "cublas": Verdict("cublas", "asked for: the branch by our kernels, the vendor's GEMM accumulates onto it"),
    WGMMA: Verdict(WGMMA, "asked for: wgmma on sm_90 where it fits, the rest as without asking"),
    CLUSTERS: Verdict(CLUSTERS, "asked for: as wgmma, two blocks of a forward share what they read of the weight"),
}

_FP32_STRICT = Verdict(None, Reason.FP32_STRICT)
_DTYPE = Verdict(None, Reason.DTYPE)
_LAYOUT = Verdict(None, Reason.LAYOUT)
_RANK = Verdict(None, Reason.RANK)
_SIZE = Verdict(None, Reason.SIZE)
_ARCHITECTURE = Verdict(None, Reason.ARCHITECTURE)


def _schedule_of_environment() -> str:
    wanted = os.environ.get("LORA_KERNELS_CUDA_SCHEDULE", "auto")
    if wanted not in _SCHEDULES:
        raise ValueError(f"LORA_KERNELS_CUDA_SCHEDULE must be one of {'; '.join(_SCHEDULES)}, got {wanted!r}")
    return wanted


_OF_ENVIRONMENT = _schedule_of_environment()
_schedule: ContextVar[str] = ContextVar("cuda_schedule", default=_OF_ENVIRONMENT)


@contextlib.contextmanager
def use_schedule(name: str) -> Iterator[None]:
    """The LoRA linears of the CUDA backend are computed so inside of the context, where that is possible, and so is the
    backward of each.

    Args:
        name: "one launch", "cublas", "wgmma" (bf16 and fp16 on a GPU of compute capability 9.0; other calls as under
            "auto"), "wgmma, clusters" (the same, blocks of a forward share what they read of the weight), or "auto",
            which is what is expected to be fastest.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"name must be one of {'; '.join(_SCHEDULES)}, got {name!r}")
    token = _schedule.set(name)
    try:
        yield
    finally:
        _schedule.reset(token)


def asked_schedule() -> str | None:
    """What ``use_schedule`` asks for here; None where that is nothing, or what the environment says in every thread."""
    name = _schedule.get()
    return None if name == _OF_ENVIRONMENT else name


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; torch takes longer to tell than a call has time for."""
    return torch.cuda.get_device_capability(device)


def refusal(device: torch.device) -> Verdict | None:
    """Why no CUDA kernel runs for tensors on ``device``; None where one does."""
    if capability(device) < OLDEST:
        return _ARCHITECTURE
    problem = _native.cuda_problem(device)
    return None if problem is None else Verdict(None, problem[0])


def tensor_core_verdict(x: torch.Tensor, columns: int, depth: int, rank: int) -> Verdict:
    """Whether the tensor-core kernels of a LoRA linear serve the rows of ``x``, for these sizes of the weight."""
    if x.dtype not in _PLAN_DTYPES:
        return _DTYPE
    if float32_products(x.dtype) == "ieee":
        return _FP32_STRICT
    if rank > MAX_RANK:
        return _RANK
    if columns == 0 or depth == 0:
        return _LAYOUT
    rows = x.numel() // x.shape[-1]
    tiles = (rows // SMALLEST_TILE + 1) * (columns // SMALLEST_TILE + 1 + MAX_RANK // SMALLEST_RANK_TILE)
    if max(rows, tiles) > MAX_SIZE or max(columns, depth) > MAX_ROW:
        return _SIZE
    return refusal(x.device) or _SCHEDULES[_schedule.get()]


def grouped_verdict(x: torch.Tensor, weight: torch.Tensor, groups: int, rank: int) -> Verdict:
    """Whether the tensor-core kernels serve rows in groups: they read weights in whole chunks, and ask no one for the
    sizes of groups.
    """
    n, k = weight.shape[-2:]
    verdict = tensor_core_verdict(x, n, k, rank)
    if verdict.schedule is None:
        return verdict
    chunk = 16 // x.element_size()
    if n % chunk != 0 or k % chunk != 0 or not _lies_in_chunks(weight):
        return _LAYOUT
    tiles = (x.shape[0] // SMALLEST_TILE + 1 + groups) * (max(n, k) // SMALLEST_TILE + 1 + MAX_RANK)
    return _SIZE if tiles > MAX_SIZE else verdict


def multi_verdict(x: torch.Tensor, weight: torch.Tensor, adapters: int, rank: int) -> Verdict:
    """Whether the kernels serve rows that have adapters in pools. How the weight lies decides who multiplies by it."""
    n, k = weight.shape
    verdict = tensor_core_verdict(x, n, k, rank)
    if verdict.schedule is None:
        return verdict
    chunk = 16 // x.element_size()
    if n % chunk != 0 or k % chunk != 0:
        return _LAYOUT
    tiles = (x.numel() // k // SMALLEST_TILE + 1 + adapters) * (max(n, k) // SMALLEST_TILE + 1 + MAX_RANK)
    return _SIZE if tiles > MAX_SIZE else verdict


def branch_verdict(wide: torch.Tensor, adapters: int, rank: int, *, in_place: bool) -> Verdict:
    """The same of one half of their branch, which reads ``wide`` [..., size], or adds to it in place, beside s
    [..., rank].
    """
    size = wide.shape[-1]
    verdict = tensor_core_verdict(wide, size, size, rank)
    if verdict.schedule is None:
        return verdict
    if size % (16 // wide.element_size()) != 0 or (in_place and not _lies_in_chunks(wide.reshape(-1, size))):
        return _LAYOUT
    tiles = (wide.numel() // size // SMALLEST_TILE + 1 + adapters) * (size // SMALLEST_TILE + 1 + MAX_RANK)
    return _SIZE if tiles > MAX_SIZE else TENSOR_CORES


ONE_BY_ONE = "one by one"
_MAX_MEMBERS = 4
"""``kMaxMembers`` of csrc/params/lora_pack.h."""


def pack_verdict(
    x: torch.Tensor, weights: list[torch.Tensor], lora_As: list[torch.Tensor], lora_Bs: list[torch.Tensor], *,
    backward: bool,
) -> Verdict:  # fmt: skip
    """Whether the CUDA kernels serve a pack, in one launch, or, "one by one", in those of each member."""
    ranks = tuple(A.shape[0] for A in lora_As)
    for weight, rank in zip(weights, ranks):
        n, k = weight.shape
        verdict = tensor_core_verdict(x, n, k, rank)
        if verdict.schedule is None:
            return verdict
    ns, k = tuple(weight.shape[0] for weight in weights), x.shape[-1]
    chunk = 16 // x.element_size()
    is_served = (
        len(weights) <= _MAX_MEMBERS
        and all(size % chunk == 0 for size in (k, *ns, *ranks))
        and all(weight.stride(-1) == 1 and _lies_in_chunks(weight) for weight in weights)
        and all(factor.is_contiguous() for factor in (*lora_As, *lora_Bs))
    )
    return _planned_pack(
        backward, _PLAN_DTYPES[x.dtype], x.numel() // k, ns, k, ranks, is_served, _schedule.get(), x.device
    )


@functools.cache
def _planned_pack(
    backward: bool, dtype: str, m: int, ns: tuple[int, ...], k: int, ranks: tuple[int, ...], is_served: bool,
    schedule: str, device: torch.device,
) -> Verdict:  # fmt: skip
    plan = _native.cuda.plan_lora_pack_backward if backward else _native.cuda.plan_lora_pack
    if len(ns) > _MAX_MEMBERS:
        return Verdict(ONE_BY_ONE, str(Reason.MEMBERS))
    return _told(
        plan(dtype=dtype, m=m, n=ns, k=k, rank=ranks, is_served=is_served, schedule=schedule, **_limits(device))
    )


def _lies_in_chunks(weight: torch.Tensor) -> bool:
    """Whether rows of a weight, or its columns, are neighbours in memory that begin at 16 bytes and are near."""
    row, column = weight.stride()[-2:]
    lead = weight.stride()[:-2]
    apart = row if column == 1 else column
    return (
        1 in (row, column)
        and apart <= MAX_ROW
        and weight.data_ptr() % 16 == 0
        and all(stride * weight.element_size() % 16 == 0 for stride in (*lead, apart))
    )


def prompt_refusal(
    device: torch.device, embeds: torch.dtype, prompt: torch.dtype, rows: int, columns: int
) -> Verdict | None:
    """Why the kernels of prompt embedding do not serve a call, None if they do.

    Args:
        embeds, prompt: dtypes of the output, or its gradient, and of the prompt.
        rows, columns: the output as a matrix.
    """
    if embeds not in PROMPT_DTYPES or prompt not in (embeds, torch.float32):
        return _DTYPE
    if max(rows, columns * embeds.itemsize) > MAX_SIZE:
        return _SIZE
    return refusal(device)


def _begin_at_chunks(t: torch.Tensor) -> bool:
    """Whether rows begin at 16 bytes as the kernels read them, who copy rows that are not contiguous."""
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        return True
    strides = (stride for size, stride in zip(t.shape[:-1], t.stride()) if size > 1)
    return t.data_ptr() % 16 == 0 and all(stride * t.element_size() % 16 == 0 for stride in strides)


def planned(plan: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, adapters: tuple[torch.Tensor, ...],
            has_dropout: bool, schedule: str) -> Verdict:  # fmt: skip
    """What ``plan``, a function of ``lora_kernels._cuda``, would launch; of several launches, what they are for."""
    n, k = weight.shape
    in_columns = weight.stride(1) != 1 and weight.stride(0) == 1 and weight.stride(1) >= n
    long_rows = (x, adapters[0]) if in_columns else (x, weight, adapters[0])
    launches = plan(
        dtype=_PLAN_DTYPES[x.dtype], m=x.numel() // k, n=n, k=k, rank=adapters[0].shape[0],
        rows_aligned=all(map(_begin_at_chunks, long_rows)), has_dropout=has_dropout,
        schedule="cublas" if in_columns else schedule, **_limits(x.device),
    )  # fmt: skip
    return _told(launches)


def planned_groups(plan: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor,
                   schedule: str) -> Verdict:  # fmt: skip
    """The same of rows in groups."""
    n, k = weight.shape[-2:]
    groups, rank = lora_A.shape[:2]
    launches = plan(
        dtype=_PLAN_DTYPES[x.dtype], m=x.shape[0], n=n, k=k, rank=rank, groups=groups, is_shared=weight.dim() == 2,
        in_columns=weight.stride(-1) != 1, schedule=schedule, **_limits(x.device),
    )  # fmt: skip
    return _told(launches)


def planned_pools(plan: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor,
                  has_dropout: bool, schedule: str) -> Verdict:  # fmt: skip
    """The same of rows that have adapters in pools."""
    n, k = weight.shape
    adapters, rank = lora_A.shape[:2]
    launches = plan(
        dtype=_PLAN_DTYPES[x.dtype], m=x.numel() // k, n=n, k=k, rank=rank, adapters=adapters,
        w_is_whole=weight.stride(1) == 1 and _lies_in_chunks(weight), has_dropout=has_dropout, schedule=schedule,
        **_limits(x.device),
    )  # fmt: skip
    return _told(launches)


def _limits(device: torch.device) -> dict[str, int]:
    """Of a GPU, as plans are told."""
    gpu: Any = torch.cuda.get_device_properties(device)
    return {
        "sms": gpu.multi_processor_count,
        "shared_per_block": gpu.shared_memory_per_block_optin,
        "capability": 10 * gpu.major + gpu.minor,
    }


def _told(launches: Any) -> Verdict:
    """What a plan comes to: of several launches, who multiplies by the weight."""
    launches = launches if isinstance(launches, list) else [launches]
    by_schedule = {launch["schedule"]: launch for launch in reversed(launches)}
    told = by_schedule.get(WGMMA) or by_schedule.get("cublas") or launches[0]
    return Verdict(told["schedule"], told["reason"])
