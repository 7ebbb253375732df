"""The kernels of ``prompt_embedding`` and ``prompt_embedding_backward``.

Forward is one launch. Its first programs, one per sample, write what stands beside the embeddings: mask, positions (a
running sum over the sample), labels, and the sample's row of ``layout``. The others copy a tile of the output's rows
each, from the embedding table or ``inputs_embeds``, and from the prompt. No program waits for another: with pads on the
left, each looks for the first real token itself, which reads the mask as far as that, out of the L2 cache.

An id or task out of range is never read: its rows are NaN, so that the loss shows it, and with ``TRITON_DEBUG=1`` the
kernel stops there. A prompt length out of range is clamped.

The gradients of the prompt and of the table are sums of rows, added up one after the other in float32 in the order of
the samples, and of the tokens in them: the bits are those of the CPU kernels, on every run. No float atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launching import LAST_CONSTANT, Launch, on_device

# ------------------------------------------------------------------------------------------------ device code


class Vector(NamedTuple):
    """[batch] in global memory; strides of all of these in elements."""

    data: Any
    stride: Any


class Column(NamedTuple):
    """[batch, tokens]."""

    data: Any
    batch_stride: Any
    stride: Any


class Rows(NamedTuple):
    """[batch or tasks, rows, hidden]; a table [rows, hidden] has batch stride 0."""

    data: Any
    batch_stride: Any
    row_stride: Any
    stride: Any


class ForwardTask(NamedTuple):
    """Operands of ``_forward``; sizes that a Python program varies travel beside it. None: not given, or not wanted."""

    source: Rows  # the table if there are ids, else inputs_embeds
    ids: Any  # Column or None
    vocabulary: Any
    prompt: Rows
    tasks: Any
    task_ids: Any  # Vector or None
    lengths: Any  # Vector or None
    mask: Any  # Column of integers, the bits of the mask's elements, or None
    labels: Any  # Column or None
    out: Any  # [batch, rows, hidden]; all outputs are contiguous
    out_mask: Any  # [batch, rows], integers like mask
    positions: Any  # int64 [batch, rows]
    out_labels: Any  # [batch, rows] or None
    layout: Any  # int64 [batch, 3]
    hidden: Any
    end: None = LAST_CONSTANT


class GradientTask(NamedTuple):
    """Operands of the kernels of the backward."""

    grad: Rows
    layout: Any  # int64 [batch, 3]
    task_ids: Any  # Vector or None
    out: Any  # contiguous, its last dimension is hidden
    hidden: Any
    end: None = LAST_CONSTANT


_IGNORED_LABEL = tl.constexpr(-100)


@triton.jit
def _first_real_token(mask, b, tokens, SIGNIFICANT: tl.constexpr, BLOCK: tl.constexpr):
    """``tokens`` if there is none."""
    found = tokens
    t0 = tokens * 0
    while (t0 < tokens) & (found == tokens):
        t = t0 + tl.arange(0, BLOCK)
        bits = tl.load(mask.data + b * mask.batch_stride + t.to(tl.int64) * mask.stride, mask=t < tokens, other=0)
        found = tl.min(tl.where((bits & SIGNIFICANT) != 0, t, tokens), 0)
        t0 += BLOCK
    return found


@triton.jit
def _place(task, b, tokens, prompt_rows, LEFT: tl.constexpr, SIGNIFICANT: tl.constexpr, BLOCK: tl.constexpr):
    """(first, split, length) of a sample, which the op's ``_layout`` defines. Int32, like all counts of rows."""
    length = prompt_rows
    if task.lengths is not None:
        given = tl.load(task.lengths.data + b * task.lengths.stride)
        tl.device_assert((given >= 0) & (given <= prompt_rows), "prompt_embedding: prompt_lengths out of range")
        length = tl.minimum(tl.maximum(given, 0), prompt_rows).to(tl.int32)
    first = 0
    split = 0
    if LEFT:
        first = prompt_rows - length
        if task.mask is not None:
            split = _first_real_token(task.mask, b, tokens, SIGNIFICANT, BLOCK)
    return first, split, length


@triton.jit
def _sources(r, first, split, length, tokens):
    """(token, is_token, slot, is_prompt): where row r of a sample comes from; a row that is neither is zero."""
    slot = r - first - split
    is_prompt = (slot >= 0) & (slot < length)
    token = r - first - tl.where(slot < 0, 0, length)
    is_token = (token >= 0) & (token < tokens) & (is_prompt == 0)
    return token.to(tl.int64), is_token, slot.to(tl.int64), is_prompt


