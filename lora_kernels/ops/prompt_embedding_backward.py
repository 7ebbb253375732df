"""``prompt_embedding_backward``: the gradients of prompt, table and ``inputs_embeds``: sums of rows of the output's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..plain import FLOATS, are_indices, sum_dtype
from ..reasons import Reason
from ..spec import Kernel, OpSpec, Verdict
from ..support import cuda, fits, triton

_SUM = Verdict("row_sum", "reads the rows of the gradient that are asked for")
_REFUSED_DTYPE = Verdict(None, Reason.DTYPE)


def _reference(
    grad: Tensor, layout: Tensor, input_ids: Any, task_ids: Any, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, vocabulary: int, need_prompt: bool, need_weight: bool, need_embeds: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, hidden = grad.shape[1] - prompt_rows, grad.shape[2]
    first, split, length = layout.unsqueeze(2).unbind(1)

    def rows_at(index: Tensor) -> Tensor:
        return grad.gather(1, index.unsqueeze(2).expand(-1, -1, hidden))

    grad_prompt = grad.new_empty(0, dtype=prompt_dtype)
    grad_weight, grad_embeds = grad.new_empty(0), grad.new_empty(0)
    if need_prompt:
        slot = torch.arange(prompt_rows, device=grad.device)
        used = slot < length
        rows = rows_at((first + split + slot) * used).to(sum_dtype(grad.dtype, prompt_dtype))
        rows = torch.where(used.unsqueeze(2), rows, 0.0)
        shape = (tasks, prompt_rows, hidden)
        total = rows.new_zeros(shape).index_add_(0, task_ids, rows) if tasks else rows.sum(0)
        grad_prompt = total.to(prompt_dtype)
    if need_weight or need_embeds:
        t = torch.arange(tokens, device=grad.device)
        rows = rows_at(first + t + length * (t >= split))
        if need_weight:
            total = grad.new_zeros((vocabulary, hidden), dtype=sum_dtype(grad.dtype))
            total.index_add_(0, input_ids.reshape(-1), rows.reshape(-1, hidden).to(total.dtype))
            grad_weight = total.to(grad.dtype)
        if need_embeds:
            grad_embeds = rows
    return grad_prompt, grad_weight, grad_embeds


def _fake(
    grad: Tensor, layout: Tensor, input_ids: Tensor | None, task_ids: Tensor | None, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, vocabulary: int, need_prompt: bool, need_weight: bool, need_embeds: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, rows, hidden = grad.shape
    prompt_shape = (tasks, prompt_rows, hidden) if tasks else (prompt_rows, hidden)
    return (
        grad.new_empty(prompt_shape if need_prompt else 0, dtype=prompt_dtype),
        grad.new_empty((vocabulary, hidden) if need_weight else 0),
        grad.new_empty((batch, rows - prompt_rows, hidden) if need_embeds else 0),
    )


def _cpu_supports(
    grad: Tensor, layout: Tensor, input_ids: Tensor | None, task_ids: Tensor | None, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, *rest: Any,
) -> Verdict:  # fmt: skip
    served = grad.dtype in FLOATS and prompt_dtype in FLOATS and are_indices(layout, input_ids, task_ids)
    return _SUM if served else _REFUSED_DTYPE


def _cuda_supports(
    grad: Tensor, layout: Tensor, input_ids: Tensor | None, task_ids: Tensor | None, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, *rest: Any,
) -> Verdict:  # fmt: skip
    if not are_indices(layout, input_ids, task_ids):
        return _REFUSED_DTYPE
    batch, rows, hidden = grad.shape
    return cuda.prompt_refusal(grad.device, grad.dtype, prompt_dtype, batch * rows, hidden) or _SUM


def _triton_supports(
    grad: Tensor, layout: Tensor, input_ids: Tensor | None, task_ids: Tensor | None, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, *rest: Any,
) -> Verdict:  # fmt: skip
    batch, rows, hidden = grad.shape
    size = max(batch, tasks), rows, hidden
    return triton.rows_refusal(grad.device, (grad.dtype, prompt_dtype), *size) or _SUM


def _triton_run(schedule: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, layout, input_ids, task_ids, _, prompt_rows, _, _, _, need_weight, _ = args
    fits.check_prompt_embedding_backward(grad, layout, input_ids, task_ids, prompt_rows, need_weight)
    from ..triton_kernels import prompt_embedding

    return prompt_embedding.backward(*args)


def _flops(
    grad: Tensor, layout: Tensor, input_ids: Tensor | None, task_ids: Tensor | None, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, vocabulary: int, need_prompt: bool, need_weight: bool, need_embeds: bool,
) -> int:  # fmt: skip
    batch, rows, hidden = grad.shape
    return batch * hidden * ((prompt_rows if need_prompt else 0) + (rows - prompt_rows if need_weight else 0))


def _bytes(
    grad: Tensor, layout: Tensor, input_ids: Tensor | None, task_ids: Tensor | None, tasks: int, prompt_rows: int,
    prompt_dtype: torch.dtype, vocabulary: int, need_prompt: bool, need_weight: bool, need_embeds: bool,
) -> int:  # fmt: skip
    batch, rows, hidden = grad.shape
    tokens = rows - prompt_rows
    element = grad.element_size()
    prompt = batch * prompt_rows * hidden * element + max(tasks, 1) * prompt_rows * hidden * prompt_dtype.itemsize
    token_rows = batch * tokens * hidden * element
    total = (prompt if need_prompt else 0) + (token_rows if need_weight or need_embeds else 0)
    return total + (vocabulary * hidden * element if need_weight else 0) + (token_rows if need_embeds else 0)


SPEC = dispatch.register(
    OpSpec(
        name="prompt_embedding_backward",
        schema=(
            "(Tensor grad, Tensor layout, Tensor? input_ids, Tensor? task_ids, SymInt tasks, SymInt prompt_rows, "
            "ScalarType prompt_dtype, SymInt vocabulary, bool need_prompt, bool need_weight, bool need_embeds) "
            "-> (Tensor, Tensor, Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports),
        },
        flops=_flops,
        bytes=_bytes,
    )
)
