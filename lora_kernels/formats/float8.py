"""Format "float8": e4m3 numbers, and a float32 scale per row or per square of 128. Reads torchao's weight-only Float8,
transformers' fine-grained fp8 and the fp8 of compressed-tensors.

From Micikevicius et al., "FP8 Formats for Deep Learning", 2022; squares of 128 are DeepSeek-V3's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..plain import PLAIN_TENSORS
from ..reasons import Reason
from . import torchao
from .scaled import E4M3
from .weight import DECODED, Format, QuantizedWeight

_NUMBER = torch.float8_e4m3fn
_USUAL_SQUARE = 128


class Float8(Format):
    """Rows, or squares, with the largest magnitude at 448, the largest number of e4m3."""

    name = "float8"
    layout = E4M3

    def quantize(self, weight: Tensor, *, square: int | None = None, **unknown: Any) -> QuantizedWeight:  # type: ignore[override]
        """Args:
            weight: [out_features, in_features]; float32, bfloat16 or float16.
            square: side of the squares that share a scale, e.g. 128; None for a scale per row.

        Returns:
            With a scale per row, the bits of torchao's ``Float8WeightOnlyConfig``, but that rows of zeros are no NaN.
            It decodes to ``weight``'s dtype.
        """
        if unknown:
            raise TypeError(f"float8: square is known, got {', '.join(unknown)}")
        if weight.dtype not in DECODED or weight.dim() != 2:
            raise TypeError(
                "float8: weight must be [out_features, in_features] of float32, bfloat16 or float16, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        if square is not None and square < 1:
            raise ValueError(f"float8: square must be at least 1, got {square}")
        n, k = weight.shape
        weight, highest = weight.detach(), torch.finfo(_NUMBER).max
        if square is None:
            largest = weight.abs().amax(dim=1, keepdim=True)
        else:
            padded = nn.functional.pad(weight, (0, -k % square, 0, -n % square))
            largest = padded.unflatten(0, (-1, square)).unflatten(2, (-1, square)).abs().amax(dim=(1, 3))
        scales = (largest / highest).to(torch.float32)  # the quotient in the weight's dtype, as torchao's is
        scales[scales == 0.0] = 1.0  # zeros stay zeros, where torchao's are NaN
        each = scales
        if square is not None:
            each = scales.repeat_interleave(square, 0)[:n].repeat_interleave(square, 1)[:, :k]
        data = (weight.to(torch.float32) / each).clamp_(-highest, highest).to(_NUMBER)
        parts = data.view(torch.uint8), scales
        return QuantizedWeight("float8", E4M3.name, parts, (n, k), square or max(1, k), weight.dtype)

    def why_not(self, weight: Tensor, **_: Any) -> Reason | None:
        return None if weight.dtype in DECODED else Reason.DTYPE

    def again(self, weight: Tensor, like: QuantizedWeight) -> QuantizedWeight:
        is_by_rows = like.parts[1].shape == (like.shape[0], 1)
        return self.quantize(weight, square=None if is_by_rows else like.block).to(dtype=like.dtype)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        data, scales = weight.parts
        return {
            "weight": data.view(_NUMBER).view(weight.shape), "weight_scale": scales,
            "weight_block": torch.tensor(weight.block),
        }  # fmt: skip

    def unpack(self, entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedWeight | None:
        data, scales = entries.get("weight"), entries.get("weight_scale")
        if data is None or scales is None or data.dtype != _NUMBER:
            return None
        try:
            block = entries.get("weight_block")
            columns = _block(data, scales) if block is None else int(block)
            return _weight(data.contiguous(), scales.to(torch.float32), columns, dtype, is_checked=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"float8: the entries of a packed weight do not fit together: {error!r}") from error


FORMATS = (Float8(),)


def _block(data: Tensor, scales: Tensor) -> int:
    """Columns per scale where nobody says: all, or as in DeepSeek-V3's squares."""
    return max(1, data.shape[1]) if scales.shape[1] == 1 else _USUAL_SQUARE


def _weight(
    data: Tensor, scales: Tensor, block: int, dtype: torch.dtype | None, *, is_checked: bool = False
) -> QuantizedWeight:
    n, k = data.shape
    make = QuantizedWeight if is_checked else QuantizedWeight.of_layer
    return make("float8", E4M3.name, (data.view(torch.uint8), scales), (n, k), block, dtype)


# ------------------------------------------------------------------------------------------------------- readers


def from_torchao(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What a linear layer holds whose weight torchao's weight-only Float8 has replaced."""
    weight = torchao.weight_of(module, "Float8Tensor")
    if weight is None or isinstance(weight, Reason):
        return weight
    data, scales = weight.qdata, weight.scale
    if data.dtype != _NUMBER or data.dim() != 2 or scales.dim() != 2:
        return Reason.FORMAT
    n = data.shape[0]
    rows, columns = weight.block_size
    if rows not in (1, n) and rows != columns:
        return Reason.BLOCKS
    return _weight(data, scales.to(torch.float32), max(1, columns), None)


def from_scale_inv(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What transformers' ``FP8Linear`` holds: scales of squares, or of the whole weight, as ``weight_scale_inv``.

    It rounds activations, too, where its own kernel runs; here they are as they are.
    """
    parameters = module.__dict__["_parameters"]
    weight: Any = parameters.get("weight")
    scales: Any = parameters.get("weight_scale_inv", module.__dict__["_buffers"].get("weight_scale_inv"))
    return _plain_float8(weight, scales, getattr(module, "block_size", None))


def from_compressed_tensors(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What compressed-tensors leaves of a linear layer in fp8: ``weight_scale`` per row or for all of the weight."""
    parameters = module.__dict__["_parameters"]
    weight: Any = parameters.get("weight")
    scales: Any = parameters.get("weight_scale", module.__dict__["_buffers"].get("weight_scale"))
    scheme: Any = getattr(module, "quantization_scheme", None)
    if scales is not None and getattr(scheme, "input_activations", None) is not None:
        return Reason.ACTIVATIONS
    return _plain_float8(weight, scales, None)


def _plain_float8(weight: Any, scales: Any, block_size: Any) -> QuantizedWeight | Reason | None:
    if weight is None or scales is None or getattr(weight, "dtype", None) != _NUMBER:
        return None
    if type(weight) not in PLAIN_TENSORS or type(scales) not in PLAIN_TENSORS:
        return Reason.DTENSOR
    if weight.dim() != 2 or not weight.is_contiguous():
        return Reason.LAYOUT
    if scales.device != weight.device:
        return Reason.DEVICES
    n, k = weight.shape
    scales = scales.detach().to(torch.float32)
    block = max(1, k)
    if scales.numel() == 1:
        scales = scales.view(1, 1)
    elif block_size is not None:
        rows, columns = block_size
        if rows != columns and rows != 1:
            return Reason.BLOCKS
        block = columns
    elif scales.shape != (n, 1):
        return Reason.BLOCKS
    return _weight(weight.detach(), scales, block, None)
