"""``lora_pack``: arguments are checked here, then dispatched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import dispatch
from ..formats import QuantizedWeight
from ..ops import eager
from ..ops import lora_pack as _op
from ..ops.lora_pack import LoRAPackFunction
from ..plain import FLOATS, inside_transform
from .checks import (
    check_adapter,
    check_adapter_dtype,
    check_base,
    check_dense,
    check_probability,
    scaled,
    seed_tensor,
)
from .why import Zeros, explains

_NAME = "lora_pack"
_PLAIN = (Tensor, nn.Parameter)


def lora_pack(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: float | Tensor | Sequence[float | Tensor] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Several LoRA linears (Hu et al., ICLR 2022) of one x in one op, as q, k and v or gate and up are.

    Equivalent to::

        tuple(
            lora_linear(x, weights[i], lora_As[i], lora_Bs[i], biases[i], scaling=scalings[i], dropout_p=dropout_p[i],
                        training=training, seed=philox.member_seed(seed, i))
            for i in range(len(weights))
        )

    with the same masks bit for bit, one of its own for each member. x is read once for all low-rank products, and its
    gradient is formed in one sum. For backward x, s = dropout(x) Aᵀ of each member and the seed are saved.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64. Any strides.
        weights: of each member, [out_features, in_features], dtype of x.
        lora_As: of each member, [rank, in_features], dtype of x, or float32 over a bfloat16/float16 x; None, as in
            lora_Bs, for a member that has no adapter. Ranks may differ.
        lora_Bs: of each member, [out_features, rank], dtype of its lora_A.
        biases: None, or of each member, [out_features], dtype of x, or None.
        scalings: factor of the updates, or of each member's: as ``scaling`` of ``lora_linear``.
        dropout_p: probability of zeroing an element of x on the LoRA branch, in [0, 1], or of each member. Active when
            ``training``.
        training: whether dropout is applied.
        seed: as ``lora_linear``; member i has the mask of ``philox.member_seed(seed, i)``, the first that of the seed.

    Returns:
        A tuple, of each member [..., out_features], dtype of x.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has a dtype that does not fit.
        ValueError: counts, shapes, devices or numbers do not fit. The message names the member and the argument.
    """
    try:
        if biases is None and not training and seed is None and type(scalings) is float:
            ys = _at_once(x, weights, lora_As, lora_Bs, scalings, dropout_p)
            if ys is not None:
                return ys
        args = _arguments(x, weights, lora_As, lora_Bs, biases, scalings, dropout_p, training, seed)
        return eager.call(_op.SPEC, LoRAPackFunction, args, inference=_op.INFERENCE)
    except RuntimeError:
        # Asking every call for layouts, and for sizes that the kernels look at, is felt in a small layer.
        _check_each(x, weights, lora_As, lora_Bs, biases)
        raise


def _at_once(
    x: Tensor, weights: Any, lora_As: Any, lora_Bs: Any, scaling: float, dropout_p: Any
) -> tuple[Tensor, ...] | None:
    """The results of a call without gradients whose few rows are decoded, if a glance shows that it is one: what other
    calls are looked at for takes as long as the products of a small layer. Sizes are left to the kernel.
    """
    if torch.is_grad_enabled() or type(x) not in _PLAIN or not x.is_cpu or type(dropout_p) is not float:
        return None
    if (
        dispatch.any_autocast()
        or inside_transform()
        or not (-math.inf < scaling < math.inf and 0.0 <= dropout_p <= 1.0)
    ):
        return None
    dtype = x.dtype
    for given in (weights, lora_As, lora_Bs):
        if type(given) is not list or not given:
            return None
        for t in given:
            if type(t) not in _PLAIN or t.dtype is not dtype or not t.is_cpu:
                return None
    for A in lora_As:
        if not A.numel():
            return None
    args: Any = x, weights, lora_As, lora_Bs, [], None, [scaling] * len(weights), []
    try:
        return _op.decode(*args) if _op.decodes(*args) else None
    except (RuntimeError, IndexError):  # of sizes; why is found where everything is looked at
        return None


