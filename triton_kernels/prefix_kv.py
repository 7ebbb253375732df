"""The kernels of ``prefix_kv`` and ``prefix_kv_backward``: a program has some tokens of one head of one part.

Forward reads a tile of the prefix once and writes it for every sample. Backward adds up the samples' rows in float32,
one after the other: the bits are those of the CPU kernels, on every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launching import Launch, on_device

# ------------------------------------------------------------------------------------------------ device code


class Prefix(NamedTuple):
    """[tokens, parts * heads * head_dim] in global memory; strides of these in elements."""

    data: Any
    row_stride: Any
    stride: Any


class Parts(NamedTuple):
    """[parts, batch, heads, tokens, head_dim]."""

    data: Any
    part_stride: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    stride: Any


@triton.jit
def _tile(tokens, heads, head_dim, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(part, head, tokens, columns of the head) of this program."""
    row_blocks = tl.cdiv(tokens, BLOCK_ROWS)
    column_blocks = tl.cdiv(head_dim, BLOCK_COLUMNS)
    tile = tl.program_id(0) // column_blocks
    t = tile % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(0) % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    head = tile // row_blocks
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), t.to(tl.int64), c.to(tl.int64)


@triton.jit
def _prefix_pointers(prefix, part, head, t, c, heads, head_dim):
    column = (part * heads + head) * head_dim + c
    return prefix.data + t[:, None] * prefix.row_stride + column[None, :] * prefix.stride


@triton.jit
def _part_pointers(parts, part, head, t, c):
    """Of the first sample."""
    start = part * parts.part_stride + head * parts.head_stride
    return parts.data + start + t[:, None] * parts.row_stride + c[None, :] * parts.stride


@triton.jit(do_not_specialize=["batch", "tokens"])
def _forward(prefix, out, batch, tokens, heads, head_dim, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    part, head, t, c = _tile(tokens, heads, head_dim, BLOCK_ROWS, BLOCK_COLUMNS)
    exists = (t < tokens)[:, None] & (c < head_dim)[None, :]
    tile = tl.load(_prefix_pointers(prefix, part, head, t, c, heads, head_dim), mask=exists, other=0.0)
    tile = tile.to(out.data.dtype.element_ty)
    pointers = _part_pointers(out, part, head, t, c)
    for _ in range(0, batch):
        tl.store(pointers, tile, mask=exists)
        pointers += out.batch_stride


@triton.jit(do_not_specialize=["batch", "tokens"])
def _backward(grad, grad_prefix, batch, tokens, heads, head_dim,
              BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """UNROLL samples are loaded before the first is added."""
    part, head, t, c = _tile(tokens, heads, head_dim, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (c < head_dim)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    pointers = _part_pointers(grad, part, head, t, c)
    for b in range(0, batch, UNROLL):
        for i in tl.static_range(UNROLL):
            exists = (t < tl.where(b + i < batch, tokens, 0))[:, None] & inside
            rows = tl.load(pointers, mask=exists, other=0.0)
            total += rows.to(tl.float32)
            pointers += grad.batch_stride
    total = total.to(grad_prefix.data.dtype.element_ty)
    exists = (t < tokens)[:, None] & inside
    tl.store(_prefix_pointers(grad_prefix, part, head, t, c, heads, head_dim), total, mask=exists)


# -------------------------------------------------------------------------------------------------- host code

_UNROLL = 4


def forward(prefix: Tensor, layers: int, heads: int, batch: int, copies: bool, dtype: torch.dtype) -> Tensor:
    """The op ``prefix_kv``."""
    tokens, width = prefix.shape
    head_dim = width // (2 * layers * heads)
    out = prefix.new_empty((layers, 2, batch if copies else 1, heads, tokens, head_dim), dtype=dtype)
    with on_device(prefix):
        forward_launch(out.flatten(0, 1), prefix).run()
    return out.expand(-1, -1, batch, -1, -1, -1)


def backward(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The op ``prefix_kv_backward``; gradients that are not evenly spaced parts of one tensor are copied into one."""
    _, heads, tokens, head_dim = grads[0].shape
    grad_prefix = grads[0].new_empty((tokens, len(grads) * heads * head_dim), dtype=dtype)
    with on_device(grads[0]):
        backward_launch(grad_prefix, _as_one(grads)).run()
    return grad_prefix


def _as_one(grads: list[Tensor]) -> Tensor:
    """[parts, batch, heads, tokens, head_dim]; a view where ``unbind`` made them."""
    first = grads[0]
    step = grads[1].storage_offset() - first.storage_offset()
    is_view = all(
        g.stride() == first.stride()
        and g.storage_offset() == first.storage_offset() + i * step
        and g.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, g in enumerate(grads)
    )
    if not is_view or step < 0:
        return torch.stack(grads)
    return first.as_strided((len(grads), *first.shape), (step, *first.stride()))


def forward_launch(out: Tensor, prefix: Tensor) -> Launch:
    """How ``out`` [parts, batch, heads, tokens, head_dim] is filled."""
    return _launch(_forward, Prefix(prefix, *prefix.stride()), out, out.dtype, {}, forward=True)


def backward_launch(grad_prefix: Tensor, grad: Tensor) -> Launch:
    """How ``grad_prefix`` is computed from ``grad`` [parts, batch, heads, tokens, head_dim]."""
    prefix = Prefix(grad_prefix, *grad_prefix.stride())
    return _launch(_backward, prefix, grad, grad.dtype, {"UNROLL": _UNROLL}, forward=False)


def _launch(
    kernel: Any, prefix: Prefix, kv: Tensor, dtype: torch.dtype, constants: dict[str, Any], forward: bool
) -> Launch:
    parts, batch, heads, tokens, head_dim = kv.shape
    size = max(dtype.itemsize, prefix.data.element_size())
    tile = configs.copy_tile(head_dim, size) if forward else configs.sum_tile(head_dim, size)
    programs = parts * heads * configs.blocks(tokens, tile.rows) * configs.blocks(head_dim, tile.columns)
    tensors = (prefix, Parts(kv, *kv.stride())) if forward else (Parts(kv, *kv.stride()), prefix)
    constants = {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, **constants}
    args = (*tensors, batch, tokens, heads, head_dim)
    return Launch(kernel, (programs,), args, constants, num_warps=tile.num_warps, num_stages=1)
