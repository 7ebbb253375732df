"""Formats "mxfp4" and "nvfp4": e2m1 numbers, and a scale of eight bits per 32 or 16 of them. Reads torchao's tensors
and what compressed-tensors leaves of a linear layer.

"OCP Microscaling Formats (MX) Specification", 2023, and NVIDIA's variant of it. In both, an even weight is in the low
half of a byte. A scale is an index into a table of 256: the powers of two of e8m0, or the numbers of e4m3 times the
factor that all weights share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..plain import PLAIN_TENSORS
from ..reasons import Reason
from . import torchao
from .codes4 import LOW
from .weight import DECODED, Format, QuantizedWeight

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_HIGHEST, _HIGHEST_E4M3, _LEAST_E4M3 = 6.0, 448.0, 2.0**-6
"""Of e2m1 and of e4m3; the least normal number of e4m3."""
_LARGEST_EXPONENT, _BIAS = 2, 127
"""Of e2m1, and of e8m0."""


def _kept(make: Callable[[torch.device], Tensor]) -> Callable[[torch.device], Tensor]:
    """A decorator: a table is made once per device, and is a plain tensor whoever asks first."""

    @functools.cache
    def table(device: torch.device) -> Tensor:
        with _disable_current_modes(), torch.inference_mode(False):
            return make(device)

    return table


@_kept
def _codes(device: torch.device) -> Tensor:
    return torch.tensor([sign * number for sign in (1.0, -1.0) for number in _E2M1], device=device)


@_kept
def _powers(device: torch.device) -> Tensor:
    """What the bytes of e8m0 stand for; the last is NaN."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu).to(torch.float32)


