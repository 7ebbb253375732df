"""Layouts "codes4" and "codes4_low": four bits choose one of 16 codes, a scale per block multiplies it. NF4 and FP4,
bitsandbytes' bits, are "codes4"; mx.py has formats of the other.

From Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023. Under double quantisation the
scales are 8-bit numbers themselves, of a code of 256 and with a scale per 256 of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reasons import Reason
from .weight import DECODED, Format, Layout, QuantizedWeight, are_together, register

_NESTED_BLOCK = 256
"""How many scales share a scale, under double quantisation."""


class _Codes4(Layout):
    """Parts, for N*K weights in blocks of ``block``:

    0. data: uint8 [N*K/2]. Weight i = n*K + k is in byte i/2, in its high half where i is even. In "codes4_low", where
       i is odd.
    1. scales: float32 [N*K/block]; or uint8, where double quantised.
    2. code: float32 [16].

    and where double quantised:

    3. float32 [blocks/256, rounded up], which multiply.
    4. float32 [256], the code of the scales.
    5. float32, one element, which is added.

    A weight is ``code[nibble] * scale`` in float32, rounded once to the dtype asked for. A double quantised scale is
    ``code2[scales] * scales2 + offset``, each operation rounded.
    """

    def __init__(self, name: str, even_is_low: bool) -> None:
        self.name, self.even_is_low = name, even_is_low  # type: ignore[misc]

    def check(self, parts: Sequence[Tensor], n: int, k: int, block: int) -> None:
        if len(parts) not in (3, 6):
            raise ValueError(f"{self.name}: 3 parts are expected, or 6 where double quantised, got {len(parts)}")
        if block < 2 or block % 2 or k % block:
            raise ValueError(f"{self.name}: in_features must be a multiple of an even block, got {k} and {block}")
        blocks = n * k // block
        expected: list[tuple[str, torch.dtype, int]] = [
            ("data", torch.uint8, n * k // 2),
            ("scales", torch.uint8 if len(parts) == 6 else torch.float32, blocks),
            ("code", torch.float32, 16),
            ("scales of scales", torch.float32, -(-blocks // _NESTED_BLOCK)),
            ("code of scales", torch.float32, 256),
            ("offset of scales", torch.float32, 1),
        ]
        for part, (name, dtype, size) in zip(parts, expected):
            if part.dtype != dtype or part.numel() != size:
                raise ValueError(
                    f"{self.name}: {name} must be {dtype} of {size} elements for a weight of {n}x{k} in blocks of "
                    f"{block}, got {part.dtype} of {part.numel()}"
                )

    def rows(self, parts: Sequence[Tensor], n: int, k: int, block: int, begin: int, end: int) -> tuple[Tensor, ...]:
        # Rows need not begin where 256 scales do, so that theirs are decoded.
        data, of_blocks = parts[0].view(n, k // 2), scales(parts).view(n, k // block)
        return data[begin:end].reshape(-1), of_blocks[begin:end].reshape(-1), parts[2]

    def decode(self, parts: Sequence[Tensor], n: int, k: int, block: int, dtype: torch.dtype) -> Tensor:
        data, _, code = parts[:3]
        halves = data.view(-1) >> 4, data.view(-1) & 15
        nibbles = torch.stack(halves[::-1] if self.even_is_low else halves, dim=1).view(-1, block)
        weights = code[nibbles.int()] * scales(parts)[:, None]
        return weights.view(n, k).to(dtype)


LAYOUT = register(_Codes4("codes4", even_is_low=False))
LOW = register(_Codes4("codes4_low", even_is_low=True))


def scales(parts: Sequence[Tensor]) -> Tensor:
    """The scales [blocks] in float32."""
    if len(parts) == 3:
        return parts[1].view(-1)
    _, indices, _, outer, code, offset = parts
    codes = code[indices.view(-1).int()]
    outer = outer.view(-1).repeat_interleave(_NESTED_BLOCK)[: codes.numel()]
    return codes * outer + offset.view(())


# ---------------------------------------------------------------------------------------------------- quantising


_DATA, _STATE = "weight", "weight.quant_state.bitsandbytes__"
_ENTRIES = (_DATA, "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
"""bitsandbytes' names for the parts; the scales' offset is with the sizes in ``_STATE``."""


class FourBit(Format):
    """NF4 or FP4."""

    layout = LAYOUT

    def __init__(self, name: str, code: Sequence[float]) -> None:
        self.name = name
        self.code = torch.tensor(code, dtype=torch.float32)

    def quantize(
        self, weight: Tensor, *, block: int = 64, double_quant: bool = True, **unknown: Any
    ) -> QuantizedWeight:  # type: ignore[override]
        """Each block's largest magnitude is its scale; every weight takes the nearest code.

        Args:
            weight: [out_features, in_features]; float32, bfloat16 or float16.
            block: how many weights share a scale; an even divisor of in_features.
            double_quant: keep the scales in eight bits, too.

        Returns:
            The bits of ``bitsandbytes.functional.quantize_4bit`` on a CPU. It decodes to ``weight``'s dtype.
        """
        if unknown:
            raise TypeError(f"{self.name}: block and double_quant are known, got {', '.join(unknown)}")
        if weight.dtype not in DECODED or weight.dim() != 2:
            raise TypeError(
                f"{self.name}: weight must be [out_features, in_features] of float32, bfloat16 or float16, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        n, k = weight.shape
        if block < 2 or block % 2 or k % block:
            raise ValueError(f"{self.name}: in_features must be a multiple of an even block, got {k} and {block}")
        data, largest = self._nearest_codes(weight.detach().reshape(-1, block).float())
        code = self.code.to(weight.device, copy=True)  # files may not share tensors between layers
        parts: tuple[Tensor, ...] = (data, largest, code)
        if double_quant:
            offset = largest.mean()
            indices, outer = _nearest_of_256(largest - offset, dynamic_code(weight.device))
            parts = (data, indices, code, outer, dynamic_code(weight.device), offset)
        return QuantizedWeight(self.name, LAYOUT.name, parts, (n, k), block, weight.dtype)

    def why_not(self, weight: Tensor, *, block: int = 64, **_: Any) -> Reason | None:  # type: ignore[override]
        if weight.dtype not in DECODED:
            return Reason.DTYPE
        return Reason.BLOCKS if block > 0 and weight.shape[1] % block else None

    def again(self, weight: Tensor, like: QuantizedWeight) -> QuantizedWeight:
        return self.quantize(weight.to(like.decoded_dtype), block=like.block, double_quant=len(like.parts) == 6)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        entries = dict(zip(_ENTRIES, weight.parts))
        entries[_DATA] = entries[_DATA].view(-1, 1)
        state: dict[str, Any] = {
            "quant_type": self.name, "blocksize": weight.block, "shape": list(weight.shape),
            "dtype": str(weight.decoded_dtype).removeprefix("torch."),
        }  # fmt: skip
        if len(weight.parts) == 6:
            state |= {
                "nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": _number(weight.parts[5]),
            }  # fmt: skip
        entries[_STATE + self.name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return entries

    def unpack(self, entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> QuantizedWeight | None:
        packed = entries.get(_STATE + self.name)
        if packed is None:
            return None
        try:
            state = json.loads(bytes(packed.cpu().tolist()))
            n, k = state["shape"]
            is_nested = "nested_blocksize" in state
            data, *others = (entries[name] for name in (_ENTRIES if is_nested else _ENTRIES[:3]))
            if is_nested:
                others.append(torch.tensor(state["nested_offset"], dtype=torch.float32, device=data.device))
            data = data.contiguous().view(torch.uint8).view(-1)
            return QuantizedWeight(self.name, LAYOUT.name, (data, *others), (n, k), state["blocksize"], dtype)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: the entries of a packed weight do not fit together: {error!r}") from error

    def _nearest_codes(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The packed indices and the scales of [blocks, block] weights."""
        largest = blocks.abs().amax(dim=1)
        shares = (blocks * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
        code, order = self.code.to(blocks.device).sort(stable=True)
        indices = order[torch.bucketize(shares, (code[:-1] + code[1:]) / 2, out_int32=True)].to(torch.uint8)
        return indices[::2] << 4 | indices[1::2], largest


def _number(offset: Tensor) -> float:
    return 0.0 if offset.is_meta else offset.item()


def _nearest_of_256(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The indices into ``code`` and the scales of values in blocks of 256, the last of which may be shorter.

    As in bitsandbytes on a CPU, it is of a grid of 65536 shares of the scale that the nearest code is looked up.
    """
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    largest = blocks.abs().amax(dim=1)
    shares = (blocks * (1.0 / largest)[:, None]).nan_to_num_(0.0).clamp_(-1, 1).view(-1)[:count]
    on_grid = ((shares + 1) * 0.5 * _GRID + 0.5).floor_() / _GRID * 2 - 1
    indices = torch.bucketize(on_grid, (code[:-1] + code[1:]) / 2, out_int32=True)
    return indices.to(torch.uint8), largest


_GRID = 65535


def dynamic_code(device: torch.device | str = "cpu") -> Tensor:
    """The 256 ascending numbers of bitsandbytes' signed dynamic 8-bit map (Dettmers et al., "8-bit Optimizers via
    Block-wise Quantization", ICLR 2022): seven decades, the higher the more finely divided.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        for sign in (1, -1):
            numbers += (sign * 10 ** (exponent - 6) * means).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One bit of sign, two of exponent, one of mantissa, without IEEE's bias; the largest is scaled to 1.
_FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))

