"""``LoRAEmbedding``: an embedding with an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional.embedding import lora_embedding
from .base import LoRALayer, check_base, check_hyperparameters, empty_adapter


class LoRAEmbedding(LoRALayer):
    """An embedding with a low-rank adapter (LoRA, Hu et al., ICLR 2022), computed by ``lk.lora_embedding``.

    Equivalent to::

        F.embedding(ids, weight) + scaling * F.embedding(ids, lora_A.T) @ lora_B.T

    ``weight`` is frozen; ``lora_A`` starts at zero and ``lora_B`` normally distributed, as in PEFT, so that the layer
    starts as the plain embedding. There is no dropout, as in PEFT.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as ``nn.Embedding``.
        r, alpha, use_rslora, adapter_dtype: as ``LoRALinear``.

    Attributes:
        weight [num_embeddings, embedding_dim]: a frozen parameter.
        lora_A [r, num_embeddings], lora_B [embedding_dim, r]: trained parameters.
        rank, alpha, scaling, use_rslora: the numbers above.
        merged: whether ``weight`` contains the adapter.

    Raises:
        TypeError, ValueError: a rank or alpha that is not a number in its range.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    _PLAIN = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int,
        alpha: float,
        *,
        padding_idx: int | None = None,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters("LoRAEmbedding", r, alpha, 0.0)
        super().__init__()
        base = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        check_base("LoRAEmbedding", base, adapter_dtype)
        self._adopt(base, r, alpha, use_rslora, adapter_dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        r: int,
        alpha: float,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRAEmbedding:
        """A ``LoRAEmbedding`` around the weight of ``embedding``, which is shared, not copied, and becomes frozen.

        Hooks on ``embedding`` are not carried over. Arguments and errors are those of the class; ``TypeError`` if
        ``embedding`` is not a plain ``nn.Embedding``, ``ValueError`` if it has options that a frozen weight has no use
        for (max_norm, scale_grad_by_freq, sparse), or its weight is none that ``LoRALinear.from_linear`` takes.
        """
        check_hyperparameters("from_embedding", r, alpha, 0.0)
        kind = type(embedding)
        if kind is not nn.Embedding:
            raise TypeError(f"from_embedding: expected a plain nn.Embedding, got {kind.__module__}.{kind.__qualname__}")
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError("from_embedding: an embedding with max_norm, scale_grad_by_freq or sparse is not served")
        check_base("from_embedding", embedding, adapter_dtype)
        layer = cls._empty(embedding.training)
        layer._adopt(embedding, r, alpha, use_rslora, adapter_dtype)
        return layer

    def _adopt(self, base: Any, r: int, alpha: float, use_rslora: bool, adapter_dtype: torch.dtype | None) -> None:
        """Takes over a base weight and starts a new adapter."""
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"):
            setattr(self, name, getattr(base, name))
        self.scale_grad_by_freq = self.sparse = False
        self.weight = base.weight.requires_grad_(False)
        adapter = empty_adapter(base.weight, r, self.num_embeddings, self.embedding_dim, adapter_dtype)
        self.lora_A, self.lora_B = adapter
        self._set_numbers(r, alpha, use_rslora)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Sets lora_A to zero and draws lora_B anew."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B.t(), self.lora_A.t()

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return F.embedding(input, self.weight, self.padding_idx)
        return lora_embedding(
            input, self.weight, self.lora_A, self.lora_B, scaling=self.scaling, padding_idx=self.padding_idx
        )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        text += f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        text += f", r={self.rank}, alpha={self.alpha}" + (", use_rslora=True" if self.use_rslora else "")
        return text + (", merged=True" if self.merged else "")
