"""What the public functions check of their arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import dispatch
from ..formats import QuantizedWeight
from ..plain import FLOATS, LOW_PRECISION


def types_fit(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any) -> bool:
    """Whether a glance shows that the types pass the checks below, which take as long as a small layer."""
    for t in (x, weight, lora_A, lora_B):
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            return False
    dtype = weight.dtype
    if dtype not in FLOATS or x.dtype != dtype or lora_A.dtype != dtype or lora_B.dtype != dtype:
        return False
    return bias is None or ((type(bias) is nn.Parameter or type(bias) is Tensor) and bias.dtype == dtype)


def sizes_fit(x: Tensor, weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> bool:
    """As ``types_fit``, for sizes and devices."""
    a, b, lead = lora_A.shape, lora_B.shape, x.shape
    if len(a) != 2 or len(b) != 2 or not lead:
        return False
    (rank, k), (n, width) = a, b
    if rank != width or rank < 1 or lead[-1] != k or weight.shape != (n, k):
        return False
    if bias is not None and (bias.shape != (n,) or bias.device != weight.device):
        return False
    if x.is_cpu:
        return weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu
    device = x.device
    return weight.device == device and lora_A.device == device and lora_B.device == device


def check_base(op: str, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> None:
    """``TypeError`` or ``ValueError`` unless x [..., K], weight [N, K] and bias [N] fit together.

    They are of one dtype, but that a quantised weight is multiplied in x's.
    """
    is_packed = isinstance(weight, QuantizedWeight)
    for name, t in (("x", x), ("weight", weight)):
        if isinstance(t, QuantizedWeight) and name == "weight":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        check_dense(op, name, t)
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x must be [..., {weight.shape[1]}] to fit weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    dtype = x.dtype if is_packed else weight.dtype
    if x.dtype != dtype and not dispatch.autocast_enabled(x.device.type):
        raise TypeError(f"{op}: weight must be {x.dtype} like x, got {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"{op}: weight must be on {x.device} like x, got {weight.device}")
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if bias.shape != (weight.shape[0],):
        raise ValueError(
            f"{op}: bias must be [{weight.shape[0]}] to fit weight {tuple(weight.shape)}, got shape {tuple(bias.shape)}"
        )
    if bias.device != x.device:
        raise ValueError(f"{op}: bias must be on {x.device} like x, got {bias.device}")
    if bias.dtype != dtype and not dispatch.autocast_enabled(x.device.type):
        raise TypeError(f"{op}: bias must be {dtype} like {'x' if is_packed else 'weight'}, got {bias.dtype}")


def check_dense(op: str, name: str, t: Tensor) -> None:
    """``TypeError`` for sparse and nested tensors."""
    if t.layout != torch.strided or t.is_nested:
        kind = "nested" if t.is_nested else str(t.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def check_adapter(op: str, weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor) -> None:
    """``TypeError`` or ``ValueError`` unless lora_A [rank, K] and lora_B [N, rank], of one dtype, fit weight [N, K]."""
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {t.dtype}")
        check_dense(op, name, t)
        if t.device != weight.device:
            raise ValueError(f"{op}: {name} must be on {weight.device} like weight, got {t.device}")
    n, k = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_A.shape[0] < 1:
        raise ValueError(f"{op}: lora_A must be [rank, {k}] with rank >= 1, got shape {tuple(lora_A.shape)}")
    if lora_B.shape != (n, lora_A.shape[0]):
        raise ValueError(
            f"{op}: lora_B must be [{n}, {lora_A.shape[0]}] to fit weight and lora_A, got shape {tuple(lora_B.shape)}"
        )
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{op}: lora_B must be {lora_A.dtype} like lora_A, got {lora_B.dtype}")


def check_adapter_dtype(op: str, like: str, dtype: torch.dtype, lora_A: Tensor) -> None:
    """``TypeError`` unless lora_A is of this dtype, which ``like`` has, or float32 over 16 bits."""
    if lora_A.dtype != dtype and not (lora_A.dtype == torch.float32 and dtype in LOW_PRECISION):
        raise TypeError(
            f"{op}: lora_A must be {dtype} like {like} (or float32 over a 16-bit {like}), got {lora_A.dtype}"
        )


def check_range(op: str, name: str, t: Tensor | None, least: int, most: int) -> None:
    """``ValueError`` unless the integers in t are in range; not on other devices, where a look would wait for them."""
    if t is None or type(t) is not Tensor or not t.is_cpu or is_compiling() or t.numel() == 0:
        return
    low, high = t.aminmax()
    if low < least or high > most:
        raise ValueError(f"{op}: {name} must be from {least} to {most}, got {int(low)} to {int(high)}")


def check_magnitude(op: str, magnitude: Tensor, weight: Tensor | QuantizedWeight) -> None:
    """``TypeError`` or ``ValueError`` unless DoRA's magnitude [N] fits weight [N, K]."""
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"{op}: magnitude must be a tensor, got {type(magnitude).__name__}")
    if not magnitude.is_floating_point():
        raise TypeError(f"{op}: magnitude must be floating point, got {magnitude.dtype}")
    if magnitude.shape != (weight.shape[0],):
        raise ValueError(
            f"{op}: magnitude must be [{weight.shape[0]}] to fit weight {tuple(weight.shape)}, "
            f"got shape {tuple(magnitude.shape)}"
        )
    if magnitude.device != weight.device:
        raise ValueError(f"{op}: magnitude must be on {weight.device} like weight, got {magnitude.device}")


