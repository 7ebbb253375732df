"""Frozen linear layers whose product this package makes faster than torch: which, and where it pays."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from . import dispatch
from .class_swaps import in_place_of
from .functional.lora import frozen_linear
from .plain import LOW_PRECISION, PLAIN_TENSORS, inside_transform
from .report import FROZEN_PAST_MKL, FROZEN_UPCAST
from .support import cpu, cpu_product


@in_place_of(nn.Linear)
class FrozenLinear(nn.Linear):
    """``nn.Linear`` whose frozen weight is multiplied by ``lk.frozen_linear`` where that is faster on a CPU.

    In bf16 and fp16 through fp32, on a CPU without instructions for them. In fp32 by oneDNN where that was measured to
    be faster than torch's own product, and for up to four rows and a large weight by a kernel that reads the weight
    once; in fp32 under ``torch.compile`` it is ``nn.Linear``.

    ``patch(model, frozen_linears=True)`` swaps the class of existing layers, which keep the name ``Linear``. Results
    equal ``nn.Linear``'s up to rounding. The op has no double backward (``RuntimeError``).
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, through ``frozen_linear`` where that may be faster and nothing but x needs a gradient."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains or x.dtype != weight.dtype or not _may_gain(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return frozen_linear(x, weight, bias)


def faster_product(weight: Tensor) -> str | None:
    """How ``frozen_linear`` multiplies by a frozen [N, K] weight where it beats torch, as a row of the report.

    That is on a CPU without a matmul for the weight's dtype, and in fp32 where oneDNN beats MKL, which torch takes.
    """
    if weight.device.type != "cpu":
        return None
    if weight.dtype in LOW_PRECISION:
        return None if cpu.has_native_matmul(weight.dtype) else FROZEN_UPCAST
    if weight.dtype != torch.float32 or weight.numel() == 0:
        return None
    both = (cpu.product_verdict(weight.dtype, _USUAL_ROWS, weight, is_gradient) for is_gradient in (False, True))
    return FROZEN_PAST_MKL if any(verdict.schedule == "onednn" for verdict in both) else None


_USUAL_ROWS = 512
"""Of a training step, by which a layer is judged before it has seen any."""


def _may_gain(x: Tensor, weight: Tensor) -> bool:
    """Whether ``frozen_linear`` serves these two, which are of one dtype, and may be faster."""
    dtype = weight.dtype
    if weight.device.type != "cpu" or (dtype != torch.float32 and dtype not in LOW_PRECISION):
        return False
    if dtype == torch.float32 and is_compiling():
        return False
    if not _is_plain(x) or not _is_plain(weight) or inside_transform():
        return False
    if not is_compiling() and dispatch.forced_backend() not in (None, "cpu", "reference"):
        return False
    if dtype in LOW_PRECISION:
        return True  # the op asks the CPU at run time; asking here would be traced by torch.compile
    if cpu.reads_weight_once(x, weight):
        large = weight.numel() >= cpu.LARGE_WEIGHT
        return large and cpu_product.choose_for_few_rows(x.numel() // x.shape[-1], weight).schedule == "decode"
    if cpu.matmul_verdict(x, weight).schedule == "onednn":
        return True
    rows = x.numel() // max(1, x.shape[-1])
    return x.requires_grad and cpu.product_verdict(dtype, rows, weight, is_k_by_n=True).schedule == "onednn"


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN_TENSORS and t.layout == torch.strided and not t.is_nested