FORMATS = (FourBit("nf4", _NF4), FourBit("fp4", _FP4))


# ------------------------------------------------------------------------------------------------- bitsandbytes


def from_module(module: nn.Module) -> QuantizedWeight | Reason | None:
    """What bitsandbytes' ``Linear4bit``, or whatever keeps a weight as it does, holds."""
    weight: Any = module.__dict__["_parameters"].get("weight")
    # FSDP makes plain parameters of Params4bit; the module keeps the state then.
    state: Any = getattr(weight, "quant_state", None) or module.__dict__.get("quant_state")
    if state is None or not hasattr(state, "absmax"):
        return None
    if weight is None:
        return Reason.DISPLACED
    if state.__dict__.get("packing_format_for_cpu", False):  # its class takes its time to say that it has none
        return Reason.REPACKED
    if state.quant_type not in _NAMES:
        return Reason.FORMAT
    n, k = state.shape
    block, inner = state.blocksize, state.state2
    if k % block or (inner is not None and inner.blocksize != _NESTED_BLOCK):
        return Reason.BLOCKS
    with torch._C.DisableTorchFunctionSubclass():  # Params4bit would look at the call first
        data = weight.data
    if data.dtype != torch.uint8:
        data = data.view(torch.uint8)  # quant_storage: the same bytes under another name
    if type(data) is not Tensor or 2 * data.numel() != n * k:
        return Reason.DISPLACED  # sharded, or not quantised yet
    parts: tuple[Tensor, ...] = (data, state.absmax, state.code)
    if inner is not None:
        parts = (*parts, inner.absmax, inner.code, state.offset)
    if not are_together(parts):
        return Reason.DEVICES
    dtype = getattr(module, "compute_dtype", None)
    if dtype is None:  # until the first call; and for good if that one's x was float16, in which it multiplies then
        dtype = torch.float16 if getattr(module, "compute_type_is_set", False) else state.dtype
    if dtype not in DECODED:
        return Reason.DTYPE
    return QuantizedWeight.of_layer(state.quant_type, LAYOUT.name, parts, (n, k), block, dtype)


_NAMES = tuple(fmt.name for fmt in FORMATS)
