"""Format "int8": a scale per row. Reads bitsandbytes' ``Linear8bitLt`` and torchao's weight-only int8.

From Dettmers et al., "LLM.int8()", NeurIPS 2022, whose layers train on the weight as it is on a CPU, and round the
activations in eval mode and on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..reasons import Reason
from . import torchao
from .scaled import INT8
from .weight import DECODED, Format, QuantizedWeight

_EXACT_IN_EVAL = "_lora_kernels_exact_in_eval"


class Int8(Format):
    """Rows of int8 with the largest magnitude of a row at 127."""

    name = "int8"
    layout = INT8
    entries = ("weight", "SCB")

    def quantize(self, weight: Tensor, **unknown: Any) -> QuantizedWeight:
        """The bits of ``bitsandbytes.functional.int8_vectorwise_quant`` of ``weight`` in float16, as its layer has it.

        Args:
            weight: [out_features, in_features]; float32, bfloat16 or float16.

        Returns:
            A weight that decodes to ``weight``'s dtype.
        """
        if unknown:
            raise TypeError(f"int8: no option is known, got {', '.join(unknown)}")
        if weight.dtype not in DECODED or weight.dim() != 2:
            raise TypeError(
                "int8: weight must be [out_features, in_features] of float32, bfloat16 or float16, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        half = weight.detach().half()
        largest = half.abs().amax(dim=1).float()
        if not weight.is_meta and not torch.isfinite(largest).all():
            raise ValueError("int8: weight must be finite in float16, which bitsandbytes rounds it to")
        data = torch.round(half * (127.0 / largest[:, None])).nan_to_num_(0.0).to(torch.int8)
        return _of_rows("int8", data, largest, weight.dtype)

    def why_not(self, weight: Tensor, **_: Any) -> Reason | None:
        return None if weight.dtype in DECODED else Reason.DTYPE

    def again(self, weight: Tensor, like: QuantizedWeight) -> QuantizedWeight:
        return self.quantize(weight.to(like.decoded_dtype))

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        data, scales = weight.parts
        entries = {"weight": data.view(torch.int8).view(weight.shape)}
        # bitsandbytes keeps the magnitudes, of which a scale is the 127th part, rounded; so they are found again. A
        # scale of torchao's need not be one.
        largest = _magnitudes(scales.view(-1))
        if scales.is_meta or torch.equal(largest.mul(1.0 / 127.0), scales.view(-1)):
            return entries | {"SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return entries | {"weight_scale": scales}

    def unpack(self, entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedWeight | None:
        data, scales = entries.get("weight"), entries.get("weight_scale")
        try:
            if data is not None and scales is not None and data.dtype == torch.int8:
                parts = data.contiguous().view(torch.uint8), scales.contiguous()
                n, k = data.shape
                return QuantizedWeight("int8", INT8.name, parts, (n, k), max(1, k), dtype)
            if "SCB" not in entries:
                return None
            return _of_rows("int8", entries["weight"].contiguous(), entries["SCB"], dtype, is_checked=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"int8: the entries of a packed weight do not fit together: {error!r}") from error


def _of_rows(
    name: str, data: Tensor, largest: Tensor, dtype: torch.dtype | None, *, is_checked: bool = False
) -> QuantizedWeight:
    """bitsandbytes multiplies by 1/127, rounded, and not by the quotient."""
    n, k = data.shape
    make = QuantizedWeight if is_checked else QuantizedWeight.of_layer
    return make(name, INT8.name, (data.view(torch.uint8), largest.mul(1.0 / 127.0)[:, None]), (n, k), max(1, k), dtype)


def _magnitudes(scales: Tensor) -> Tensor:
    """What ``mul(1 / 127)`` has made these of, all of which were float16 before."""
    return (scales.double() * 127.0).half().float()


FORMATS = (Int8(),)


# ------------------------------------------------------------------------------------------------------- readers


def from_bitsandbytes(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What ``Linear8bitLt`` holds: on its weight until the first call, on its state from then on."""
    state: Any = module.__dict__.get("state")
    if state is None or not hasattr(state, "SCB"):
        return None
    weight: Any = module.__dict__["_parameters"].get("weight")
    if state.has_fp16_weights:
        return Reason.FORMAT
    data, largest = getattr(weight, "CB", None), getattr(weight, "SCB", None)
    if data is None:
        data, largest = state.CB, state.SCB
    if data is None or largest is None or type(data) is not Tensor or data.dim() != 2:
        return Reason.DISPLACED  # sharded, or not quantised yet
    as_it_is = module.training and data.device.type in ("cpu", "xpu", "meta")
    if not as_it_is and not module.__dict__.get(_EXACT_IN_EVAL, False):
        return Reason.INT8_EVAL
    if largest.device != data.device:
        return Reason.DEVICES
    return _of_rows("int8", data, largest, None)


def exact_in_eval(model: nn.Module, wanted: bool) -> None:
    """Whether the layers of bitsandbytes in ``model`` are multiplied without rounding activations, whatever their mode
    and device.
    """
    for module in model.modules():
        if wanted and hasattr(module.__dict__.get("state"), "SCB"):
            module.__dict__[_EXACT_IN_EVAL] = True
        else:
            module.__dict__.pop(_EXACT_IN_EVAL, None)


def from_torchao(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What a linear layer holds whose weight torchao's weight-only int8 has replaced."""
    weight = torchao.weight_of(module, "Int8Tensor")
    if weight is None or isinstance(weight, Reason):
        return weight
    n, k = weight.shape
    if tuple(weight.block_size) != (1, k) or getattr(weight, "act_pre_scale", None) is not None:
        return Reason.FORMAT
    zero = getattr(weight, "zero_point", None)
    if weight.qdata.dim() != 2 or weight.dtype not in DECODED:
        return Reason.DTYPE
    if zero is not None and not _is_zero(weight, zero):
        return Reason.FORMAT
    scales = weight.scale.to(torch.float32).view(n, 1)
    return QuantizedWeight.of_layer(
        "int8", INT8.name, (weight.qdata.view(torch.uint8), scales), (n, k), max(1, k), None
    )


def _is_zero(weight: Any, zero: Tensor) -> bool:
    """Whether a weight's zero point is 0 everywhere; the answer is kept with the tensor that was asked."""
    known = weight.__dict__.get("_lora_kernels_is_zero")
    if known is None or known[0] is not zero:
        known = zero, not zero.any().item()
        weight._lora_kernels_is_zero = known
    return known[1]
