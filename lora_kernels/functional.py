"""The ops as functions: arguments are checked here, then dispatched.

In eager mode a call with gradients goes through a hand-written ``autograd.Function`` (the cheapest route), a call
without goes straight to the backend, and under ``torch.compile`` both become the registered op.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from . import dispatch, dora, prefix_functional, prompt_functional
from ._checks import FLOATS, refuse_transforms
from .branches import add_rows
from .ops import dropout_mask as _mask_op
from .ops import frozen_linear as _frozen_op
from .ops import lora_embedding as _embedding_op
from .ops import lora_linear as _lora_op
from .ops import prefix_kv as _prefix_op
from .ops import prompt_embedding as _prompt_op
from .ops.lora_embedding import LoRAEmbeddingFunction
from .ops.lora_linear import LoRALinearFunction

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def lora_linear(
    x: Tensor,
    weight: Tensor,
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
        weight: [out_features, in_features], dtype of x.
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
    try:
        args = _lora_linear_args(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, seed)
        if is_compiling():
            return torch.ops.lora_kernels.lora_linear.default(*args)[0]
        refuse_transforms("lora_linear", args)
        if dispatch.any_autocast() and dispatch.autocast_enabled(x.device.type):
            args = dispatch.autocast_args(_lora_op.SPEC, x.device.type, args)
        return _run_lora_linear(args)
    except RuntimeError:  # asking every call for its layouts is felt in a small layer
        for name, t in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
            _check_dense("lora_linear", name, t)
        raise


def lora_linear_of_layer(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Tensor,
    dropout_p: float, training: bool,
) -> Tensor:  # fmt: skip
    """``lora_linear`` for a layer that has looked at types, dtypes, scaling and transforms itself.

    A small layer takes as long as looking twice does.
    """
    if (
        type(scaling) is float and (dropout_p == 0.0 or not training)
        and not is_compiling() and not dispatch.any_autocast() and (bias is None or bias.dtype == x.dtype)
        and _sizes_fit(x, weight, lora_A, lora_B, bias)
    ):  # fmt: skip
        return _run_lora_linear((x, weight, lora_A, lora_B, bias, None, scaling, 0.0))
    return lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p, training=training)


def _run_lora_linear(args: tuple) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return LoRALinearFunction.apply(*args)
    return dispatch.run(_lora_op.INFERENCE, *args)[0]


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A linear layer under weight-decomposed low-rank adaptation (DoRA, Liu et al., ICML 2024).

    Equivalent to::

        V = weight + scaling * lora_B @ lora_A
        F.linear(x, V * (magnitude / V.norm(dim=1).detach())[:, None], bias)

    without forming V: the low-rank update runs in ``lora_linear``, and the norm is a sum of three terms of which the
    largest temporary is [out_features, rank].

    Under dropout it is, as in PEFT, what only V adds to the frozen layer that sees the dropped x::

        d = F.dropout(x, dropout_p, training)
        F.linear(x, weight, bias) + F.linear(d, V * (magnitude / V.norm(dim=1).detach())[:, None] - weight)

    Two products with the weight are then needed: every column of d's has a factor of its own, and the magnitude's
    gradient is made of them.

    Args:
        x, weight, lora_A, lora_B, bias, scaling: as in ``lora_linear``.
        magnitude: [out_features], floating point.
        dropout_p, training: as in ``lora_linear``, but the mask is ``F.dropout``'s.

    Returns:
        [..., out_features], dtype of x. The norm takes no part in the gradient, as in the paper's section 4.3.
        ``lk.stats()`` and ``lk.why`` count and name the ``lora_linear`` inside; under dropout, ``lk.stats()`` counts
        two ``frozen_linear``.

    Raises:
        TypeError, ValueError: as ``lora_linear``.
    """
    op = "dora_linear"
    _check_base(op, x, weight, bias)
    _check_magnitude(op, magnitude, weight)
    _check_probability(op, "dropout_p", dropout_p)
    factor = magnitude / dora.norm(weight, lora_A, lora_B, scaling)
    # With factor 1 and lora_B 0, as at the start, both forms have the bits of the linear layer.
    if not training or dropout_p == 0.0:
        y = lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling)
        return dora.scale_columns(y, factor, None if bias is None else bias * (1 - factor))
    _check_adapter(op, weight, lora_A, lora_B)
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    linear = F.linear if trains else frozen_linear
    dropped = F.dropout(x, dropout_p, True)
    y = dora.scale_columns(linear(dropped, weight), factor - 1, linear(x, weight, bias))
    return add_rows(y, F.linear(dropped.to(y.dtype), lora_A.to(y.dtype)), lora_B * factor[:, None], scaling)


