"""``PrefixEncoder``: the trainable keys and values of prefix tuning as an ``nn.Module``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.prefix import KeysAndValues, prefix_kv
from .base import check_count
from .prompt import PROMPT_KEY, all_rows, load_rows


class PrefixEncoder(nn.Module):
    """Trainable virtual tokens that every layer attends to: prefix tuning, P-tuning v2.

    Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021; Liu et al., "P-Tuning v2",
    ACL 2022. The rows are a parameter, or with ``encoder_hidden_size`` made by a network::

        Linear(Tanh(Linear(embedding)))

    which runs on the virtual tokens once; PEFT's ``PrefixEncoder`` computes the same on a copy for every sample. Once
    trained, the rows are a constant: keep ``prefix()`` and drop the network.

    Args:
        num_virtual_tokens: tokens of the prefix, at least 1.
        layers: layers of the model.
        heads: heads of its keys and values, which under grouped-query attention are fewer than the queries'.
        head_dim: elements of a head.
        encoder_hidden_size: width of the network; None means that there is none.
        device, dtype: of the parameters. Over a bfloat16 or float16 model too they may be float32: the keys and values
            are cast as they are written.

    Attributes:
        embedding, transform (with a network): the parameters; names and shapes are PEFT's.
        num_virtual_tokens, layers, heads, head_dim: the numbers above.

    Raises:
        TypeError, ValueError: a number that is not an integer of at least 1.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        layers: int,
        heads: int,
        head_dim: int,
        encoder_hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"num_virtual_tokens": num_virtual_tokens, "layers": layers, "heads": heads, "head_dim": head_dim}
        if encoder_hidden_size is not None:
            sizes["encoder_hidden_size"] = encoder_hidden_size
        for name, count in sizes.items():
            check_count("PrefixEncoder", name, count)
        super().__init__()
        self.num_virtual_tokens, self.layers, self.heads, self.head_dim = num_virtual_tokens, layers, heads, head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        token_dim = heads * head_dim
        if encoder_hidden_size is None:
            self.embedding = nn.Embedding(num_virtual_tokens, layers * 2 * token_dim, **factory)
            self.transform = None
        else:
            self.embedding = nn.Embedding(num_virtual_tokens, token_dim, **factory)
            self.transform = nn.Sequential(
                nn.Linear(token_dim, encoder_hidden_size, **factory),
                nn.Tanh(),
                nn.Linear(encoder_hidden_size, layers * 2 * token_dim, **factory),
            )

    def prefix(self) -> Tensor:
        """The rows: [num_virtual_tokens, layers * 2 * heads * head_dim]."""
        rows = all_rows(self.embedding)
        return rows if self.transform is None else self.transform(rows)

    def forward(self, batch_size: int = 1, *, dtype: torch.dtype | None = None, copies: bool = False) -> KeysAndValues:
        """A (key, value) pair for each layer, each [batch_size, heads, num_virtual_tokens, head_dim].

        Args:
            batch_size, dtype, copies: as ``lk.prefix_kv``.
        """
        return prefix_kv(self.prefix(), self.layers, self.heads, batch_size=batch_size, dtype=dtype, copies=copies)

    def cache(self, batch_size: int = 1, *, dtype: torch.dtype | None = None, encoder_decoder: bool = False) -> Any:
        """The prefix as what a model of transformers takes as ``past_key_values``; a fresh one for each call.

        The model's attention mask must have ``num_virtual_tokens`` ones in front.

        Args:
            batch_size, dtype: as ``lk.prefix_kv``.
            encoder_decoder: an ``EncoderDecoderCache`` with the prefix before the decoder's self-attention, not a
                ``DynamicCache``.
        """
        from . import caches

        pairs = self(batch_size, dtype=dtype)
        return caches.encoder_decoder_cache(pairs) if encoder_decoder else caches.dynamic_cache(pairs)

    def peft_state_dict(self) -> dict[str, Tensor]:
        """What PEFT's checkpoint of this prefix holds: ``prompt_embeddings``, the rows, without the network."""
        return {PROMPT_KEY: self.prefix().detach()}

    def load_peft_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads the tensors of a PEFT checkpoint.

        Raises:
            ValueError: there are no rows of this shape in it, or there is a network, which they cannot be traced back
                to; ``load_state_dict`` takes the ``state_dict`` of PEFT's module.
        """
        if self.transform is not None:
            raise ValueError(
                "PrefixEncoder: a PEFT checkpoint holds the rows and not the network that made them; load it into a "
                "PrefixEncoder without encoder_hidden_size"
            )
        load_rows("PrefixEncoder", self.embedding, state_dict)

    def extra_repr(self) -> str:
        names = ("num_virtual_tokens", "layers", "heads", "head_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
