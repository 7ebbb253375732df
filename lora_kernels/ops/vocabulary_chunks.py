"""The walk of ``linear_cross_entropy``: logits of some rows at a time, their loss, what their gradient adds up to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..plain import LOW_PRECISION, sum_dtype
from ..support import cpu
from . import cross_entropy_rows, frozen_linear
from .cross_entropy_rows import Loss, Rows

CPU_AREA = 1 << 23
"""Logits of a chunk: 32 MB, which are 256 rows of 32768 columns. The weight is read twice for every chunk."""
GPU_AREA = 1 << 26
"""256 MB, which are 512 rows: a product of a few waves of tiles."""
LEAST_ROWS = 64
"""Of a chunk, however many columns there are: fewer would make a product a matter of reading the weight."""


class Head(NamedTuple):
    """weight [V, K] and bias [V] of a linear layer, and its adapter: lora_A [rank, K] and lora_B [V, rank], or None."""

    weight: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    scaling: float


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool = False
    weight: bool = False
    A: bool = False
    B: bool = False
    bias: bool = False


class Tools(NamedTuple):
    """What a backend walks with. "Wide" is float32, and float64 for operands of that."""

    rows: Rows
    product: Callable[[Tensor, Tensor], Tensor]
    """a [m, k] times b [k, n], of the operands' dtype, in a wide dtype."""
    logits: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """x Wᵀ + bias of x's dtype, in a wide one: a tensor of its own, contiguous."""
    grad_x: Callable[[Tensor, Tensor], Tensor]
    """The gradient of logits times W, in a wide dtype."""
    operands: torch.dtype
    """What the gradient of logits is rounded to, and what is multiplied by it."""
    area: int
    skips_ignored: bool
    """Whether rows whose label is ignored are left out, which a GPU could only do by telling the host."""