def lora_pack_of_layers(
    x: Tensor, weights: list[Any], lora_As: list[Any], lora_Bs: list[Any], biases: list[Any], scalings: list[Any],
    ps: list[float], training: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """``lora_pack`` of layers that have looked at types, dtypes, devices and transforms themselves."""
    drops = True in training and any(ps)
    if drops or is_compiling() or dispatch.any_autocast() or not _are_plain(None, scalings, None, ps):
        probabilities = [p if trains else 0.0 for p, trains in zip(ps, training)] if drops else 0.0
        return lora_pack(
            x, weights, lora_As, lora_Bs, biases, scalings=scalings, dropout_p=probabilities, training=drops
        )
    args = x, weights, lora_As, lora_Bs, _laid_out(x, biases), None, scalings, [0.0] * len(weights)
    if x.is_cpu and not _op.looks_at_sizes():
        _check_each(x, weights, lora_As, lora_Bs, biases)
    try:
        if not torch.is_grad_enabled() and _op.decodes(*args):
            return _op.decode(*args)
        return eager.run(LoRAPackFunction, args, _op.INFERENCE)
    except RuntimeError:
        _check_each(x, weights, lora_As, lora_Bs, biases)
        raise


def _example(zeros: Zeros) -> tuple:
    weight, lora_A, lora_B = zeros(576, 576), zeros(16, 576), zeros(576, 16)
    return zeros(512, 576), [weight] * 3, [lora_A] * 3, [lora_B] * 3


@explains(_NAME, _op.SPEC, example=_example)
def arguments(
    x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None, *, scalings: float | Tensor | Sequence[float | Tensor] = 1.0,
    dropout_p: float | Sequence[float] = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> tuple:  # fmt: skip
    """The op's positional arguments from those of ``lora_pack``, checked; no seed is drawn."""
    seed = 0 if seed is None else seed
    return _arguments(x, weights, lora_As, lora_Bs, biases, scalings, dropout_p, training, seed)


def _arguments(
    x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None, scalings: Any, dropout_p: Any, training: bool, seed: int | Tensor | None,
) -> tuple:  # fmt: skip
    """The op's positional arguments, checked; draws the seed where dropout is active."""
    count = len(_sequence("weights", weights))
    if count == 0:
        raise ValueError(f"{_NAME}: weights must be of one member at least, got none")
    As, Bs = _of_each("lora_As", lora_As, count), _of_each("lora_Bs", lora_Bs, count)
    bias_of = [None] * count if biases is None else _of_each("biases", biases, count)
    factors, ps = _numbers("scalings", scalings, count), _numbers("dropout_p", dropout_p, count)
    drops_nothing = not training or (type(dropout_p) is float and dropout_p == 0.0)
    if drops_nothing and _are_plain(scalings, factors, dropout_p, ps) and _fit(x, weights, As, Bs, bias_of):
        biases = [] if biases is None else _laid_out(x, bias_of)
        return x, list(weights), As, Bs, biases, None, factors, [0.0] * count
    return _checked(x, list(zip(weights, As, Bs, bias_of)), factors, ps, training, seed)


def _fit(x: Tensor, weights: Sequence[Any], As: list[Any], Bs: list[Any], biases: list[Any]) -> bool:
    """Whether a glance shows that tensors pass the checks below, but for what kernels look at: sizes, and the dtypes of
    everything but lora_As. ``types_fit`` would look at x anew for each member.
    """
    if type(x) not in _PLAIN or not x.is_cpu or not _op.looks_at_sizes():  # no other device's calls are so short
        return False
    dtype = x.dtype
    if dtype not in FLOATS:
        return False
    for weight, A, B, bias in zip(weights, As, Bs, biases):
        if type(weight) not in _PLAIN or type(A) not in _PLAIN or type(B) not in _PLAIN:
            return False
        if not (weight.is_cpu and A.is_cpu and B.is_cpu) or A.dtype is not dtype or weight.dim() != 2 or not A.numel():
            return False
        if bias is not None and (type(bias) not in _PLAIN or not bias.is_cpu or not bias.numel()):
            return False
    return True


def _are_plain(scalings: Any, factors: list[Any], dropout_p: Any, ps: list[Any]) -> bool:
    """Whether a glance shows that numbers, given for all or for each, pass the checks below."""
    for factor in (scalings,) if type(scalings) is float else factors:
        if type(factor) is not float or not -math.inf < factor < math.inf:
            return False
    for p in (dropout_p,) if type(dropout_p) is float else ps:
        if type(p) is not float or not 0.0 <= p <= 1.0:
            return False
    return True


def _checked(
    x: Tensor, members: list[tuple], factors: list[Any], ps: list[Any], training: bool, seed: int | Tensor | None
) -> tuple:
    """As ``_arguments``, of members (weight, lora_A, lora_B, bias) that a glance does not pass."""
    weights, As, Bs, bias_of, scalings = [], [], [], [], []
    for i, ((weight, A, B, bias), factor, p) in enumerate(zip(members, factors, ps)):
        op = f"{_NAME}: member {i}"
        A, B = _check_member(op, x, weight, A, B, bias)
        check_probability(op, "dropout_p", p)
        B, scaling = scaled(op, B, factor)
        weights.append(weight)
        As.append(A)
        Bs.append(B)
        bias_of.append(bias)
        scalings.append(scaling)
    probabilities = [float(p) if training else 0.0 for p in ps]
    drawn = seed_tensor(_NAME, seed, x.device) if any(probabilities) else None
    return x, weights, As, Bs, _laid_out(x, bias_of), drawn, scalings, probabilities


def _check_member(
    op: str, x: Tensor, weight: Any, A: Tensor | None, B: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The adapter, of no rank where there is none."""
    if isinstance(weight, QuantizedWeight):
        raise TypeError(f"{op}: weight must be a tensor, got a QuantizedWeight: packs are of plain weights")
    check_base(op, x, weight, bias)
    if A is None and B is None:
        return x.new_empty((0, weight.shape[1])), x.new_empty((weight.shape[0], 0))
    lora_A: Any = A
    lora_B: Any = B
    check_adapter(op, weight, lora_A, lora_B)
    if lora_A.dtype != weight.dtype and not dispatch.autocast_enabled(x.device.type):
        check_adapter_dtype(op, "weight", weight.dtype, lora_A)
    return lora_A, lora_B


def _check_each(
    x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor | None], Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None,
) -> None:  # fmt: skip
    """What a call that has failed should have been told."""
    for name, given in (("x", (x,)), ("weights", weights), ("lora_As", As), ("lora_Bs", Bs)):
        for t in given:
            if t is not None:
                check_dense(_NAME, name, t)
    for i, (weight, A, B) in enumerate(zip(weights, As, Bs)):
        _check_member(f"{_NAME}: member {i}", x, weight, A, B, None if biases is None else biases[i])


def _laid_out(x: Tensor, bias_of: list[Tensor | None]) -> list[Tensor]:
    """The biases as the op takes them."""
    for bias in bias_of:
        if bias is not None:
            break
    else:
        return []
    return [x.new_empty(0) if bias is None else bias for bias in bias_of]


def _sequence(name: str, given: Any) -> Sequence[Any]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{_NAME}: {name} must be a list or tuple, got {type(given).__name__}")
    return given


def _of_each(name: str, given: Any, count: int) -> list[Any]:
    if len(_sequence(name, given)) != count:
        raise ValueError(f"{_NAME}: {name} must be of {count} members, as weights are, got {len(given)}")
    return list(given)


def _numbers(name: str, given: Any, count: int) -> list[Any]:
    """Of each member, where one is given for all, too."""
    return _of_each(name, given, count) if isinstance(given, (list, tuple)) else [given] * count
