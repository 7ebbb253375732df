"""One LoRA layer on a 4-bit base: PEFT on bitsandbytes, bitsandbytes alone, fused, and the same layer unquantised.

"PEFT" and "bitsandbytes" are in training mode. On CPUs with AVX512_BF16 bitsandbytes repacks a weight in eval mode,
with a loss, for a kernel of its own: "PEFT in eval mode" is that, where it exists.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_kernels as lk

from .. import dispatch
from ..formats import QuantizedWeight, from_module
from .cases import BASELINE, OURS, Case, WrongResult
from .layers import RANK, SCALING, peft_layer, step_of, weights

SIZES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
"""out_features, in_features: SmolLM2-135M's, and one of a model with a billion parameters."""
ROWS = {1: "decode", 16: "decode", 64: "decode", 512: "forward+backward", 2048: "forward+backward"}
UNQUANTISED, UNQUANTISED_PEFT, BITSANDBYTES, IN_EVAL = (
    "unquantised, fused", "unquantised, PEFT", "bitsandbytes, no adapter", "PEFT in eval mode",
)  # fmt: skip


def qlora_cases(device: torch.device) -> Iterator[Case]:
    """NF4, double quantised, over rows and sizes; multiplied in fp32, and in bf16 as recipes ask for."""
    for compute in (torch.float32, torch.bfloat16):
        for n, k in SIZES:
            for m, what in ROWS.items():
                if compute == torch.float32 or (n, k) == (1536, 576):
                    yield make_case(device, m, n, k, what=what, compute=compute)


def make_case(
    device: torch.device, m: int, n: int, k: int, *, what: str, compute: torch.dtype, rank: int = RANK,
    format: str = "nf4", double_quant: bool = True,
) -> Case:  # fmt: skip
    """One layer whose x is of the dtype that it is multiplied in; adapters are fp32.

    ``what`` is "decode" (without gradients) or "forward+backward".
    """
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(k, n, bias=False, device=device, dtype=compute).requires_grad_(False)
    base = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=compute, quant_type=format, compress_statistics=double_quant
    )
    base.weight = bnb.nn.Params4bit(
        plain.weight.data.float(), quant_type=format, compress_statistics=double_quant, module=base
    )
    base.to(device)
    stock, fused, in_eval = (peft_layer(copy.deepcopy(base), rank, 0.0, torch.float32) for _ in range(3))
    plain_stock, plain_fused = (peft_layer(plain, rank, 0.0, torch.float32) for _ in range(2))
    for layer in (fused, plain_fused):
        report = lk.patch(layer)
        if not report.fused:
            raise WrongResult(f"this layer is not fused: {report.kept}")
    x = torch.randn(m, k, device=device, dtype=compute, requires_grad=what != "decode")
    grad = torch.randn(m, n, device=device, dtype=compute)
    weight: Any = from_module(fused.base_layer)  # type: ignore[arg-type]
    _check(fused, weight, x[:256], grad[:256])

    calls: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: stock(x), OURS: lambda: fused(x), BITSANDBYTES: lambda: stock.base_layer(x),  # type: ignore[operator]
        UNQUANTISED: lambda: plain_fused(x), UNQUANTISED_PEFT: lambda: plain_stock(x),
    }  # fmt: skip
    if what == "decode" and getattr(base, "support_avx512bf16_for_cpu", False):
        in_eval.eval()
        calls[IN_EVAL] = lambda: in_eval(x)
    leaves = [x, *(w for layer in (stock, fused, plain_fused, plain_stock) for w in weights(layer))]
    steps = {name: step_of(call, what, grad, leaves) for name, call in calls.items()}
    spec = dispatch.specs()["lora_linear_packed"]
    args: tuple[Any, ...] = (x, *weight.args, *weights(fused), None, None, SCALING, 0.0)
    return Case(
        "qlora", f"{k} -> {n}, {m} row{'s' * (m > 1)}, {weight.format}, {str(compute).removeprefix('torch.')} compute",
        what, steps, forwards={} if what == "decode" else {name: calls[name] for name in (BASELINE, OURS)},
        constants=[*weight.parts, *weights(stock), *weights(fused)],
        flops=spec.flops(*args) if spec.flops and what == "decode" else 0,
        bytes=spec.bytes(*args) if spec.bytes and what == "decode" else 0,
        shape={"m": m, "n": n, "k": k, "rank": rank},
        within=torch.no_grad if what == "decode" else torch.enable_grad,
        schedules=lambda: {"forward": "{}, {}: {}".format(*lk.why("lora_linear", x, weight, *weights(fused)))},
    )  # fmt: skip


def _check(layer: nn.Module, weight: QuantizedWeight, x: Tensor, grad: Tensor) -> None:
    """Outputs and gradients against the decoded weight in float64: at most twice the error of plain torch code."""
    A, B = weights(layer)
    dense = weight.dequantize()
    x = x.detach().requires_grad_()

    def unfused(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
        xs, a, b = leaves
        y = F.linear(xs, dense.to(dtype)) + SCALING * F.linear(F.linear(xs, a), b)
        return [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]

    y = layer(x)
    fused = [y, *torch.autograd.grad(y, [x, A, B], grad)]
    for name, e, p, f in zip(("y", "x", "lora_A", "lora_B"), unfused(torch.float64), unfused(x.dtype), fused):
        allowed = 2 * (p - e).abs().max() + 4 * torch.finfo(x.dtype).eps * e.abs().max()
        if not (f - e).abs().max() <= allowed:
            raise WrongResult(f"the fused layer is wrong: {name} is off by {(f - e).abs().max():.3g} of {allowed:.3g}")