def losses_and_gradients(
    tools: Tools, x: Tensor, labels: Tensor, head: Head, loss: Loss, needs: Needs, grad_losses: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of every row of x [M, K], and the gradients of x, weight, lora_A, lora_B and bias that are asked for;
    empty tensors for the others. That of x is of its dtype, the others, which are sums over rows, are wide.

    Args:
        labels: [M], int64.
        grad_losses: [M], wide: the gradient of each loss; None where no gradient is needed.

    Raises:
        ValueError: a label on the CPU is no column. On a GPU its loss is NaN.
    """
    rows, columns = len(x), head.weight.shape[0]
    kept = _rows_that_count(labels, loss.ignore_index, columns) if labels.device.type == "cpu" else None
    if not tools.skips_ignored:
        kept = None
    count = rows if kept is None else len(kept)
    losses = x.new_zeros(rows, dtype=sum_dtype(x.dtype))
    sums = _Sums(tools, x, head, needs, is_whole=kept is None)
    step = max(LEAST_ROWS, tools.area // columns // LEAST_ROWS * LEAST_ROWS)
    for begin in range(0, count, step):
        these = slice(begin, begin + step) if kept is None else kept[begin : begin + step]
        x_rows = x[these]
        logits = tools.logits(x_rows, head.weight, head.bias)
        s = sums.add_branch(logits, x_rows)
        weights = None if grad_losses is None else grad_losses[these]
        losses[these], gradient = tools.rows(logits, labels[these], weights, loss, tools.operands)
        if grad_losses is not None:
            sums.add(these, x_rows, s, gradient)
        del logits, gradient  # two chunks would be there at a time
    return losses, sums.gradients()


def _rows_that_count(labels: Tensor, ignore_index: int, columns: int) -> Tensor | None:
    """Rows whose label is not ignored; None if all are such."""
    counts = labels != ignore_index
    outside = counts & ((labels < 0) | (labels >= columns))
    if outside.any():
        worst = labels[outside][0].item()
        raise ValueError(
            f"linear_cross_entropy: labels must be in [0, {columns}) or ignore_index={ignore_index}, got {worst}"
        )
    return None if counts.all() else counts.nonzero().squeeze(1)


class _Sums:
    """Gradients, to which one chunk after the other is added. Sums over rows are formed in a wide dtype, and stay so:
    what is yet to be divided by the number of rows, may not fit into float16.
    """

    def __init__(self, tools: Tools, x: Tensor, head: Head, needs: Needs, *, is_whole: bool) -> None:
        self._tools, self._head, self._needs = tools, head, needs
        self._x, self._wide = x, sum_dtype(x.dtype)
        self._lora_A = self._lora_B = self._wide_B = None
        if head.lora_A is not None and head.lora_B is not None:
            self._lora_A, self._lora_B = head.lora_A.to(tools.operands), head.lora_B.to(tools.operands)
            self._wide_B = head.lora_B.to(self._wide)
        self.x = x.new_empty(0)
        if needs.x:
            self.x = (x.new_empty if is_whole else x.new_zeros)(x.shape)
        self.weight = self._zeros(head.weight, needs.weight)
        self.A = self._zeros(head.lora_A, needs.A)
        self.B = self._zeros(head.lora_B, needs.B)
        self.bias = self._zeros(head.bias, needs.bias)

    def _zeros(self, like: Any, needed: bool) -> Tensor:
        return self._x.new_zeros(like.shape if needed else 0, dtype=self._wide)

    def add_branch(self, logits: Tensor, x: Tensor) -> Tensor | None:
        """Adds scaling · s Bᵀ to the logits of some rows; returns s = x Aᵀ, None without an adapter."""
        if self._lora_A is None or self._wide_B is None:
            return None
        s = self._tools.product(x.to(self._tools.operands), self._lora_A.t())
        logits.addmm_(s, self._wide_B.t(), alpha=self._head.scaling)
        return s

    def add(self, rows: slice | Tensor, x: Tensor, s: Tensor | None, gradient: Tensor) -> None:
        """What the gradient of these rows' logits comes to."""
        product, operands = self._tools.product, self._tools.operands
        x = x.to(operands)
        grad_s = None
        if self._lora_B is not None and (self._needs.x or self._needs.A):
            grad_s = product(gradient, self._lora_B) * self._head.scaling
        if self._needs.x:
            grad_x = self._tools.grad_x(gradient, self._head.weight)
            if grad_s is not None and self._head.lora_A is not None:
                grad_x.addmm_(grad_s, self._head.lora_A.to(self._wide))
            self.x[rows] = grad_x.to(self.x.dtype)
        if self._needs.weight:
            self._add_product(self.weight, gradient.t(), x)
        if self._needs.A and grad_s is not None:
            self.A += product(grad_s.to(operands).t(), x)
        if self._needs.B and s is not None:
            self.B.add_(product(gradient.t(), s.to(operands)), alpha=self._head.scaling)
        if self._needs.bias:
            self.bias += gradient.sum(0, dtype=self._wide)

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == total.dtype:
            total.addmm_(a, b)
            return
        step = max(1, self._tools.area // b.shape[1])  # a product as large as the weight would be as large as it is
        for begin in range(0, len(total), step):
            total[begin : begin + step] += self._tools.product(a[begin : begin + step], b)

    def gradients(self) -> tuple[Tensor, ...]:
        """Of x, weight, lora_A, lora_B and bias."""
        return self.x, self.weight, self.A, self.B, self.bias


# --------------------------------------------------------------------------------------------------------- tools


def plain_tools(x: Tensor) -> Tools:
    """Plain torch code, on any device. Products of 16 bits are rounded to these once, but for sums over rows that
    float16 may not hold.
    """
    wide = sum_dtype(x.dtype)
    tools = _by_products(x, lambda a, b: (a @ b).to(wide), cross_entropy_rows.reference, x.is_cpu)
    return tools._replace(product=lambda a, b: a.to(wide) @ b.to(wide)) if x.dtype == torch.float16 else tools


def cuda_tools(x: Tensor) -> Tools:
    """The vendor's products, and the CUDA kernel for what is between them."""
    return _by_products(x, _gpu_product, cross_entropy_rows.native, False)


def triton_tools(x: Tensor) -> Tools:
    """The same with the Triton kernel."""
    from ..triton_kernels import cross_entropy_rows as kernels

    def rows(logits: Tensor, labels: Tensor, grad_losses: Tensor | None, loss: Loss, dtype: torch.dtype) -> Any:
        gradient = cross_entropy_rows.in_place_of(logits, dtype)
        return kernels.losses(logits, labels, grad_losses, gradient, *loss), gradient

    return _by_products(x, _gpu_product, rows, False)


def _by_products(x: Tensor, product: Callable[[Tensor, Tensor], Tensor], rows: Rows, skips_ignored: bool) -> Tools:
    def logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = product(x, weight.t())
        return z if bias is None else z.add_(bias)

    area = CPU_AREA if x.is_cpu else GPU_AREA
    return Tools(rows, product, logits, product, x.dtype, area, skips_ignored)


def _gpu_product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in LOW_PRECISION:
        return a @ b
    if a.is_cpu:  # the interpreter's
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def cpu_tools() -> Tools:
    """The schedules of ``frozen_linear``. What is small, and everything behind the logits, is of float32."""
    return Tools(
        cross_entropy_rows.native, torch.mm, _cpu_logits, _cpu_grad_x, torch.float32, CPU_AREA, skips_ignored=True
    )


_wide_linear = dispatch.define_native(
    "wide_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty((len(x), len(weight))),
)
_wide_linear_backward = dispatch.define_native(
    "wide_linear_backward",
    "(Tensor grad_y, Tensor weight) -> Tensor",
    lambda grad_y, weight: grad_y.new_empty((len(grad_y), weight.shape[1])),
)


def _cpu_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    verdict = cpu.matmul_verdict(x, weight)
    if verdict is cpu.UPCAST:
        return _wide_linear(x.float(), weight, bias)
    return dispatch.native(frozen_linear.SPEC)(x, weight, bias, verdict.schedule).float()


def _cpu_grad_x(gradient: Tensor, weight: Tensor) -> Tensor:
    verdict = cpu.product_verdict(weight.dtype, len(gradient), weight, is_k_by_n=True)
    if verdict is cpu.UPCAST:
        return _wide_linear_backward(gradient, weight)
    product = dispatch.native(frozen_linear.BACKWARD)
    return product(gradient.to(weight.dtype), weight, verdict.schedule).float()