@_kept
def _numbers(device: torch.device) -> Tensor:
    """What the bytes of e4m3 stand for."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).to(torch.float32)


def _weight(
    name: str, data: Tensor, scales: Tensor, table: Tensor, block: int, dtype: torch.dtype | None
) -> QuantizedWeight:
    """From e2m1 [N, K/2] in bytes, the scales' bytes [N, K/block] and what those stand for."""
    n, k = data.shape[0], 2 * data.shape[1]
    factors = torch.ones(-(-scales.numel() // 256), device=data.device)  # of scales that have scales of their own
    parts = (
        data.view(torch.uint8), scales.contiguous().view(torch.uint8), _codes(data.device), factors, table,
        torch.zeros(1, device=data.device),
    )  # fmt: skip
    return QuantizedWeight.of_layer(name, LOW.name, parts, (n, k), block, dtype)


class _Mx(Format):
    """What the two have in common."""

    layout = LOW
    block: int

    def why_not(self, weight: Tensor, **_: Any) -> Reason | None:
        if weight.dtype not in DECODED:
            return Reason.DTYPE
        return Reason.BLOCKS if weight.shape[1] % self.block else None

    def again(self, weight: Tensor, like: QuantizedWeight) -> QuantizedWeight:
        return self.quantize(weight.to(like.decoded_dtype))

    def _checked(self, weight: Tensor, unknown: Mapping[str, Any]) -> Tensor:
        """The weight as float32 [N, K/block, block]."""
        if unknown:
            raise TypeError(f"{self.name}: no option is known, got {', '.join(unknown)}")
        if weight.dtype not in DECODED or weight.dim() != 2:
            raise TypeError(
                f"{self.name}: weight must be [out_features, in_features] of float32, bfloat16 or float16, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        if weight.shape[1] % self.block:
            raise ValueError(f"{self.name}: in_features must be a multiple of {self.block}, got {weight.shape[1]}")
        return weight.detach().to(torch.float32).unflatten(1, (-1, self.block))


def _nearest(shares: Tensor) -> Tensor:
    """The bytes [N, K/2] of the nearest e2m1 of [N, K/block, block]; a tie takes the even one, as IEEE 754 has it."""
    magnitudes = torch.tensor(_E2M1, device=shares.device)
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    size = shares.abs()
    index = torch.bucketize(size, middles, out_int32=True)
    upper = torch.bucketize(size, middles, out_int32=True, right=True)
    index = torch.where((upper != index) & (index % 2 == 1), upper, index)
    nibbles = (index + 8 * torch.signbit(shares)).to(torch.uint8).flatten(1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


class MxFp4(_Mx):
    """e2m1 with a power of two per 32 weights."""

    name, block = "mxfp4", 32

    def quantize(self, weight: Tensor, **unknown: Any) -> QuantizedWeight:
        """The bits of torchao's ``MXTensor.to_mx``, whose scale is the largest power of two that a block's largest
        magnitude holds, over that of e2m1.

        Args:
            weight: [out_features, in_features]; float32, bfloat16 or float16.
        """
        blocks = self._checked(weight, unknown)
        exponents = (blocks.abs().amax(dim=2).view(torch.int32) >> 23 & 255) - _LARGEST_EXPONENT
        scales = exponents.clamp_(0, 254).to(torch.uint8)
        factors = _powers(weight.device)[scales.int()].clamp_min(torch.finfo(torch.float32).tiny)
        data = _nearest((blocks / factors[:, :, None]).clamp_(-_HIGHEST, _HIGHEST))
        return _weight(self.name, data, scales, _powers(weight.device), self.block, weight.dtype)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        (n, k), (data, scales, *_) = weight.shape, weight.parts
        return {"weight_packed": data.view(n, k // 2), "weight_scale": scales.view(n, k // self.block)}

    def unpack(self, entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedWeight | None:
        data, scales = entries.get("weight_packed"), entries.get("weight_scale")
        if data is None or scales is None or scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            return None
        return _checked_fit(self, data, scales, _powers(data.device), dtype)


class NvFp4(_Mx):
    """e2m1 with an e4m3 per 16 weights, and a factor for all."""

    name, block = "nvfp4", 16

    def quantize(self, weight: Tensor, **unknown: Any) -> QuantizedWeight:
        """The bits of torchao's ``nvfp4_quantize`` with the factor that brings the largest scale to e4m3's highest.

        Args:
            weight: [out_features, in_features]; float32, bfloat16 or float16.
        """
        blocks = self._checked(weight, unknown)
        factor = blocks.abs().amax() / (_HIGHEST_E4M3 * _HIGHEST)
        factor = torch.where(factor == 0.0, torch.ones_like(factor), factor)
        scales = (blocks.abs().amax(dim=2) / _HIGHEST / factor).clamp_(_LEAST_E4M3, _HIGHEST_E4M3)
        scales = scales.to(torch.float8_e4m3fn)
        shares = blocks * ((1.0 / factor) / scales.to(torch.float32))[:, :, None]
        data = _nearest(shares.clamp_(-_HIGHEST, _HIGHEST))
        return _weight(self.name, data, scales, _numbers(weight.device) * factor, self.block, weight.dtype)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        (n, k), (data, scales, _, _, table, _) = weight.shape, weight.parts
        return {
            "weight_packed": data.view(n, k // 2),
            "weight_scale": scales.view(n, k // self.block).view(torch.float8_e4m3fn),
            "weight_table": table,
        }

    def unpack(self, entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedWeight | None:
        data, scales, table = (entries.get(name) for name in ("weight_packed", "weight_scale", "weight_table"))
        if data is None or scales is None or scales.dtype != torch.float8_e4m3fn:
            return None
        if table is None:
            factor = entries.get("weight_global_scale")  # compressed-tensors' divides
            if factor is None:
                return None
            table = _numbers(data.device) / factor.to(torch.float32).view(())
        return _checked_fit(self, data, scales, table, dtype)


FORMATS: tuple[Format, ...] = (MxFp4(), NvFp4())


def _checked_fit(fmt: _Mx, data: Tensor, scales: Tensor, table: Tensor, dtype: torch.dtype | None) -> QuantizedWeight:
    try:
        weight = _weight(fmt.name, data.contiguous(), scales, table, fmt.block, dtype)
        weight.__post_init__()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{fmt.name}: the entries of a packed weight do not fit together: {error!r}") from error
    return weight


# ------------------------------------------------------------------------------------------------------- readers


def from_torchao(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What a linear layer holds whose weight torchao's ``MXTensor`` or ``NVFP4Tensor`` has replaced."""
    weight = torchao.weight_of(module, "MXTensor", "NVFP4Tensor")
    if weight is None or isinstance(weight, Reason):
        return weight
    data, scales = weight.qdata, weight.scale
    if weight.is_swizzled_scales or data.dim() != 2 or not data.is_contiguous():
        return Reason.LAYOUT
    if type(weight).__name__ == "NVFP4Tensor":
        table, factor = _numbers(data.device), weight.per_tensor_scale
        if factor is not None:
            if factor.numel() != 1:
                return Reason.FORMAT
            table = factor.view(()) * table
        return _weight("nvfp4", data, scales, table, weight.block_size, None)
    if weight.elem_dtype != torch.float4_e2m1fn_x2:
        return Reason.FORMAT
    return _weight("mxfp4", data, scales, _powers(data.device), weight.block_size, None)


def from_compressed_tensors(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What compressed-tensors leaves of a linear layer in mxfp4 or nvfp4."""
    own = {**module.__dict__["_parameters"], **module.__dict__["_buffers"]}
    data, scales = own.get("weight_packed"), own.get("weight_scale")
    if data is None or scales is None or data.dtype != torch.uint8 or data.dim() != 2:
        return None
    scheme: Any = getattr(module, "quantization_scheme", None)
    if getattr(scheme, "input_activations", None) is not None:
        return Reason.ACTIVATIONS
    factor = own.get("weight_global_scale")
    if any(part is not None and type(part) not in PLAIN_TENSORS for part in (data, scales, factor)):
        return Reason.DTENSOR
    if scales.dim() != 2 or data.shape[1] * 2 % scales.shape[1]:
        return Reason.BLOCKS
    data, scales, block = data.detach(), scales.detach(), data.shape[1] * 2 // scales.shape[1]
    if scales.dtype == torch.float8_e4m3fn and factor is not None:
        table = _numbers(data.device) / factor.detach().to(torch.float32).view(())
        return _weight("nvfp4", data, scales, table, block, None)
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return _weight("mxfp4", data, scales, _powers(data.device), block, None)
    return Reason.FORMAT
