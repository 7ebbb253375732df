"""``QuantizedWeight``: what the ops take in place of a weight, and what a format and a layout are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..plain import LOW_PRECISION
from ..reasons import Reason

DECODED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a weight may decode to."""


def rounded_to(dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """What a weight that decodes to ``dtype`` is rounded to in a product with x: to 16 bits where x has 16."""
    return x.dtype if x.dtype in LOW_PRECISION else dtype


def are_together(parts: Sequence[Tensor]) -> bool:
    """Whether all are on one device. Layers are asked on every call, and ``is_cpu`` is the quickest to answer."""
    first = parts[0]
    if first.is_cpu:
        return all([part.is_cpu for part in parts])
    return all([part.device == first.device for part in parts])


class Layout(ABC):
    """How the parts of a weight lie in memory, and what they stand for.

    ``csrc/formats/<name>.h`` says the same for kernels.
    """

    name: ClassVar[str]
    row_step: ClassVar[int] = 1
    """Only at multiples of so many can rows be taken apart."""

    @abstractmethod
    def check(self, parts: Sequence[Tensor], n: int, k: int, block: int) -> None:
        """``TypeError`` or ``ValueError`` unless these are the parts of an [n, k] weight with scales for ``block``
        weights each.
        """

    @abstractmethod
    def rows(self, parts: Sequence[Tensor], n: int, k: int, block: int, begin: int, end: int) -> tuple[Tensor, ...]:
        """The parts of the rows [begin, end), views where that is possible. They decode to the same bits."""

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], n: int, k: int, block: int, dtype: torch.dtype) -> Tensor:
        """The weight [n, k], in plain torch code: what every kernel equals bit for bit."""


LAYOUTS: dict[str, Layout] = {}
"""By name."""


def register(layout: Layout) -> Layout:
    """Makes ``layout`` known to the ops; returns it."""
    LAYOUTS[layout.name] = layout
    return layout


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen weight in fewer bits than it computes with.

    ``lk.lora_linear``, ``lk.dora_linear`` and ``lk.frozen_linear`` take it in place of ``weight``.
    ``lora_kernels.formats`` makes them, and reads them from the layers of other libraries.

    Attributes:
        format: what the user calls it, e.g. ``"nf4"``.
        layout: name of the layout of ``parts``.
        parts: the tensors, on one device.
        shape: (out_features, in_features).
        block: how many weights share a scale.
        dtype: what each decoded weight is rounded to: float32, bfloat16 or float16. None: whatever x has, as in formats
            that do not say what they are multiplied in; ``dequantize`` gives float32 then.

    Raises:
        TypeError, ValueError: the parts do not fit the layout and the sizes.
    """

    format: str
    layout: str
    parts: tuple[Tensor, ...]
    shape: tuple[int, int]
    block: int
    dtype: torch.dtype | None = torch.float32

    requires_grad: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"QuantizedWeight: unknown layout {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        if self.dtype is not None and self.dtype not in DECODED:
            raise TypeError(f"QuantizedWeight: dtype must be float32, bfloat16, float16 or None, got {self.dtype}")
        for part in self.parts:
            if not isinstance(part, Tensor):
                raise TypeError(f"QuantizedWeight: parts must be tensors, got {type(part).__name__}")
            if part.device != self.parts[0].device:
                raise ValueError(
                    f"QuantizedWeight: parts must be on one device, got {part.device} and {self.parts[0].device}"
                )
            if not part.is_contiguous():
                raise ValueError("QuantizedWeight: parts must be contiguous")
        LAYOUTS[self.layout].check(self.parts, *self.shape, self.block)

    @classmethod
    def of_layer(
        cls, format: str, layout: str, parts: tuple[Tensor, ...], shape: tuple[int, int], block: int,
        dtype: torch.dtype | None,
    ) -> QuantizedWeight:  # fmt: skip
        """The same without the checks, which take as long as a small layer: for who reads a layer on every call. The
        kernels have checks of their own.
        """
        weight = object.__new__(cls)
        weight.__dict__.update(format=format, layout=layout, parts=parts, shape=shape, block=block, dtype=dtype)
        return weight

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def decoded_dtype(self) -> torch.dtype:
        """Of ``dequantize()``."""
        return self.dtype or torch.float32

    @property
    def is_cpu(self) -> bool:
        return self.parts[0].is_cpu

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments that stand for the weight in the ops' schemas."""
        return list(self.parts), self.layout, *self.shape, self.block, self.decoded_dtype

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Scales and tables included."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a new tensor [out_features, in_features].

        Args:
            dtype: float32, bfloat16 or float16; None for ``self.dtype``.
        """
        weight = self if dtype is None else replace(self, dtype=dtype)
        return torch.ops.lora_kernels.dequantize.default(*weight.args)

    def split(self, rows: int) -> list[QuantizedWeight]:
        """Blocks of so many rows, or of a few more where the layout asks for it; the last may have fewer. As
        ``Tensor.split``.
        """
        n, k = self.shape
        layout = LAYOUTS[self.layout]
        rows += -rows % layout.row_step
        blocks = []
        for begin in range(0, n, rows):
            end = min(n, begin + rows)
            parts = layout.rows(self.parts, n, k, self.block, begin, end)
            blocks.append(replace(self, parts=parts, shape=(end - begin, k)))
        return blocks

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> QuantizedWeight:
        """The same weight on another device, or decoding to another dtype."""
        return replace(self, parts=tuple(part.to(device) for part in self.parts), dtype=dtype or self.dtype)

    def is_inference(self) -> bool:
        """As ``Tensor.is_inference``."""
        return self.parts[0].is_inference()

    def __repr__(self) -> str:
        n, k = self.shape
        return (
            f"QuantizedWeight({self.format}, [{n}, {k}], {self.bits_per_weight:.2f} bits per weight, "
            f"to {str(self.dtype or 'any dtype').removeprefix('torch.')}, on {self.device})"
        )


class Format(ABC):
    """What a user names: a layout, how weights are brought into it, and how they are kept in files."""

    name: str
    layout: Layout
    entries: tuple[str, ...] = ("weight",)
    """How the names of its entries in a ``state_dict`` begin, behind a layer's name."""

    @abstractmethod
    def quantize(self, weight: Tensor, **options: Any) -> QuantizedWeight:
        """``weight`` [out_features, in_features] in this format; the options are the format's."""

    @abstractmethod
    def why_not(self, weight: Tensor, **options: Any) -> Reason | None:
        """Why ``quantize`` cannot take this weight; None if it can."""

    @abstractmethod
    def again(self, weight: Tensor, like: QuantizedWeight) -> QuantizedWeight:
        """``weight`` quantised with the options of ``like``, whose parts have the sizes of the result's."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The entries of a ``state_dict`` by what follows a layer's name, under the names of the format's library."""

    @abstractmethod
    def unpack(self, entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedWeight | None:
        """The weight of such entries, which computes in ``dtype``; None where they are of another format.

        Raises:
            ValueError: an entry is missing, or does not fit the others.
        """