@triton.jit
def _write_columns(task, b, tokens, prompt_rows,
                   LEFT: tl.constexpr, ONE: tl.constexpr, SIGNIFICANT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Mask, positions, labels and place of a sample."""
    first, split, length = _place(task, b, tokens, prompt_rows, LEFT, SIGNIFICANT, BLOCK)
    tl.store(task.layout + b * 3, first)
    tl.store(task.layout + b * 3 + 1, split)
    tl.store(task.layout + b * 3 + 2, length)
    rows = tokens + prompt_rows
    real_before = rows * 0
    for r0 in range(0, rows, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        token, is_token, _, is_prompt = _sources(r, first, split, length, tokens)
        at = b * rows + r
        if task.mask is not None:
            bits = tl.load(task.mask.data + b * task.mask.batch_stride + token * task.mask.stride, mask=is_token,
                           other=0)  # fmt: skip
        else:
            bits = is_token.to(task.out_mask.dtype.element_ty)
        bits = tl.where(is_prompt, ONE, bits).to(task.out_mask.dtype.element_ty)
        tl.store(task.out_mask + at, bits, mask=r < rows)
        real = ((bits & SIGNIFICANT) != 0).to(tl.int32)
        positions = tl.maximum(real_before + tl.cumsum(real, 0) - 1, 0)
        tl.store(task.positions + at, positions.to(tl.int64), mask=r < rows)
        real_before += tl.sum(real, 0)
        if task.labels is not None:
            labels = tl.load(task.labels.data + b * task.labels.batch_stride + token * task.labels.stride,
                             mask=is_token, other=_IGNORED_LABEL)  # fmt: skip
            tl.store(task.out_labels + at, labels, mask=r < rows)


@triton.jit
def _pointers(rows, b, r, h):
    """Pointers to the elements [b, r, h]."""
    return (rows.data + b * rows.batch_stride + r * rows.row_stride)[:, None] + h.to(tl.int64)[None, :] * rows.stride


@triton.jit
def _write_rows(task, b, row_block, hidden_block, tokens, prompt_rows,
                LEFT: tl.constexpr, SIGNIFICANT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                BLOCK_HIDDEN: tl.constexpr, BLOCK_SCAN: tl.constexpr):  # fmt: skip
    """A tile of the embeddings."""
    first, split, length = _place(task, b, tokens, prompt_rows, LEFT, SIGNIFICANT, BLOCK_SCAN)
    rows = tokens + prompt_rows
    r = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    h = hidden_block * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = (h < task.hidden)[None, :]
    source_row, is_token, slot, is_prompt = _sources(r, first, split, length, tokens)
    token_valid = is_token
    if task.ids is not None:
        source_row = tl.load(
            task.ids.data + b * task.ids.batch_stride + source_row * task.ids.stride, mask=is_token, other=0
        ).to(tl.int64)
        token_valid = is_token & (source_row >= 0) & (source_row < task.vocabulary)
        tl.device_assert(token_valid == is_token, "prompt_embedding: input_ids out of range")
    nan = float("nan")
    tile = tl.load(_pointers(task.source, b, source_row, h), mask=token_valid[:, None] & inside, other=nan)
    tile = tl.where(is_token[:, None], tile, 0.0)
    # Most tiles have no prompt rows.
    if (row_block * BLOCK_ROWS < first + split + length) & ((row_block + 1) * BLOCK_ROWS > first + split):
        number = b * 0
        prompt_valid = is_prompt
        if task.task_ids is not None:
            number = tl.load(task.task_ids.data + b * task.task_ids.stride).to(tl.int64)
            task_fits = (number >= 0) & (number < task.tasks)
            tl.device_assert(task_fits, "prompt_embedding: task_ids out of range")
            # Triton 3.9's interpreter makes no mask of a scalar and a block.
            prompt_valid = is_prompt & (slot < tl.where(task_fits, length, 0))
        prompt = tl.load(_pointers(task.prompt, number, slot, h), mask=prompt_valid[:, None] & inside, other=nan)
        tile = tl.where(is_prompt[:, None], prompt.to(tile.dtype), tile)
    at = (b * rows + r)[:, None] * task.hidden + h[None, :]
    tl.store(task.out + at, tile, mask=(r < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["batch", "tokens", "prompt_rows"])
def _forward(task, batch, tokens, prompt_rows,
             LEFT: tl.constexpr, ONE: tl.constexpr, SIGNIFICANT: tl.constexpr,
             BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_SCAN: tl.constexpr):  # fmt: skip
    """ONE: the bits of a one in the mask; SIGNIFICANT: those that make an element of it non-zero."""
    program = tl.program_id(0)
    if program < batch:
        _write_columns(task, program.to(tl.int64), tokens, prompt_rows, LEFT, ONE, SIGNIFICANT, BLOCK_SCAN)
    else:
        hidden_blocks = tl.cdiv(task.hidden, BLOCK_HIDDEN)
        row_blocks = tl.cdiv(tokens + prompt_rows, BLOCK_ROWS)
        tile = (program - batch) // hidden_blocks
        _write_rows(task, (tile // row_blocks).to(tl.int64), tile % row_blocks, (program - batch) % hidden_blocks,
                    tokens, prompt_rows, LEFT, SIGNIFICANT, BLOCK_ROWS, BLOCK_HIDDEN, BLOCK_SCAN)  # fmt: skip


@triton.jit
def _place_of(layout, b):
    """A sample's place as ``_write_columns`` left it."""
    return tl.load(layout + b * 3), tl.load(layout + b * 3 + 1), tl.load(layout + b * 3 + 2)


@triton.jit(do_not_specialize=["batch", "tokens", "prompt_rows"])
def _prompt_gradient(task, batch, tokens, prompt_rows,
                     BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """A tile of ``out`` [tasks, prompt_rows, hidden]. UNROLL samples are loaded before the first is added."""
    hidden_blocks = tl.cdiv(task.hidden, BLOCK_HIDDEN)
    row_blocks = tl.cdiv(prompt_rows, BLOCK_ROWS)
    tile = tl.program_id(0) // hidden_blocks
    number, row_block = tile // row_blocks, tile % row_blocks
    slot = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    h = tl.program_id(0) % hidden_blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = (h < task.hidden)[None, :]
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for b0 in range(0, batch, UNROLL):
        for i in tl.static_range(UNROLL):
            # Samples beyond the last repeat it, with no rows.
            b = tl.minimum(b0 + i, batch - 1).to(tl.int64)
            first, split, length = _place_of(task.layout, b)
            length = tl.where(b0 + i < batch, length, 0)
            if task.task_ids is not None:
                length = tl.where(tl.load(task.task_ids.data + b * task.task_ids.stride) == number, length, 0)
            r = first + split + slot
            valid = (slot < length) & (slot < prompt_rows) & (r >= 0) & (r < tokens + prompt_rows)
            rows = tl.load(_pointers(task.grad, b, r, h), mask=valid[:, None] & inside, other=0.0)
            accumulator += rows.to(tl.float32)
    at = (number.to(tl.int64) * prompt_rows + slot)[:, None] * task.hidden + h[None, :]
    tl.store(task.out + at, accumulator.to(task.out.dtype.element_ty), mask=(slot < prompt_rows)[:, None] & inside)


@triton.jit
def _row_of(layout, b, token):
    """Row of the output that holds a token."""
    first, split, length = _place_of(layout, b)
    return first + token + tl.where(token < split, 0, length)


@triton.jit(do_not_specialize=["tokens", "prompt_rows"])
def _embeds_gradient(task, tokens, prompt_rows, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr):
    """A tile of ``out`` [batch, tokens, hidden]: the tokens' rows of the gradient."""
    hidden_blocks = tl.cdiv(task.hidden, BLOCK_HIDDEN)
    row_blocks = tl.cdiv(tokens, BLOCK_ROWS)
    tile = tl.program_id(0) // hidden_blocks
    b, t = (tile // row_blocks).to(tl.int64), tile % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    h = tl.program_id(0) % hidden_blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    r = _row_of(task.layout, b, t)
    inside = (h < task.hidden)[None, :]
    valid = (t < tokens) & (r >= 0) & (r < tokens + prompt_rows)
    rows = tl.load(_pointers(task.grad, b, r, h), mask=valid[:, None] & inside, other=0.0)
    tl.store(task.out + (b * tokens + t)[:, None] * task.hidden + h[None, :], rows, mask=(t < tokens)[:, None] & inside)


@triton.jit(do_not_specialize=["count", "tokens", "prompt_rows"])
def _weight_gradient(task, ids, order, vocabulary, count, tokens, prompt_rows,
                     BLOCK_HIDDEN: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Part of the row of ``out`` [vocabulary, hidden] of an id, by the program of the id's first occurrence.

    ids: all of them, sorted. order: int64, where each was, numbered through the batch; ascending for equal ids.
    """
    hidden_blocks = tl.cdiv(task.hidden, BLOCK_HIDDEN)
    start = tl.program_id(0) // hidden_blocks
    h = tl.program_id(0) % hidden_blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = h < task.hidden
    number = tl.load(ids + start).to(tl.int64)
    is_first = (start == 0) | (tl.load(ids + start - 1, mask=start > 0, other=0) != number)
    if is_first & (number >= 0) & (number < vocabulary):
        accumulator = tl.zeros((BLOCK_HIDDEN,), tl.float32)
        j = start
        goes_on = start < count
        while goes_on:
            for i in tl.static_range(UNROLL):
                goes_on = (j + i < count) & (tl.load(ids + j + i, mask=j + i < count, other=-1) == number)
                at = tl.load(order + j + i, mask=goes_on, other=0)
                b = at // tokens
                r = _row_of(task.layout, b, at % tokens)
                valid = goes_on & (r >= 0) & (r < tokens + prompt_rows)
                pointers = task.grad.data + b * task.grad.batch_stride + r * task.grad.row_stride
                exists = h < tl.where(valid, task.hidden, 0)
                row = tl.load(pointers + h.to(tl.int64) * task.grad.stride, mask=exists, other=0.0)
                accumulator += row.to(tl.float32)
            j += UNROLL
        tl.store(task.out + number * task.hidden + h, accumulator.to(task.out.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------------- host code

_UNROLL = 4
_SCAN = 1024
"""Elements of a sample's columns that a program handles at a time."""


def forward(
    prompt: Tensor, input_ids: Tensor | None, weight: Tensor | None, inputs_embeds: Tensor | None,
    attention_mask: Tensor | None, labels: Tensor | None, task_ids: Tensor | None, prompt_lengths: Tensor | None,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op ``prompt_embedding``: embeddings, mask, positions, labels (empty where none were given) and layout."""
    text: Any = inputs_embeds if input_ids is None else input_ids
    table: Any = weight if inputs_embeds is None else inputs_embeds
    batch, tokens = text.shape[:2]
    rows = prompt.shape[-2] + tokens
    device = prompt.device
    out = table.new_empty((batch, rows, prompt.shape[-1]))
    mask_dtype = torch.int64 if attention_mask is None else attention_mask.dtype
    out_mask = torch.empty((batch, rows), dtype=mask_dtype, device=device)
    positions = torch.empty((batch, rows), dtype=torch.int64, device=device)
    out_labels = None if labels is None else labels.new_empty((batch, rows))
    layout = torch.empty((batch, 3), dtype=torch.int64, device=device)
    outputs = out, out_mask, positions, out_labels, layout
    with on_device(prompt):
        forward_launch(
            outputs, prompt, input_ids, weight, inputs_embeds, attention_mask, labels, task_ids, prompt_lengths, left
        ).run()
    if out_labels is None:
        out_labels = torch.empty(0, dtype=torch.int64, device=device)
    return out, out_mask, positions, out_labels, layout


def backward(
    grad: Tensor, layout: Tensor, input_ids: Any, task_ids: Tensor | None, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, vocabulary: int, need_prompt: bool, need_weight: bool, need_embeds: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op ``prompt_embedding_backward``; empty where not needed. The ids are sorted by torch, stably."""
    batch, rows, hidden = grad.shape
    prompt_shape = (tasks, prompt_rows, hidden) if tasks else (prompt_rows, hidden)
    grad_prompt = grad.new_empty(prompt_shape if need_prompt else 0, dtype=prompt_dtype)
    grad_weight = grad.new_zeros((vocabulary, hidden) if need_weight else 0)
    grad_embeds = grad.new_empty((batch, rows - prompt_rows, hidden) if need_embeds else 0)
    with on_device(grad):
        if need_prompt:
            prompt_gradient_launch(grad_prompt, grad, layout, task_ids, prompt_rows).run()
        if need_weight:
            ids, order = input_ids.reshape(-1).sort(stable=True)
            weight_gradient_launch(grad_weight, grad, layout, ids, order, prompt_rows).run()
        if need_embeds:
            embeds_gradient_launch(grad_embeds, grad, layout, prompt_rows).run()
    return grad_prompt, grad_weight, grad_embeds


def forward_launch(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], prompt: Tensor, input_ids: Tensor | None,
    weight: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None,
    task_ids: Tensor | None, prompt_lengths: Tensor | None, left: bool,
) -> Launch:  # fmt: skip
    """How ``outputs`` (embeddings, mask, positions, labels, layout) are filled."""
    out, out_mask, positions, out_labels, layout = outputs
    batch, rows, hidden = out.shape
    tokens = rows - prompt.shape[-2]
    one, significant = _mask_bits(out_mask.dtype)
    table: Any = weight
    task = ForwardTask(
        source=Rows(table, 0, *table.stride()) if inputs_embeds is None else _rows(inputs_embeds),
        ids=_column(input_ids), vocabulary=0 if weight is None else weight.shape[0],
        prompt=_rows(prompt) if prompt.dim() == 3 else Rows(prompt, 0, *prompt.stride()),
        tasks=prompt.shape[0] if prompt.dim() == 3 else 0,
        task_ids=_vector(task_ids), lengths=_vector(prompt_lengths),
        mask=None if attention_mask is None else _column(_bits(attention_mask)), labels=_column(labels),
        out=out, out_mask=_bits(out_mask), positions=positions, out_labels=out_labels, layout=layout, hidden=hidden,
    )  # fmt: skip
    tile = configs.copy_tile(hidden, out.element_size())
    tiles = batch * configs.blocks(rows, tile.rows) * configs.blocks(hidden, tile.columns)
    constants = {"LEFT": left, "ONE": one, "SIGNIFICANT": significant, "BLOCK_SCAN": _SCAN}
    return _launch(_forward, batch + tiles, (task, batch, tokens, rows - tokens), tile, constants)


def prompt_gradient_launch(
    grad_prompt: Tensor, grad: Tensor, layout: Tensor, task_ids: Tensor | None, prompt_rows: int
) -> Launch:
    """How ``grad_prompt`` [tasks, prompt_rows, hidden], or [prompt_rows, hidden] without tasks, is computed."""
    batch, rows, hidden = grad.shape
    tile = configs.sum_tile(hidden, grad.element_size())
    tasks = 1 if task_ids is None else grad_prompt.shape[0]
    tiles = tasks * configs.blocks(prompt_rows, tile.rows) * configs.blocks(hidden, tile.columns)
    task = GradientTask(_rows(grad), layout.contiguous(), _vector(task_ids), grad_prompt, hidden)
    return _launch(_prompt_gradient, tiles, (task, batch, rows - prompt_rows, prompt_rows), tile, {"UNROLL": _UNROLL})


def embeds_gradient_launch(grad_embeds: Tensor, grad: Tensor, layout: Tensor, prompt_rows: int) -> Launch:
    """How ``grad_embeds`` [batch, tokens, hidden] is filled."""
    batch, tokens, hidden = grad_embeds.shape
    tile = configs.copy_tile(hidden, grad.element_size())
    tiles = batch * configs.blocks(tokens, tile.rows) * configs.blocks(hidden, tile.columns)
    task = GradientTask(_rows(grad), layout.contiguous(), None, grad_embeds, hidden)
    return _launch(_embeds_gradient, tiles, (task, tokens, prompt_rows), tile, {})


def weight_gradient_launch(
    grad_weight: Tensor, grad: Tensor, layout: Tensor, ids: Tensor, order: Tensor, prompt_rows: int
) -> Launch:
    """How the rows of ``grad_weight`` [vocabulary, hidden] that have an id are computed; ``ids`` is sorted."""
    rows, hidden = grad.shape[1:]
    columns = min(triton.next_power_of_2(max(hidden, 1)), 1024)
    task = GradientTask(_rows(grad), layout.contiguous(), None, grad_weight, hidden)
    args = (task, ids, order, grad_weight.shape[0], ids.numel(), rows - prompt_rows, prompt_rows)
    programs = ids.numel() * configs.blocks(hidden, columns)
    constants = {"BLOCK_HIDDEN": columns, "UNROLL": _UNROLL}
    # One warp would be short of registers for the addresses of so wide a row.
    return Launch(_weight_gradient, (programs,), args, constants, num_warps=2, num_stages=1)


def _launch(kernel: Any, programs: int, args: tuple, tile: configs.RowTile, constants: dict[str, Any]) -> Launch:
    constants = {"BLOCK_ROWS": tile.rows, "BLOCK_HIDDEN": tile.columns, **constants}
    return Launch(kernel, (programs,), args, constants, num_warps=tile.num_warps, num_stages=1)


def _bits(mask: Tensor) -> Tensor:
    """The elements of a mask as integers: they are copied, whatever their dtype."""
    return mask.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[mask.element_size()])


def _mask_bits(dtype: torch.dtype) -> tuple[int, int]:
    """(bits of 1, bits that make an element non-zero: not the sign of a float)."""
    if not dtype.is_floating_point:
        return 1, -1 if dtype.itemsize > 1 else 0xFF
    one: Any = _bits(torch.ones((), dtype=dtype)).item()
    return one, 2 ** (8 * dtype.itemsize - 1) - 1


def _vector(t: Tensor | None) -> Vector | None:
    return None if t is None else Vector(t, *t.stride())


def _column(t: Tensor | None) -> Column | None:
    return None if t is None else Column(t, *t.stride())


def _rows(t: Tensor) -> Rows:
    return Rows(t, *t.stride())
