"""``dequantize``: a quantised weight as a matrix. How its parts decode is its layout's (``lora_kernels/formats/``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..formats import LAYOUTS, rounded_to
from ..spec import Kernel, OpSpec, Verdict
from ..support import cpu_packed, fits, gpu_packed
from ..support.packed import LAYOUTS as LAYOUTS_OF_KERNELS

WEIGHT = "Tensor[] weight, str layout, int n, int k, int block, ScalarType dtype"
"""What stands for a quantised weight in a schema: ``QuantizedWeight.args``."""
PARTS = WEIGHT.rpartition(",")[0]
"""The same for a weight that is decoded to x's dtype."""
WEIGHT_ARGS = 6
"""How many arguments these are."""


def _reference(weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype) -> Tensor:
    return LAYOUTS[layout].decode(weight, n, k, block, dtype)


def _fake(weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype) -> Tensor:
    return weight[0].new_empty((n, k), dtype=dtype)


def _cpu_supports(weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype) -> Verdict:
    return cpu_packed.decode_verdict(layout)


def _cuda_supports(weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype) -> Verdict:
    return gpu_packed.decode_verdict("cuda", weight[0].device, layout)


def _triton_supports(weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype) -> Verdict:
    return gpu_packed.decode_verdict("triton", weight[0].device, layout)


def _triton_run(schedule: str, *args: Any) -> Tensor:
    fits.check_packed(*args[:5])
    from ..triton_kernels import dequantize

    return dequantize.dequantize(*args)


def _bytes(weight: list[Tensor], layout: str, n: int, k: int, block: int, dtype: torch.dtype) -> int:
    return nbytes(weight) + n * k * dtype.itemsize


def for_product(weight: tuple[Any, ...], x: Tensor) -> Tensor:
    """What ``QuantizedWeight.args`` mean in a product with ``x``: a matrix of x's dtype."""
    parts, layout, n, k, block, dtype = weight
    return LAYOUTS[layout].decode(parts, n, k, block, rounded_to(dtype, x)).to(x.dtype)


def nbytes(weight: list[Tensor]) -> int:
    """Of all parts."""
    return sum(part.numel() * part.element_size() for part in weight)


SPEC = dispatch.register(
    OpSpec(
        name="dequantize",
        schema=f"({WEIGHT}) -> Tensor",
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports),
        },
        flops=lambda weight, layout, n, k, block, dtype: n * k,
        bytes=_bytes,
    )
)


def decoded_for_product(weight: tuple[Any, ...], x: Tensor) -> Tensor:
    """``for_product`` by the kernels, where there are any for the layout; counted as a call of this op then."""
    *described, dtype = weight
    if weight[1] not in LAYOUTS_OF_KERNELS:
        return for_product(weight, x)
    return dispatch.run(SPEC, *described, rounded_to(dtype, x)).to(x.dtype)
