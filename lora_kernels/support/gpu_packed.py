"""How GPUs decode a quantised weight, and multiply by it."""

from __future__ import annotations

import torch

from ..plain import LOW_PRECISION
from ..spec import Verdict
from . import cuda, cuda_or_triton, triton
from .packed import LAYOUTS, NO_KERNEL, TORCH_DECODED

DECODE = Verdict("decode", "one pass over the packed weight")
COMPOSED = Verdict("dequantize + product", "one launch decodes the weight; what multiplies by a plain one goes on")
"""Decoded once per call, and not by the tiles of a product: these would all decode the weights that they share. The
memory is the allocator's, in the order of the stream: what one layer frees is the next one's.
"""
SLABS = Verdict("slabs", "many rows: slabs of the weight are decoded, one after the other, for the vendor's GEMM")
_SLAB_AREA = 1 << 24
"""Elements of y, or of dX, that a slab makes at least: four waves of tiles of 128 x 256 on 132 SMs, of which the last
need not be full. For 8192 rows, 2048 columns.
"""
_SLAB_STEP = 2048
"""Slabs begin at multiples of what a warp decodes: where blocks of scales begin, and 16 packed bytes."""
_VENDOR = (80, 87, 90, 100, 101, 103, 110)
"""Compute capabilities whose large products are the vendor's GEMM: ``prefers_cublas`` of csrc/config/lora_linear.h. Its
result may be a part of a matrix; that of other kernels is a matrix of its own, which would have to be copied.
"""
FEW_ROWS = Verdict("decode", "few rows: one launch streams the packed weight, which it decodes in registers")
FEW_ROWS_LAYOUTS = ("codes4",)
MAX_RANK, LEAST_BLOCK = 64, 64
"""What that launch serves: ``serves_packed`` of csrc/config/lora_linear_packed.h."""


def refusal(backend: str, device: torch.device) -> Verdict | None:
    """Why no kernel of "cuda" or "triton" runs on ``device``; None where one does."""
    return cuda.refusal(device) if backend == "cuda" else triton.refusal(device)


def decode_verdict(backend: str, device: torch.device, layout: str) -> Verdict:
    """Whether, and how, these decode a weight."""
    return (refusal(backend, device) or DECODE) if layout in LAYOUTS else NO_KERNEL


def composed_verdict(backend: str, device: torch.device, layout: str) -> Verdict:
    """Whether, and how, they multiply by a weight that is decoded before."""
    return refusal(backend, device) or (COMPOSED if layout in LAYOUTS else TORCH_DECODED)


def most_decoded_rows(capability: tuple[int, int]) -> int:
    """Up to so many rows it is taken for faster: ``most_decoded_rows`` of csrc/config/lora_linear_packed.h, which says
    why.
    """
    return 32 if capability[0] == 10 else 64


def is_few_rows(x: torch.Tensor, data: torch.Tensor, layout: str, block: int, rank: int, has_dropout: bool) -> bool:
    """Whether the CUDA kernel of few rows serves ``x`` by packed weights, which ``data`` holds."""
    return (
        layout in FEW_ROWS_LAYOUTS
        and x.dtype in LOW_PRECISION
        and 0 < x.shape[:-1].numel() <= most_decoded_rows(cuda.capability(x.device))
        and rank <= MAX_RANK
        and not has_dropout
        and block >= LEAST_BLOCK
        and block & (block - 1) == 0
        and data.data_ptr() % 16 == 0
    )


def slab(rows: int, length: int) -> int:
    """How many of the ``length`` rows or columns of a weight are decoded at a time for a product with ``rows`` rows:
    all, where they are not two slabs.
    """
    size = -(-_SLAB_AREA // rows)
    size += -size % _SLAB_STEP
    return size if 2 * size <= length else length


def has_slabs(x: torch.Tensor, length: int, depth: int, layout: str) -> bool:
    """Whether the kernels decode slabs for a product with the rows of ``x`` which torch forms; arguments of
    ``is_slabs``.
    """
    rows = x.shape[:-1].numel()
    if layout not in LAYOUTS or x.dtype not in LOW_PRECISION or rows == 0 or length % 8 or depth % 8:
        return False
    return slab(rows, length) < length


def is_slabs(
    x: torch.Tensor, length: int, depth: int, layout: str, lora_A: torch.Tensor, has_dropout: bool, *, backward: bool
) -> bool:  # fmt: skip
    """Whether the rows of ``x`` are multiplied by slabs of the weight, with an adapter.

    Args:
        length, depth: N and K in the forward, K and N in the backward.
    """
    if not has_slabs(x, length, depth, layout):
        return False
    product = cuda_or_triton.cuda_or_triton(x, length, depth, lora_A, has_dropout, backward=backward).schedule
    major, minor = cuda.capability(x.device)
    return product == "cublas" or (product == cuda.TENSOR_CORES.schedule and 10 * major + minor in _VENDOR)
