"""``MultiLoRALinear``: a linear layer with many adapters, of which each row uses its own or none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..frozen_linears import linear
from ..functional.multi import multi_lora_linear
from .base import (
    check_base,
    check_count,
    check_hyperparameters,
    check_plain_linear,
    empty_adapter,
    is_given,
    scaling_of,
)


class MultiLoRALinear(nn.Module):
    """A linear layer with a pool of adapters, computed by ``lk.multi_lora_linear``.

    Which adapter a row uses is given with the call, or for a whole model by ``lk.route_adapters``; a call without
    either computes the frozen layer alone. ``weight`` and ``bias`` are frozen; every adapter starts as that of
    ``LoRALinear`` does. Gradients of an adapter come from its own rows.

    Args:
        linear: a plain ``nn.Linear``, whose parameters are shared, not copied, and become frozen. Hooks on it are not
            carried over.
        adapters: how many, at least 1.
        r: rank of each adapter, at least 1.
        alpha: an update is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: probability of zeroing an element of x on the adapters' branch while training, in [0, 1).
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        adapter_dtype: dtype of lora_A and lora_B. None means float32 over a 16-bit weight, else the weight's dtype.

    Attributes:
        weight [out_features, in_features], bias [out_features] or None: frozen parameters.
        lora_A [adapters, r, in_features], lora_B [adapters, out_features, r]: trained parameters.
        adapters, rank, alpha, scaling, dropout_p, use_rslora: the numbers above.

    Raises:
        TypeError, ValueError: ``linear`` is no plain ``nn.Linear``, or its parameters are not its own (pruned,
            parametrized, quantised); a number that is not in its range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    merged = False
    """A pool never is."""
    is_routed = False
    """Set by ``route_adapters``."""

    def __init__(
        self,
        linear: nn.Linear,
        adapters: int,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        op = "MultiLoRALinear"
        check_count(op, "adapters", adapters)
        check_hyperparameters(op, r, alpha, dropout)
        check_plain_linear(op, linear)
        check_base(op, linear, adapter_dtype)
        super().__init__()
        self.train(linear.training)
        pools = empty_pools(linear, adapters, r, adapter_dtype)
        self._adopt(linear.weight, linear.bias, pools, r, alpha, dropout, use_rslora)

    def _adopt(
        self, weight: Tensor, bias: Tensor | None, pools: tuple[nn.Parameter, nn.Parameter],
        r: int, alpha: float, dropout: float, use_rslora: bool,
    ) -> None:  # fmt: skip
        """Takes over a base weight and bias and starts the adapters, of which only the room is there."""
        base: Any
        for name, base in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if base is None else base.requires_grad_(False))
        self.lora_A, self.lora_B = pools
        self.out_features, self.in_features = weight.shape
        self.adapters, self.rank, self.alpha, self.use_rslora = len(self.lora_A), int(r), float(alpha), use_rslora
        self.scaling, self.dropout_p = scaling_of(r, alpha, use_rslora), float(dropout)
        self.reset_adapters()

    def reset_adapters(self) -> None:
        """Draws each lora_A anew, as ``LoRALinear`` does, and sets lora_B to zero."""
        for of_adapter in self.lora_A:
            nn.init.kaiming_uniform_(of_adapter, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        """``adapter_ids``: as ``lk.multi_lora_linear`` takes them."""
        if not is_given(self, adapter_ids is not None) or adapter_ids is None:
            return linear(x, self.weight, self.bias)
        return multi_lora_linear(
            x, self.weight, self.lora_A, self.lora_B, adapter_ids, self.bias,
            scaling=self.scaling, dropout_p=self.dropout_p, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", adapters={self.adapters}, r={self.rank}, alpha={self.alpha}, dropout={self.dropout_p}"
        return text + (", use_rslora=True" if self.use_rslora else "")


def empty_pools(
    linear: Any, adapters: int, r: int, adapter_dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_A [adapters, r, in_features] and lora_B [adapters, out_features, r], without values yet."""
    one_A, one_B = empty_adapter(linear.weight, 1, 0, 0, adapter_dtype)
    return (
        nn.Parameter(one_A.new_empty((adapters, r, linear.in_features))),
        nn.Parameter(one_B.new_empty((adapters, linear.out_features, r))),
    )
