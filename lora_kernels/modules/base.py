"""What layers with an adapter of their own share: its numbers, the checks of what it is made from, and merging."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from ..frozen_linears import FrozenLinear
from ..functional.merging import merge_, stays_finite, unmerge_
from ..plain import FLOATS, LOW_PRECISION, why_no_base


def is_given(layer: Any, given: Any) -> bool:
    """Whether a call has more than x, which the hook of ``route_adapters`` may have put in.

    torch.compile looks at what a forward reads, ``is_routed``, but not for hooks that come later.
    """
    if layer.is_routed and given:
        return True
    return bool(given)


class LoRALayer(nn.Module):
    """What ``LoRALinear`` and ``LoRAEmbedding`` share: an adapter's numbers, and merging."""

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _NUMBERS: tuple[str, ...] = ("rank", "alpha", "use_rslora", "scaling", "merged", "_base_copy")
    _PLAIN: type[nn.Module]
    """What is left of the layer without its adapter."""

    @classmethod
    def _empty(cls, training: bool) -> Any:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.training = training
        return layer

    def _set_numbers(self, r: int, alpha: float, use_rslora: bool) -> None:
        # Plain Python numbers, whatever kind came in: torch.compile and the adapter's JSON file want those.
        self.rank, self.use_rslora = int(r), bool(use_rslora)
        self.alpha = int(alpha) if isinstance(alpha, numbers.Integral) else float(alpha)
        self.scaling = scaling_of(self.rank, self.alpha, self.use_rslora)
        self.merged = False
        self._base_copy: Tensor | None = None

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """(lora_A, lora_B) such that the update of ``weight`` is ``scaling * lora_B @ lora_A``."""
        return self.lora_A, self.lora_B

    def merges_finite(self) -> bool:
        """Whether ``merge`` would give finite elements only."""
        return stays_finite(self.weight, *self.update_factors(), self.scaling)

    def merge(self, keep_base: bool = False) -> None:
        """Adds the adapter to ``weight`` in place, so that the layer runs without it.

        Whether another module holds the same weight (a tied embedding) cannot be seen from here:
        ``lk.merge_adapter`` merges a whole model and checks that.

        Args:
            keep_base: keep a copy of ``weight`` in host memory, from which ``unmerge`` restores it bitwise.

        Raises:
            RuntimeError: already merged.
            ValueError: the merged weight would not be finite, or it is not this layer's own parameter (pruned or
                parametrized), so that what is written there would be lost. The weight is then unchanged.
        """
        if self.merged:
            raise RuntimeError("merge: the adapter is already merged; call unmerge() first")
        self.check_mergeable("merge")
        copy = self.weight.detach().to("cpu", copy=True) if keep_base else None
        merge_(self.weight, *self.update_factors(), self.scaling)
        self._base_copy, self.merged = copy, True

    def check_mergeable(self, op: str) -> None:
        """``ValueError`` if the weight, or what the next call makes lora_A and lora_B of, is not in this layer."""
        for name in ("weight", "lora_A", "lora_B"):
            computed = name != "weight" and "parametrizations" in self._modules  # made anew whenever it is read
            if self._parameters.get(name) is None and not computed:
                raise ValueError(f"{op}: {name} is not a parameter of its module (pruned, parametrized or sharded)")

    def check_unmergeable(self, op: str) -> None:
        """``RuntimeError`` if there is nothing that ``unmerge`` could take out."""
        if not self.merged:
            raise RuntimeError(f"{op}: the adapter is not merged")

    def unmerge(self) -> None:
        """Takes the adapter out of ``weight`` again.

        Bitwise after ``merge(keep_base=True)``; otherwise the update is subtracted, which leaves a rounding
        error.

        Raises:
            RuntimeError: not merged.
        """
        self.check_unmergeable("unmerge")
        self.check_mergeable("unmerge")
        if self._base_copy is None:
            unmerge_(self.weight, *self.update_factors(), self.scaling)
        else:
            with torch.no_grad():
                self.weight.copy_(self._base_copy)
        self._base_copy, self.merged = None, False

    def discard_adapter(self) -> None:
        """Turns this module back into a plain one with its present ``weight``. Cannot be undone."""
        for name in ("lora_A", "lora_B", *self._NUMBERS):
            delattr(self, name)
        self.__class__ = self._PLAIN  # type: ignore[assignment]


def scaling_of(r: int, alpha: float, use_rslora: bool) -> float:
    """The factor of the update: ``alpha / r``, or ``alpha / sqrt(r)``."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def check_plain_linear(op: str, linear: Any) -> None:
    """``TypeError`` unless ``linear`` computes what ``nn.Linear`` computes."""
    kind = type(linear)
    if kind not in (nn.Linear, FrozenLinear):
        raise TypeError(f"{op}: expected a plain nn.Linear, got {kind.__module__}.{kind.__qualname__}")


def empty_adapter(
    weight: Tensor, r: int, columns: int, rows: int, adapter_dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_A [r, columns] and lora_B [rows, r] beside ``weight``, without values yet."""
    if adapter_dtype is None:
        is_wide = weight.dtype in FLOATS and weight.dtype not in LOW_PRECISION
        adapter_dtype = weight.dtype if is_wide else torch.float32
    lora_A, lora_B = (
        nn.Parameter(torch.empty(shape, dtype=adapter_dtype, device=weight.device))
        for shape in ((r, columns), (rows, r))
    )
    return lora_A, lora_B


def check_base(op: str, layer: nn.Module, adapter_dtype: torch.dtype | None) -> None:
    """Raises unless an adapter of this dtype can share the parameters of ``layer``, whose class has been looked at."""
    check_adapter_dtype(op, adapter_dtype)
    reason = why_no_base(layer)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")


def check_adapter_dtype(op: str, adapter_dtype: torch.dtype | None) -> None:
    """``TypeError`` for a dtype that adapters cannot be computed in."""
    if adapter_dtype is not None and adapter_dtype not in FLOATS:
        names = "float32, bfloat16, float16, float64 or None"
        raise TypeError(f"{op}: adapter_dtype must be {names}, got {adapter_dtype!r}")


def check_count(op: str, name: str, value: Any) -> None:
    """``TypeError`` or ``ValueError`` unless ``value`` is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def check_hyperparameters(op: str, r: Any, alpha: Any, dropout: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` for a rank, alpha or dropout that cannot be used."""
    for name, value, kind in (
        ("r", r, numbers.Integral),
        ("alpha", alpha, numbers.Real),
        ("dropout", dropout, numbers.Real),
    ):
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "an integer" if kind is numbers.Integral else "a number"
            raise TypeError(f"{op}: {name} must be {expected}, got {value!r}")
    if r < 1:
        raise ValueError(f"{op}: r must be at least 1, got {r}")
    if not math.isfinite(alpha):
        raise ValueError(f"{op}: alpha must be finite, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")
