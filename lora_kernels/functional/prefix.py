"""``prefix_kv``: arguments are checked here, then dispatched, as in ``lora.py``."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from ..ops import eager
from ..ops import prefix_kv as _op
from ..ops.prefix_kv import PrefixKVFunction
from ..plain import FLOATS
from .checks import check_dense
from .why import explains

_OP = "prefix_kv"

KeysAndValues = tuple[tuple[Tensor, Tensor], ...]
"""A (key, value) pair for each layer."""


def prefix_kv(
    prefix: Tensor,
    layers: int,
    heads: int,
    *,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    copies: bool = False,
) -> KeysAndValues:
    """Trainable rows as the keys and values that every layer attends to, in front of those of the text.

    Prefix tuning is from Li and Liang, ACL 2021; P-tuning v2 (Liu et al., ACL 2022) is the same. Equivalent to::

        tokens, width = prefix.shape
        kv = prefix.to(dtype).view(tokens, layers, 2, heads, width // (2 * layers * heads))
        kv = kv.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, batch_size, -1, -1, -1)
        [(kv[layer, 0], kv[layer, 1]) for layer in range(layers)]

    but written once, contiguously, dtype cast included. All tensors are views of one [layers, 2, batch, heads, tokens,
    head_dim]; without ``copies`` the samples of a batch lie at one address, so that nothing is written that a cache
    would only copy once more.

    Nothing is saved for backward. The gradient sums over the batch in float32 (float64 for float64) in the order of the
    samples, so it is bitwise reproducible, whatever the number of threads. It reads each layer's gradient where it is.

    Args:
        prefix: [tokens, layers * 2 * heads * head_dim]: for each layer its keys, then its values, head by head, as in
            PEFT; float32, bfloat16, float16 or float64. Any strides.
        layers: number of layers.
        heads: heads of the keys and values, which under grouped-query attention are fewer than the queries'.
        batch_size: samples.
        dtype: of the keys and values; None means that of ``prefix``. Any of these dtypes.
        copies: write the prefix for every sample, for a consumer that needs memory of its own for each.

    Returns:
        For each layer a key and a value, [batch_size, heads, tokens, head_dim].

    Raises:
        TypeError: prefix is no tensor, or a sparse or nested one, a number is not an integer, or a dtype is not one of
            these.
        ValueError: prefix is not [tokens, a multiple of layers * 2 * heads], or a number is out of range.
    """
    args = arguments(prefix, layers, heads, batch_size=batch_size, dtype=dtype, copies=copies)
    parts = eager.call(_op.SPEC, PrefixKVFunction, args)
    return tuple(zip(parts[0::2], parts[1::2], strict=True))


@explains(_OP, _op.SPEC, example=lambda zeros: (zeros(16, 2 * 2 * 576), 2, 9))
def arguments(
    prefix: Tensor, layers: int, heads: int, *, batch_size: int = 1, dtype: torch.dtype | None = None,
    copies: bool = False,
) -> tuple:  # fmt: skip
    """The op's positional arguments from those of ``prefix_kv``, checked."""
    if not isinstance(prefix, Tensor):
        raise TypeError(f"{_OP}: prefix must be a tensor, got {type(prefix).__name__}")
    check_dense(_OP, "prefix", prefix)
    dtype = prefix.dtype if dtype is None else dtype
    for name, value in (("prefix", prefix.dtype), ("dtype", dtype)):
        if value not in FLOATS:
            raise TypeError(f"{_OP}: {name} must be float32, bfloat16, float16 or float64, got {value}")
    for name, count, least in (("layers", layers, 1), ("heads", heads, 1), ("batch_size", batch_size, 0)):
        if isinstance(count, bool) or not isinstance(count, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{_OP}: {name} must be an integer, got {count!r}")
        if count < least:
            raise ValueError(f"{_OP}: {name} must be at least {least}, got {count}")
    if prefix.dim() != 2 or prefix.shape[1] % (2 * layers * heads) != 0:
        expected = f"[tokens, {2 * layers * heads} * head_dim] for {layers} layers of {heads} heads"
        raise ValueError(f"{_OP}: prefix must be {expected}, got shape {tuple(prefix.shape)}")
    return prefix, layers, heads, batch_size, bool(copies), dtype
