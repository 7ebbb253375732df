"""Layouts "gptq", "gptq_v1" and "awq": integers, and for a row's group of columns a zero point and a scale. Reads the
layers of GPTQModel, AutoGPTQ and AutoAWQ whose bytes are those of a checkpoint.

From Frantar et al., "GPTQ", ICLR 2023, and Lin et al., "AWQ", MLSys 2024. Both need data to quantise, so that weights
are read here and not made. No kernel decodes them: plain torch code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..plain import PLAIN_TENSORS
from ..reasons import Reason
from .weight import DECODED, Layout, QuantizedWeight, register

_WORD = 32
_AWQ_BITS = 4
_AT_ONCE, _AT_ONCE_IN_CACHE = 1 << 24, 1 << 20
"""Weights that are decoded at a time: on a GPU, so many that it has work for longer than it takes to tell it so."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours each four bits of a word are."""


class _ZeroPoints(Layout):
    """What the layouts have in common. A weight is ``scale * (number - zero)``, rounded to the dtype of the scales, in
    which the libraries have it, and from there to the dtype asked for.
    """

    def check(self, parts: Sequence[Tensor], n: int, k: int, block: int) -> None:
        if len(parts) != self.count:
            raise ValueError(f"{self.name}: {self.count} parts are expected, got {len(parts)}")
        bits = self.bits(parts, k)
        ends_in_word = bits > 0 and (_WORD % bits == 0 or n % _WORD == k % _WORD == 0)
        if block < 1 or bits not in self.known_bits or not ends_in_word:
            raise ValueError(
                f"{self.name}: the sizes of data are not those of a weight of {n}x{k} in groups of {block}"
            )
        of_zeros = -(-k // block), -(-n * bits // _WORD)
        expected: list[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]] = [
            ("data", (torch.int32,), self.data_shape(n, k, bits)),
            ("zeros", (torch.int32,), of_zeros),
            ("scales", DECODED, (of_zeros[0], n)),
            ("groups", (torch.int32,), (k,)),
        ]
        for part, (name, dtypes, shape) in zip(parts, expected):
            if part.dtype not in dtypes or tuple(part.shape) != shape:
                raise ValueError(
                    f"{self.name}: {name} must be {' or '.join(map(str, dtypes))} {shape} for a weight of {n}x{k} in "
                    f"groups of {block}, got {part.dtype} {tuple(part.shape)}"
                )

    def decode(self, parts: Sequence[Tensor], n: int, k: int, block: int, dtype: torch.dtype) -> Tensor:
        at_once = _AT_ONCE_IN_CACHE if parts[0].is_cpu else _AT_ONCE
        rows = max(1, at_once // max(1, k))
        rows += -rows % self.row_step
        if n <= rows:
            return self.decode_rows(parts, k, block).to(dtype)
        weights = torch.empty((n, k), dtype=dtype, device=parts[0].device)
        for begin in range(0, n, rows):
            end = min(n, begin + rows)
            weights[begin:end] = self.decode_rows(self.rows(parts, n, k, block, begin, end), k, block)
        return weights

    def decode_rows(self, parts: Sequence[Tensor], k: int, block: int) -> Tensor:
        """All of the weight, in the dtype of the scales; it takes four times as much memory."""
        raise NotImplementedError

    count: ClassVar[int]
    """Of parts."""
    known_bits: ClassVar[tuple[int, ...]]

    def bits(self, parts: Sequence[Tensor], k: int) -> int:
        """Of a number; 0 where the data has no such size."""
        raise NotImplementedError

    def data_shape(self, n: int, k: int, bits: int) -> tuple[int, ...]:
        raise NotImplementedError


class _Gptq(_ZeroPoints):
    """Parts, for a weight [N, K] in numbers of 2, 3, 4 or 8 bits and groups of ``block`` columns:

    0. data: int32 [K*bits/32, N]. The numbers of a row lie one behind the other, from the lowest bit of a word on.
    1. zeros: int32 [groups, N*bits/32, rounded up], the same along a group's rows.
    2. scales: float16, bfloat16 or float32 [groups, N].
    3. groups: int32 [K], the group of each column: K/block columns each, in any order.

    In "gptq_v1" zeros are kept less one; what one more would not fit into the bits is 0.
    """

    count, known_bits = 4, (2, 3, 4, 8)
    row_step = _WORD  # rows that begin at a word of the zeros, whatever the bits

    def __init__(self, name: str, zeros_less_one: bool) -> None:
        self.name, self.zeros_less_one = name, zeros_less_one  # type: ignore[misc]

    def bits(self, parts: Sequence[Tensor], k: int) -> int:
        return _quotient(parts[0].shape[0] * _WORD, k)

    def data_shape(self, n: int, k: int, bits: int) -> tuple[int, ...]:
        return k * bits // _WORD, n

    def rows(self, parts: Sequence[Tensor], n: int, k: int, block: int, begin: int, end: int) -> tuple[Tensor, ...]:
        data, zeros, scales, groups = parts
        bits = self.bits(parts, k)
        zeros = zeros[:, begin * bits // _WORD : -(-end * bits // _WORD)]
        return data[:, begin:end].contiguous(), zeros.contiguous(), scales[:, begin:end].contiguous(), groups

    def decode_rows(self, parts: Sequence[Tensor], k: int, block: int) -> Tensor:
        data, zeros, scales, groups = parts
        bits = self.bits(parts, k)
        zero = _numbers(zeros, bits, 1, torch.int32)[:, : scales.shape[1]]
        if self.zeros_less_one:
            zero = (zero + 1) & ((1 << bits) - 1)
        weights = _numbers(data, bits, 0, scales.dtype)
        weights -= zero.to(scales.dtype)[groups]
        weights *= scales[groups]
        return weights.t().contiguous()


class _Awq(_ZeroPoints):
    """Parts, for a weight [N, K] in numbers of four bits and groups of ``block`` columns:

    0. data: int32 [K, N/8]. Of eight neighbours in a column, the even ones are in the lower half of a word.
    1. zeros: int32 [K/block, N/8], the same.
    2. scales: float16, bfloat16 or float32 [K/block, N].
    """

    name = "awq"
    count, known_bits = 3, (_AWQ_BITS,)
    row_step = _WORD // _AWQ_BITS

    def bits(self, parts: Sequence[Tensor], k: int) -> int:
        return _AWQ_BITS

    def data_shape(self, n: int, k: int, bits: int) -> tuple[int, ...]:
        return k, n * bits // _WORD

    def rows(self, parts: Sequence[Tensor], n: int, k: int, block: int, begin: int, end: int) -> tuple[Tensor, ...]:
        data, zeros, scales = parts
        words = slice(begin * _AWQ_BITS // _WORD, end * _AWQ_BITS // _WORD)
        return data[:, words].contiguous(), zeros[:, words].contiguous(), scales[:, begin:end].contiguous()

    def decode_rows(self, parts: Sequence[Tensor], k: int, block: int) -> Tensor:
        data, zeros, scales = parts
        weights = _numbers(data, _AWQ_BITS, 1, scales.dtype, _AWQ_ORDER)
        zero = _numbers(zeros, _AWQ_BITS, 1, scales.dtype, _AWQ_ORDER)
        weights -= zero.repeat_interleave(block, 0)[:k]
        weights *= scales.repeat_interleave(block, 0)[:k]
        return weights.t().contiguous()


GPTQ = register(_Gptq("gptq", zeros_less_one=False))
GPTQ_V1 = register(_Gptq("gptq_v1", zeros_less_one=True))
AWQ = register(_Awq())


def blanks(n: int, k: int, scales: Tensor) -> dict[str, QuantizedWeight]:
    """By layout, a weight [n, k] of zeros in four bits, in one group with ``scales`` [1, n]. Nothing here makes these
    formats of a weight, but it may be asked what serves them.
    """
    bits, layouts = _AWQ_BITS, cast(tuple[_ZeroPoints, ...], (GPTQ, GPTQ_V1, AWQ))
    zeros = scales.new_zeros((1, n * bits // _WORD), dtype=torch.int32)
    groups = scales.new_zeros(k, dtype=torch.int32)
    return {
        layout.name: QuantizedWeight(
            layout.name,
            layout.name,
            (scales.new_zeros(layout.data_shape(n, k, bits), dtype=torch.int32), zeros, scales, groups)[: layout.count],
            (n, k),
            k,
            None,
        )
        for layout in layouts
    }


def _numbers(words: Tensor, bits: int, dim: int, dtype: torch.dtype, order: Sequence[int] | None = None) -> Tensor:
    """The numbers that lie one behind the other along ``dim`` of int32 words, from the lowest bit on: those of as many
    words as hold a whole number of them, into the places that ``order`` says.
    """
    period = bits // math.gcd(bits, _WORD)
    count = period * _WORD // bits
    sources = words.unflatten(dim, (-1, period)).unbind(dim + 1)
    shape = [*words.shape[:dim], words.shape[dim] // period, count, *words.shape[dim + 1 :]]
    numbers = torch.empty(shape, dtype=dtype, device=words.device)
    places = numbers.unbind(dim + 1)
    for i in range(count):
        word, bit = divmod(i * bits, _WORD)
        number, low = sources[word] >> bit, _WORD - bit
        if low < bits:  # the rest is in the next word
            number = number & ((1 << low) - 1) | sources[word + 1] << low
        places[order[i] if order else i].copy_(number & ((1 << bits) - 1))
    return numbers.flatten(dim, dim + 1)


def _quotient(a: int, b: int) -> int:
    """a / b, 0 where that is no integer."""
    return a // b if b > 0 and a % b == 0 else 0


# ------------------------------------------------------------------------------------------------------- readers

_AS_IN_FILES = (None, "torch", "triton", "tritonv2", "cuda", "cuda-old", "awq_torch", "awq_gemm", "awq_gemm_triton")
"""What layers call the kernel that they are for (``QUANT_TYPE``), where that takes the bytes of a checkpoint."""
_HANDLES = ("q_handle", "q4", "ipex_linear")
"""What layers without such a name keep for a kernel that has bytes of its own."""


def from_gptq(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What a layer of GPTQModel or AutoGPTQ holds: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
    parts = _parts(module, "g_idx")
    if parts is None or isinstance(parts, Reason):
        return parts
    _, _, scales, groups = parts
    k, n = groups.numel(), scales.shape[1]
    asked: Any = getattr(module, "qzero_format", None)  # what loads a first version's checkpoint may add the one
    version = 1 if asked is None else asked()
    if version not in (1, 2) or getattr(module, "planar", False):
        return Reason.FORMAT
    return _checked("gptq", GPTQ_V1 if version == 1 else GPTQ, parts, n, k)


def from_awq(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What a layer of GPTQModel or AutoAWQ holds, of those for products of matrices: ``qweight``, ``qzeros`` and
    ``scales``.
    """
    parts = _parts(module)
    if parts is None or isinstance(parts, Reason):
        return parts
    if getattr(module, "bits", getattr(module, "w_bit", _AWQ_BITS)) != _AWQ_BITS:
        return Reason.FORMAT
    return _checked("awq", AWQ, parts, parts[2].shape[1], parts[0].shape[0])


def _parts(module: nn.Module, *more: str) -> tuple[Tensor, ...] | Reason | None:
    """The tensors of a layer, looked at as far as neither layout matters."""
    own = {**module.__dict__["_parameters"], **module.__dict__["_buffers"]}
    groups = own.get("g_idx")
    if own.get("qweight") is None or bool(more) != (groups is not None and groups.numel() > 0):
        return None
    parts: tuple[Any, ...] = tuple(own.get(name) for name in ("qweight", "qzeros", "scales", *more))
    if getattr(module, "QUANT_TYPE", None) not in _AS_IN_FILES:
        return Reason.KERNEL_BYTES
    if any(getattr(module, name, None) is not None for name in _HANDLES):
        return Reason.KERNEL_BYTES
    if any(part is None for part in parts):
        return Reason.DISPLACED
    # A rotation of x, and an adapter that the layer itself adds.
    if getattr(module, "had_K", None) is not None or getattr(module, "adapter", None) is not None:
        return Reason.BASE_LAYER
    for part in parts:
        if type(part) not in PLAIN_TENSORS:
            return Reason.DTENSOR
        if part.device != parts[0].device:
            return Reason.DEVICES
        if not part.is_contiguous():
            return Reason.LAYOUT
    return tuple(part.detach() for part in parts) if parts[2].dim() == 2 else Reason.FORMAT


def _checked(name: str, layout: Layout, parts: tuple[Tensor, ...], n: int, k: int) -> QuantizedWeight | Reason:
    block = -(-k // max(1, parts[2].shape[0]))
    try:
        layout.check(parts, n, k, block)
    except ValueError:
        return Reason.FORMAT
    return QuantizedWeight.of_layer(name, layout.name, parts, (n, k), block, None)
