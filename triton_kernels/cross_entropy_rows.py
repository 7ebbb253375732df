"""Cross entropy of rows of logits, and its gradient in their place: a program has a row, which it reads twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launching import Launch, on_device


@triton.jit
def _tanh(x):
    """Within some ulp, near zero too, where the exponential alone would lose them."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 9.0)) + 1.0)
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    far = tl.where(size == size, far, size)  # a minimum swallows NaN
    return tl.where(size < 0.625, p * square * x + x, tl.where(x < 0, -far, far))


@triton.jit
def _score(logits, softcap, logit_scale, HAS_CAP: tl.constexpr):
    z = logits * logit_scale
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit(do_not_specialize=["ignore_index", "label_smoothing", "softcap", "logit_scale"])
def _rows(logits, stride, labels, grad_losses, losses, gradient, gradient_stride, columns, ignore_index,
          label_smoothing, softcap, logit_scale, HAS_GRAD: tl.constexpr, HAS_CAP: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """A label that is ignored makes zeros of its row, another one outside of the columns NaN."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = label != ignore_index
    is_inside = (label >= 0) & (label < columns)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)

    # Each lane has the largest of its columns, the sum of their exponentials over that, and their sum.
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    linear = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        exists = first + lanes < columns
        z = _score(tl.load(logits + first + lanes, mask=exists, other=0.0), softcap, logit_scale, HAS_CAP)
        linear += tl.where(exists, z, 0.0)
        z = tl.where(exists, z, -float("inf"))
        larger = tl.maximum(most, z)
        base = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(most - base) + tl.exp(z - base)
        most = larger
    largest = tl.max(most, 0)
    total = tl.sum(total * tl.exp(most - tl.where(largest == -float("inf"), 0.0, largest)), 0)
    chosen = _score(tl.load(logits + tl.where(is_inside, label, 0)), softcap, logit_scale, HAS_CAP)
    loss = (largest - chosen) + tl.log(total)
    if label_smoothing != 0.0:
        loss += label_smoothing * (chosen - tl.sum(linear, 0) / columns)
    loss = tl.where(counts, tl.where(is_inside, loss, float("nan")), 0.0)
    tl.store(losses + row, loss)

    if HAS_GRAD:
        grad = tl.where(is_inside, tl.load(grad_losses + row), float("nan"))
        per_total = grad / total
        everywhere = grad * label_smoothing / columns
        there = grad * (1.0 - label_smoothing)
        gradient += row * gradient_stride
        for first in range(0, columns, BLOCK):
            c = first + lanes
            exists = c < columns
            z = _score(tl.load(logits + c, mask=exists, other=0.0), softcap, logit_scale, HAS_CAP)
            # Narrow rows overwrite logits: these were read by all threads; others lie behind what is written now.
            tl.debug_barrier()
            g = tl.exp(z - largest) * per_total - everywhere - tl.where(c == label, there, 0.0)
            if HAS_CAP:
                g *= 1.0 - (z / softcap) * (z / softcap)
            g = tl.where(counts, g * logit_scale, 0.0)
            tl.store(gradient + c, g.to(gradient.dtype.element_ty), mask=exists)


# -------------------------------------------------------------------------------------------------- host code


def losses(
    logits: Tensor, labels: Tensor, grad_losses: Tensor | None, gradient: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float,
) -> Tensor:  # fmt: skip
    """The losses [rows], float32; ``gradient`` is written if grad_losses are given, and may be in the logits' place."""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        with on_device(logits):
            launch(
                out, logits, labels, grad_losses, gradient, ignore_index, label_smoothing, softcap, logit_scale
            ).run()
    return out


def launch(
    out: Tensor, logits: Tensor, labels: Tensor, grad_losses: Tensor | None, gradient: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float,
) -> Launch:  # fmt: skip
    """How they are computed."""
    rows, columns = logits.shape
    block = configs.row_block(columns)
    return Launch(
        kernel=_rows,
        grid=(rows,),
        args=(
            logits, logits.stride(0), labels, grad_losses, out, gradient, gradient.stride(0), columns, ignore_index,
            label_smoothing, softcap, logit_scale,
        ),
        constants={"HAS_GRAD": grad_losses is not None, "HAS_CAP": softcap != 0.0, "BLOCK": block},
        num_warps=max(1, block // 256),
        num_stages=1,
    )  # fmt: skip