def dora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding under DoRA: every feature of ``lora_embedding``'s table has the norm that ``magnitude`` says.

    Equivalent to::

        V = weight + scaling * (lora_B @ lora_A).T
        F.embedding(ids, V * magnitude / V.norm(dim=0).detach(), padding_idx)

    Args:
        ids, weight, lora_A, lora_B, scaling, padding_idx: as in ``lora_embedding``.
        magnitude: [features], floating point.

    Returns:
        [*ids.shape, features], dtype of weight. ``lk.stats()`` counts the ``lora_embedding`` inside.

    Raises:
        TypeError, ValueError, IndexError: as ``lora_embedding``.
    """
    z = lora_embedding(ids, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)
    _check_magnitude("dora_embedding", magnitude, weight.t())
    return dora.scale_columns(z, magnitude / dora.norm(weight.t(), lora_A, lora_B, scaling), None)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding and its low-rank update in one op (LoRA, Hu et al., ICLR 2022).

    Equivalent to::

        F.embedding(ids, weight, padding_idx) + scaling * F.embedding(ids, lora_A.T, padding_idx) @ lora_B.T

    For backward only the ids and s = lora_A.T[ids] are saved. Gradients are bitwise reproducible.

    Args:
        ids: int64 or int32, any shape.
        weight: [vocabulary, features]; float32, bfloat16, float16 or float64.
        lora_A: [rank, vocabulary], dtype of weight, or float32 over a bfloat16/float16 weight.
        lora_B: [features, rank], dtype of lora_A.
        scaling: as in ``lora_linear``.
        padding_idx: the id, in [0, vocabulary), whose rows of weight and lora_A get no gradient.

    Returns:
        [*ids.shape, features], dtype of weight, under autocast, too.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has a dtype that does not fit.
        ValueError: shapes, devices or numbers do not fit. The message names the argument.
        IndexError: an id is out of range (on a GPU, a device-side assertion).
    """
    args = _lora_embedding_args(ids, weight, lora_A, lora_B, scaling, padding_idx)
    if is_compiling():
        return torch.ops.lora_kernels.lora_embedding.default(*args)[0]
    refuse_transforms("lora_embedding", args)
    if torch.is_grad_enabled() and (lora_A.requires_grad or args[3].requires_grad or weight.requires_grad):
        return LoRAEmbeddingFunction.apply(*args)
    return dispatch.run(_embedding_op.SPEC, *args)[0]


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` for a weight and bias that do not train.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64.
        weight: [out_features, in_features], dtype of x.
        bias: [out_features], dtype of x.

    Returns:
        [..., out_features], dtype of x. Only x gets a gradient.

    Raises:
        TypeError, ValueError: as ``lora_linear``; ``RuntimeError`` in backward if weight or bias require grad.
    """
    _check_base("frozen_linear", x, weight, bias)
    return torch.ops.lora_kernels.frozen_linear.default(x, weight, bias)


def dropout_mask(rows: int, columns: int, p: float, seed: int | Tensor) -> Tensor:
    """The mask that ``lora_linear`` applies to an x of [rows, columns] for this seed.

    Args:
        rows: product of x's leading dimensions.
        columns: x's last dimension.
        p: probability of dropping, in [0, 1].
        seed: int, or int64 tensor of one element; the mask is made on its device.

    Returns:
        bool [rows, columns], True where the element is kept.
    """
    if rows < 0 or columns < 0:
        raise ValueError(f"dropout_mask: rows and columns must not be negative, got {rows} and {columns}")
    _check_probability("dropout_mask", "p", p)
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    return torch.ops.lora_kernels.dropout_mask.default(_seed_tensor("dropout_mask", seed, device), rows, columns, p)


@torch.no_grad()
def merge_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """``weight += scaling * lora_B @ lora_A`` in place; the sum is formed in float32 and rounded once.

    Args:
        weight: [out_features, in_features].
        lora_A: [rank, in_features].
        lora_B: [out_features, rank].
        scaling: factor of the update.

    Returns:
        weight.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, or the merged weight is not finite (weight is then unchanged).
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"merge_: weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOATS:  # the update would be cut off, or rounded to what another part scales
        raise TypeError(f"merge_: weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    _check_dense("merge_", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"merge_: weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    _check_adapter("merge_", weight, lora_A, lora_B)
    _check_scaling("merge_", scaling)
    if not stays_finite(weight, lora_A, lora_B, scaling):
        raise ValueError("merge_: lora_A, lora_B and the merged weight must be finite; the weight was left unchanged")
    for rows, merged in _merged_blocks(weight, lora_A, lora_B, scaling):
        rows.copy_(merged)
    return weight


@torch.no_grad()
def stays_finite(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> bool:
    """Whether ``merge_`` would give finite elements only, in the weight's dtype."""
    finite = [torch.isfinite(merged).all() for _, merged in _merged_blocks(weight, lora_A, lora_B, scaling)]
    return not finite or bool(torch.stack(finite).all())


def _merged_blocks(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of weight, a few at a time, and what they become: an update as large as weight is never formed."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    rows = max(1, _MERGE_BLOCK // max(1, weight.shape[1]))
    for w, b in zip(weight.split(rows), B.split(rows)):
        yield w, torch.addmm(w.to(wide), b, A, alpha=scaling).to(weight.dtype)


_MERGE_BLOCK = 1 << 20
"""Elements of weight that a merge holds beside it at a time."""


def unmerge_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """Subtracts what ``merge_`` added.

    Not bitwise: each of the two roundings is at most half an ulp of the weight's dtype. Keep a copy of the weight
    (``LoRALinear.merge(keep_base=True)``) where it must be restored exactly.
    """
    return merge_(weight, lora_A, lora_B, -scaling)


# ---------------------------------------------------------------------------------------------------- why


def why(op: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
    """Which backend would serve this call, and why.

    Args:
        op: name of a public function, e.g. ``"lora_linear"``.
        *args, **kwargs: what that function takes. Nothing is computed and no random number is drawn.

    Returns:
        NamedTuple (backend, schedule, reason).
    """
    if op not in _ARGUMENTS:
        raise ValueError(f"why: unknown op {op!r}, expected one of {', '.join(sorted(_ARGUMENTS))}")
    spec, bind = _ARGUMENTS[op]
    return dispatch.explain(spec, bind(*args, **kwargs))


def _why_lora_linear(
    x, weight, lora_A, lora_B, bias=None, *, scaling=1.0, dropout_p=0.0, training=False, seed=None
) -> tuple:
    return _lora_linear_args(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, 0 if seed is None else seed)


def _why_lora_embedding(ids, weight, lora_A, lora_B, *, scaling=1.0, padding_idx=None) -> tuple:
    return _lora_embedding_args(ids, weight, lora_A, lora_B, scaling, padding_idx)


def _why_dora_linear(
    x, weight, lora_A, lora_B, magnitude=None, bias=None, *, scaling=1.0, dropout_p=0.0, training=False
) -> tuple:
    """DoRA counts as the ``lora_linear`` inside it."""
    return _lora_linear_args(x, weight, lora_A, lora_B, None, scaling, 0.0, False, None)


def _why_frozen_linear(x, weight, bias=None) -> tuple:
    _check_base("frozen_linear", x, weight, bias)
    return x, weight, bias


def _why_dropout_mask(rows, columns, p, seed) -> tuple:
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    return _seed_tensor("dropout_mask", seed, device), rows, columns, p


_ARGUMENTS = {
    "lora_linear": (_lora_op.SPEC, _why_lora_linear),
    "dora_linear": (_lora_op.SPEC, _why_dora_linear),
    "lora_embedding": (_embedding_op.SPEC, _why_lora_embedding),
    "frozen_linear": (_frozen_op.SPEC, _why_frozen_linear),
    "dropout_mask": (_mask_op.SPEC, _why_dropout_mask),
    "prompt_embedding": (_prompt_op.SPEC, prompt_functional.arguments),
    "prefix_kv": (_prefix_op.SPEC, prefix_functional.arguments),
}

# ------------------------------------------------------------------------------------------------- checks


def _lora_linear_args(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, seed) -> tuple:
    """The op's positional arguments, checked; draws the seed where dropout is active."""
    drops_nothing = type(dropout_p) in (float, int) and (dropout_p == 0.0 or (not training and 0.0 < dropout_p <= 1.0))
    plain = drops_nothing and type(scaling) is float and -math.inf < scaling < math.inf
    if plain and _types_fit(x, weight, lora_A, lora_B, bias) and _sizes_fit(x, weight, lora_A, lora_B, bias):
        return x, weight, lora_A, lora_B, bias, None, scaling, 0.0
    op = "lora_linear"
    _check_base(op, x, weight, bias)
    _check_adapter(op, weight, lora_A, lora_B)
    if lora_A.dtype != weight.dtype and not dispatch.autocast_enabled(x.device.type):
        _check_adapter_dtype(op, weight, lora_A)
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * _scaling_tensor(op, scaling, x.device), 1.0
    _check_scaling(op, scaling)
    _check_probability(op, "dropout_p", dropout_p)
    drops = training and dropout_p > 0.0
    return (
        x, weight, lora_A, lora_B, bias, _seed_tensor(op, seed, x.device) if drops else None,
        float(scaling), float(dropout_p) if drops else 0.0,
    )  # fmt: skip


def _lora_embedding_args(ids, weight, lora_A, lora_B, scaling, padding_idx) -> tuple:
    """The op's positional arguments, checked."""
    op = "lora_embedding"
    for name, t in (("ids", ids), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids must be int64 or int32, got {ids.dtype}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{op}: weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    for name, t in (("ids", ids), ("weight", weight)):
        _check_dense(op, name, t)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [vocabulary, features], got shape {tuple(weight.shape)}")
    if ids.device != weight.device:
        raise ValueError(f"{op}: ids must be on {weight.device} like weight, got {ids.device}")
    _check_adapter(op, weight.t(), lora_A, lora_B)
    _check_adapter_dtype(op, weight, lora_A)
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * _scaling_tensor(op, scaling, weight.device), 1.0
    _check_scaling(op, scaling)
    if padding_idx is not None and not 0 <= padding_idx < weight.shape[0]:
        raise ValueError(f"{op}: padding_idx must be in [0, {weight.shape[0]}), got {padding_idx}")
    return ids, weight, lora_A, lora_B, float(scaling), -1 if padding_idx is None else padding_idx


def _types_fit(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any) -> bool:
    """Whether a glance shows that the types pass the checks below, which take as long as a small layer."""
    for t in (x, weight, lora_A, lora_B):
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            return False
    dtype = weight.dtype
    if dtype not in FLOATS or x.dtype != dtype or lora_A.dtype != dtype or lora_B.dtype != dtype:
        return False
    return bias is None or ((type(bias) is nn.Parameter or type(bias) is Tensor) and bias.dtype == dtype)


def _sizes_fit(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> bool:
    """As ``_types_fit``, for sizes and devices."""
    a, b, lead = lora_A.shape, lora_B.shape, x.shape
    if len(a) != 2 or len(b) != 2 or not lead:
        return False
    (rank, k), (n, width) = a, b
    if rank != width or rank < 1 or lead[-1] != k or weight.shape != (n, k):
        return False
    if bias is not None and (bias.shape != (n,) or bias.device != weight.device):
        return False
    if x.is_cpu:
        return weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu
    device = x.device
    return weight.device == device and lora_A.device == device and lora_B.device == device


def _check_base(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        _check_dense(op, name, t)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x must be [..., {weight.shape[1]}] to fit weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dtype != weight.dtype and not dispatch.autocast_enabled(x.device.type):
        raise TypeError(f"{op}: weight must be {x.dtype} like x, got {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"{op}: weight must be on {x.device} like x, got {weight.device}")
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: bias must be [{weight.shape[0]}] to fit weight {tuple(weight.shape)}, got shape {tuple(bias.shape)}"
        )
    if bias.device != x.device:
        raise ValueError(f"{op}: bias must be on {x.device} like x, got {bias.device}")
    if bias.dtype != weight.dtype and not dispatch.autocast_enabled(x.device.type):
        raise TypeError(f"{op}: bias must be {weight.dtype} like weight, got {bias.dtype}")


def _check_dense(op: str, name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_nested:
        kind = "nested" if t.is_nested else str(t.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def _check_adapter(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {t.dtype}")
        _check_dense(op, name, t)
        if t.device != weight.device:
            raise ValueError(f"{op}: {name} must be on {weight.device} like weight, got {t.device}")
    n, k = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_A.shape[0] < 1:
        raise ValueError(f"{op}: lora_A must be [rank, {k}] with rank >= 1, got shape {tuple(lora_A.shape)}")
    if lora_B.shape != (n, lora_A.shape[0]):
        raise ValueError(
            f"{op}: lora_B must be [{n}, {lora_A.shape[0]}] to fit weight and lora_A, got shape {tuple(lora_B.shape)}"
        )
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{op}: lora_B must be {lora_A.dtype} like lora_A, got {lora_B.dtype}")


def _check_adapter_dtype(op: str, weight: Tensor, lora_A: Tensor) -> None:
    if lora_A.dtype != weight.dtype and not (lora_A.dtype == torch.float32 and weight.dtype in _LOW_PRECISION):
        raise TypeError(
            f"{op}: lora_A must be {weight.dtype} like weight (or float32 over a 16-bit weight), got {lora_A.dtype}"
        )


def _check_magnitude(op: str, magnitude: Tensor, weight: Tensor) -> None:
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"{op}: magnitude must be a tensor, got {type(magnitude).__name__}")
    if not magnitude.is_floating_point():
        raise TypeError(f"{op}: magnitude must be floating point, got {magnitude.dtype}")
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: magnitude must be [{weight.shape[0]}] to fit weight {tuple(weight.shape)}, "
            f"got shape {tuple(magnitude.shape)}"
        )
    if magnitude.device != weight.device:
        raise ValueError(f"{op}: magnitude must be on {weight.device} like weight, got {magnitude.device}")


def _scaling_tensor(op: str, scaling: Tensor, device: torch.device) -> Tensor:
    """``scaling`` without dimensions, so that it does not take part in type promotion."""
    if scaling.numel() != 1 or not scaling.is_floating_point():
        raise ValueError(
            f"{op}: scaling must be a number or a floating-point tensor of one element, got {scaling.dtype} "
            f"{tuple(scaling.shape)}"
        )
    if scaling.device != device and not (scaling.dim() == 0 and scaling.device.type == "cpu"):
        raise ValueError(f"{op}: scaling must be on {device} like x, got {scaling.device}")
    return scaling.reshape(())


def _check_scaling(op: str, scaling: float) -> None:
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"{op}: scaling must be a number, got {type(scaling).__name__}")
    if not -math.inf < scaling < math.inf:  # isfinite does not take the symbol that a compiler may trace
        raise ValueError(f"{op}: scaling must be finite, got {scaling}")


def _check_probability(op: str, name: str, p: float) -> None:
    if not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be a number in [0, 1], got {p!r}")


def draw_seed(device: torch.device) -> Tensor:
    """The key of a mask, an int64 [1], from torch's generator of the device.

    Drawn outside the op: checkpoint's RNG stash and CUDA graphs' generator offsets then cover it.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 [1] tensor on ``device``."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"{op}: seed must be an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"{op}: seed must be on {device} like x, got {seed.device}")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=device)
