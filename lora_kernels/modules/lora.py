"""``LoRALinear``: a linear layer with an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..frozen_linears import linear
from ..functional.lora import lora_linear
from ..operands import plain_adapter
from .base import (
    LoRALayer,
    check_adapter_dtype,
    check_base,
    check_hyperparameters,
    check_plain_linear,
    empty_adapter,
)


class LoRALinear(LoRALayer):
    """A linear layer with a low-rank adapter (LoRA, Hu et al., ICLR 2022), computed by ``lk.lora_linear``.

    Equivalent to::

        F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout, training), lora_A), lora_B)

    ``weight`` and ``bias`` are frozen; ``lora_A`` starts Kaiming-uniform and ``lora_B`` zero, as in PEFT, so
    that the layer starts as the plain linear. All are ordinary entries of ``state_dict``. A merged layer's
    ``weight`` holds the adapter: unmerge it before saving a state dict that is to be loaded into an unmerged
    layer.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        r: rank of the adapter, at least 1.
        alpha: the update is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: probability of zeroing an element of x on the adapter's branch while training, in [0, 1).
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        adapter_dtype: dtype of lora_A and lora_B. None means float32 over a 16-bit weight, else the weight's
            dtype.

    Attributes:
        weight [out_features, in_features], bias [out_features] or None: frozen parameters.
        lora_A [r, in_features], lora_B [out_features, r]: trained parameters.
        rank, alpha, scaling, dropout_p, use_rslora: the numbers above.
        merged: whether ``weight`` contains the adapter.

    Raises:
        TypeError, ValueError: a rank, alpha or dropout that is not a number in its range.
    """

    bias: nn.Parameter | None
    _NUMBERS = (*LoRALayer._NUMBERS, "dropout_p")
    _PLAIN = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters("LoRALinear", r, alpha, dropout)
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        check_base("LoRALinear", base, adapter_dtype)
        adapter = empty_adapter(base.weight, r, in_features, out_features, adapter_dtype)
        self._adopt(base.weight, base.bias, adapter, r, alpha, dropout, use_rslora)

    _over_packed: ClassVar[Callable[[nn.Module], Any]]
    """A layer without an adapter yet on what another with a quantised weight holds; None where it has none.
    ``quantized.py`` brings it, which stands above this file.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A ``LoRALinear`` around the parameters of ``linear``, which are shared, not copied, and become frozen.

        Of a layer whose weight is quantised, in a format of ``lora_kernels.formats``, it is what ``lk.inject`` makes:
        a layer of that class, too, which keeps, moves and saves its weight as before.

        Hooks on ``linear`` are not carried over. Arguments and errors are those of the class; ``TypeError``
        if ``linear`` is neither a plain ``nn.Linear`` nor quantised, ``ValueError`` if its weight or bias is not a
        parameter of its own (pruned, parametrized), the format is not served or its forward was replaced.
        """
        check_hyperparameters("from_linear", r, alpha, dropout)
        check_adapter_dtype("from_linear", adapter_dtype)
        layer = cls._over_packed(linear)
        if layer is None:
            check_plain_linear("from_linear", linear)
            check_base("from_linear", linear, adapter_dtype)
            layer = cls._empty(linear.training)
        adapter = empty_adapter(linear.weight, r, linear.in_features, linear.out_features, adapter_dtype)
        layer._adopt(linear.weight, linear.bias, adapter, r, alpha, dropout, use_rslora)
        return layer

    @classmethod
    def from_peft(cls, peft_lora_linear: nn.Module, adapter: str | None = None) -> LoRALinear:
        """A ``LoRALinear`` around the parameters of a PEFT ``lora.Linear``; all are shared and train as before.

        Args:
            peft_lora_linear: PEFT's layer.
            adapter: name of the adapter; None means the active one.

        Raises:
            TypeError: not a PEFT ``lora.Linear``.
            ValueError: no such adapter, or the layer computes more than plain LoRA. The message gives the
                reason.
        """
        weight, bias, lora_A, lora_B, alpha, scaling, dropout, use_rslora = plain_adapter(peft_lora_linear, adapter)
        layer = cls._empty(peft_lora_linear.training)
        for name, parameter in (("weight", weight), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
            layer.register_parameter(name, parameter)
        layer._describe(lora_A.shape[0], alpha, dropout, use_rslora)
        layer.scaling = scaling
        return layer

    def _adopt(
        self, weight: Tensor, bias: Tensor | None, adapter: tuple[nn.Parameter, nn.Parameter],
        r: int, alpha: float, dropout: float, use_rslora: bool,
    ) -> None:  # fmt: skip
        """Takes over a base weight and bias and starts an adapter, of which only the room is there."""
        base: Any
        for name, base in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if base is None else base.requires_grad_(False))
        self.lora_A, self.lora_B = adapter
        self._describe(r, alpha, dropout, use_rslora)
        self.reset_adapter()

    def _describe(self, r: int, alpha: float, dropout: float, use_rslora: bool) -> None:
        self._set_numbers(r, alpha, use_rslora)
        self.out_features, self.in_features = self._shape()
        self.dropout_p = float(dropout)

    def _shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def reset_adapter(self) -> None:
        """Draws lora_A anew and sets lora_B to zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return linear(x, self.weight, self.bias)
        own: Any = self._parameters  # four times quicker than attributes, which is felt in a small layer
        try:
            weight, lora_A, lora_B, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
        except KeyError:  # pruned, parametrized, a replica or sharded: they are attributes then
            weight, lora_A, lora_B, bias = self.weight, self.lora_A, self.lora_B, self.bias
        return lora_linear(
            x, weight, lora_A, lora_B, bias,
            scaling=self.scaling, dropout_p=self.dropout_p, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", r={self.rank}, alpha={self.alpha}, dropout={self.dropout_p}"
        text += ", use_rslora=True" if self.use_rslora else ""
        return text + (", merged=True" if self.merged else "")
