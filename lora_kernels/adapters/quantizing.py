"""``quantize_``: a model's linear layers packed into fewer bits, without another library."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from ..formats import FORMATS
from ..modules.quantized import QuantizedLinear
from ..report import Report
from .inject import ALL_LINEAR, Targets
from .wrappers import check_may_grow, unwrapped, wrapper_kinds


class _Modules(Targets):
    argument = "modules"


def quantize_(
    model: nn.Module,
    format: str = "nf4",
    *,
    modules: str | Collection[str] = ALL_LINEAR,
    exclude_modules: str | Collection[str] | None = None,
    **options: Any,
) -> Report:
    """Turns linear layers of ``model`` into ``QuantizedLinear``, in place: the base of QLoRA (Dettmers et al., 2023).

    The bits are those of the format's own library, which is not needed. Nothing is changed if an error is raised.
    ``lk.inject`` puts adapters on the result; so does PEFT, for ``lk.patch``, without which it cannot merge them.

    Args:
        model: any module without adapters.
        format: "nf4", "fp4", "int8", "float8", "mxfp4" or "nvfp4".
        modules, exclude_modules: which layers, as ``target_modules`` and ``exclude_modules`` of ``lk.inject``; by
            default every linear layer except the output embedding.
        **options: of the format. For "nf4" and "fp4": ``block`` (64), how many weights share a scale, and
            ``double_quant`` (True), whether the scales are kept in eight bits, too. For "float8": ``square``, the side
            of the squares that share one, e.g. 128; None for rows.

    Returns:
        The layers that were quantised, and, for "all-linear", those left alone and why. Layers whose in_features are no
        multiple of ``block`` stay, whatever chose them.

    Raises:
        TypeError, ValueError: unknown format or option; nothing matches; otherwise as ``lk.inject``.
    """
    if format not in FORMATS:
        raise ValueError(f"quantize_: unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    check_may_grow("quantize_", wrapper_kinds(model))
    targets = _Modules(modules, 1, 1.0, exclude_modules=exclude_modules)
    with unwrapped(model) as bare:
        plan, kept = targets.plan("quantize_", bare, 0.0)
        unmatched = list(targets.unmatched(bare, plan))
    for text in unmatched:
        warnings.warn(f"quantize_: {text}", UserWarning, stacklevel=2)
    weights = {}
    for name, (linear, *_) in plan.items():
        reason = FORMATS[format].why_not(linear.weight, **options)
        if reason is None:
            weights[name] = FORMATS[format].quantize(linear.weight, **options)
        else:
            kept.append((name, reason))
    for name, weight in weights.items():
        layer: Any = plan[name][0]
        layer.requires_grad_(False)
        # The class is swapped, as in inject: other references to the layer and its hooks stay valid.
        layer.__class__ = QuantizedLinear
        layer.keep(weight)
    packed = [(name, f"{w.format}, {w.bits_per_weight:.2f} bits per weight") for name, w in weights.items()]
    return Report(packed, kept, "packed", "linear layers packed")