def scaling_tensor(op: str, scaling: Tensor, device: torch.device) -> Tensor:
    """``scaling`` without dimensions, so that it does not take part in type promotion."""
    if scaling.numel() != 1 or not scaling.is_floating_point():
        raise ValueError(
            f"{op}: scaling must be a number or a floating-point tensor of one element, got {scaling.dtype} "
            f"{tuple(scaling.shape)}"
        )
    if scaling.device != device and not (scaling.dim() == 0 and scaling.device.type == "cpu"):
        raise ValueError(f"{op}: scaling must be on {device} like x, got {scaling.device}")
    return scaling.reshape(())


def check_branch(
    op: str, x: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Tensor, dropout_p: float, training: bool,
    seed: int | Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, float, float]:  # fmt: skip
    """lora_B, bias, seed, scaling and dropout_p as the ops take them, checked: a scaling in a tensor is multiplied into
    lora_B, and a seed is drawn where dropout is active.
    """
    lora_B, factor = scaled(op, lora_B, scaling)
    check_probability(op, "dropout_p", dropout_p)
    if not training or dropout_p == 0.0:
        return lora_B, bias, None, factor, 0.0
    return lora_B, bias, seed_tensor(op, seed, x.device), factor, float(dropout_p)


def scaled(op: str, lora_B: Tensor, scaling: float | Tensor) -> tuple[Tensor, float]:
    """lora_B and the factor of its update, checked; one in a tensor is multiplied into lora_B."""
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling_tensor(op, scaling, lora_B.device), 1.0
    check_scaling(op, scaling)
    return lora_B, float(scaling)


def check_scaling(op: str, scaling: float) -> None:
    """``TypeError`` or ``ValueError`` unless ``scaling`` is a finite number."""
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"{op}: scaling must be a number, got {type(scaling).__name__}")
    if not -math.inf < scaling < math.inf:  # isfinite does not take the symbol that a compiler may trace
        raise ValueError(f"{op}: scaling must be finite, got {scaling}")


def check_probability(op: str, name: str, p: float) -> None:
    """``ValueError`` unless ``p`` is a number in [0, 1]."""
    if not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be a number in [0, 1], got {p!r}")


def draw_seed(device: torch.device) -> Tensor:
    """The key of a mask, an int64 [1], from torch's generator of the device.

    Drawn outside the op: checkpoint's RNG stash and CUDA graphs' generator offsets then cover it.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 [1] tensor on ``device``."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"{op}: seed must be an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"{op}: seed must be on {device} like x, got {seed.device}")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=device)
