"""``lora_linear``, and its base product and mask alone: arguments are checked here, then dispatched."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..formats import QuantizedWeight
from ..ops import dropout_mask as _mask_op
from ..ops import eager
from ..ops import frozen_linear as _frozen_op
from ..ops import lora_linear as _op
from ..ops.lora_linear import LoRALinearFunction
from . import packed
from .checks import (
    check_adapter,
    check_adapter_dtype,
    check_base,
    check_branch,
    check_dense,
    check_probability,
    seed_tensor,
    sizes_fit,
    types_fit,
)
from .why import explains


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer and its low-rank update in one op (LoRA, Hu et al., ICLR 2022).

    Equivalent to::

        F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout_p, training), lora_A), lora_B)

    except that the dropout mask comes from a counter-based generator: it is never stored, and backward computes it
    anew. For backward only x, s = dropout(x) Aᵀ and the seed are saved.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64. Any strides.
        weight: [out_features, in_features], dtype of x; or a ``QuantizedWeight``, from whose packed parts forward and
            backward are computed. It decodes to its dtype, or to x's where x has 16 bits; the product is x's.
        lora_A: [rank, in_features], dtype of x, or float32 over a bfloat16/float16 x.
        lora_B: [out_features, rank], dtype of lora_A.
        bias: [out_features], dtype of x.
        scaling: factor of the update, usually ``alpha / rank``: a number, or a tensor of one element on x's device,
            which is read there (and multiplied into lora_B).
        dropout_p: probability of zeroing an element of x on the LoRA branch, in [0, 1]. Active when ``training``.
        training: whether dropout is applied.
        seed: the 64-bit key of the mask; an int, or an int64 tensor of one element on x's device. None draws one from
            torch's generator, so that ``torch.manual_seed`` and activation checkpointing reproduce it.

    Returns:
        [..., out_features], dtype of x.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has a dtype that does not fit.
        ValueError: shapes, devices or numbers do not fit. The message names the argument.
    """
    if isinstance(weight, QuantizedWeight):
        return packed.lora_linear(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, seed)
    try:
        args = arguments_of_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, seed)
        return eager.call(_op.SPEC, LoRALinearFunction, args, inference=_op.INFERENCE)
    except RuntimeError:  # asking every call for its layouts is felt in a small layer
        for name, t in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
            check_dense("lora_linear", name, t)
        raise


def lora_linear_of_layer(
    x: Tensor, weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scaling: float | Tensor, dropout_p: float, training: bool,
) -> Tensor:  # fmt: skip
    """``lora_linear`` for a layer that has looked at types, dtypes, scaling and transforms itself.

    A small layer takes as long as looking twice does.
    """
    if type(weight) is QuantizedWeight:
        return packed.lora_linear_of_layer(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training)
    if (
        type(scaling) is float and (dropout_p == 0.0 or not training)
        and not is_compiling() and not dispatch.any_autocast() and (bias is None or bias.dtype == x.dtype)
        and sizes_fit(x, weight, lora_A, lora_B, bias)
    ):  # fmt: skip
        args = x, weight, lora_A, lora_B, bias, None, scaling, 0.0
        return eager.run(LoRALinearFunction, args, _op.INFERENCE)
    return lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p, training=training)


def arguments_of_call(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Tensor,
    dropout_p: float, training: bool, seed: int | Tensor | None,
) -> tuple:  # fmt: skip
    """The op's positional arguments, checked; draws the seed where dropout is active."""
    drops_nothing = type(dropout_p) in (float, int) and (dropout_p == 0.0 or (not training and 0.0 < dropout_p <= 1.0))
    plain = drops_nothing and type(scaling) is float and -math.inf < scaling < math.inf
    if plain and types_fit(x, weight, lora_A, lora_B, bias) and sizes_fit(x, weight, lora_A, lora_B, bias):
        return x, weight, lora_A, lora_B, bias, None, scaling, 0.0
    op = "lora_linear"
    check_base(op, x, weight, bias)
    check_adapter(op, weight, lora_A, lora_B)
    if lora_A.dtype != weight.dtype and not dispatch.autocast_enabled(x.device.type):
        check_adapter_dtype(op, "weight", weight.dtype, lora_A)
    return x, weight, lora_A, *check_branch(op, x, lora_B, bias, scaling, dropout_p, training, seed)


@explains(
    "lora_linear", _op.SPEC, example=lambda zeros: (zeros(512, 576), zeros(1536, 576), zeros(16, 576), zeros(1536, 16))
)
def arguments(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None, *,
    scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> tuple:  # fmt: skip
    """The op's positional arguments from those of ``lora_linear``, checked; no seed is drawn."""
    return arguments_of_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, 0 if seed is None else seed)


def frozen_linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose weight and bias do not train.

    Equivalent to ``F.linear(x, weight, bias)``. On a CPU, 16 bits go through fp32 where there are no instructions for
    them, and fp32 goes to the library that was measured to be faster. Saved for backward is the weight, by reference.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64.
        weight: [out_features, in_features], dtype of x; or a ``QuantizedWeight``, as in ``lora_linear``.
        bias: [out_features], dtype of x.

    Returns:
        [..., out_features], dtype of x. Only x gets a gradient.

    Raises:
        TypeError, ValueError: as ``lora_linear``; ``RuntimeError`` in backward if weight or bias require grad.
    """
    if isinstance(weight, QuantizedWeight):
        return packed.frozen_linear(x, weight, bias)
    return torch.ops.lora_kernels.frozen_linear.default(*_bind_frozen(x, weight, bias))


@explains("frozen_linear", _frozen_op.SPEC, example=lambda zeros: (zeros(512, 576), zeros(1536, 576)))
def _bind_frozen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    check_base("frozen_linear", x, weight, bias)
    return x, weight, bias


def dropout_mask(rows: int, columns: int, p: float, seed: int | Tensor) -> Tensor:
    """The mask that ``lora_linear`` applies to an x of [rows, columns] for this seed.

    Equivalent in distribution to ``torch.rand(rows, columns) >= p``. The generator is Philox 4x32-10 (Salmon et al.,
    "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a bit depends on seed, row and column alone, on any device.

    Args:
        rows: product of x's leading dimensions.
        columns: x's last dimension.
        p: probability of dropping, in [0, 1].
        seed: int, or int64 tensor of one element; the mask is made on its device.

    Returns:
        bool [rows, columns], True where the element is kept.

    Raises:
        TypeError: seed is neither an int nor a tensor.
        ValueError: rows or columns below 0, p no number in [0, 1], or a tensor that is not int64 of one element.
    """
    return torch.ops.lora_kernels.dropout_mask.default(*_bind_mask(rows, columns, p, seed))


@explains("dropout_mask", _mask_op.SPEC, example=lambda zeros: (512, 576, 0.1, zeros(1, dtype=torch.int64)))
def _bind_mask(rows: int, columns: int, p: float, seed: int | Tensor) -> tuple:
    if rows < 0 or columns < 0:
        raise ValueError(f"dropout_mask: rows and columns must not be negative, got {rows} and {columns}")
    check_probability("dropout_mask", "p", p)
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    return seed_tensor("dropout_mask", seed, device), rows, columns, p
