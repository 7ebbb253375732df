"""``nn.Module``s that make a trainable prompt: ``PromptEmbedding`` (prompt tuning) and ``PromptEncoder`` (P-tuning).

Both put the prompt in front of the text with ``lk.prompt_embedding``, and both have the parameter names of PEFT's
modules of the same name, so that state dicts go both ways.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.encoders import run_lstm, run_mlp
from ..functional.prompt import PromptEmbeddingOutput, prompt_embedding
from ..plain import PLAIN_TENSORS, has_hooks
from .base import check_count

PROMPT_KEY = "prompt_embeddings"
"""The tensor of PEFT's checkpoints that holds the rows of a prompt or prefix."""


class _Prompt(nn.Module):
    """What the prompt modules share: ``prompt()`` makes the rows, ``forward`` puts them in front of the text."""

    def prompt(self) -> Tensor:
        """The prompt: [num_virtual_tokens, hidden_size], or [tasks, num_virtual_tokens, hidden_size]."""
        raise NotImplementedError

    def peft_state_dict(self) -> dict[str, Tensor]:
        """What PEFT's checkpoint of this prompt holds: ``prompt_embeddings`` [rows, hidden_size].

        With tasks, their prompts one behind the other, which PEFT has no checkpoint for.
        """
        return {PROMPT_KEY: self.prompt().detach().flatten(0, -2)}

    def forward(
        self,
        input_ids: Tensor | None,
        embedding: Tensor | nn.Module | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        padding_side: str = "right",
    ) -> PromptEmbeddingOutput:
        """Embeds the text and puts the prompt in front of it.

        Args:
            input_ids: [batch, tokens], int64 or int32; None with ``inputs_embeds``.
            embedding: the model's token embedding, as a table [vocabulary, hidden_size] or as a module. The table of a
                plain ``nn.Embedding`` is read; any other module, and one with hooks, is called with ``input_ids``.
            inputs_embeds, attention_mask, labels, task_ids, prompt_lengths, padding_side: as ``lk.prompt_embedding``.

        Returns:
            PromptEmbeddingOutput (inputs_embeds, attention_mask, position_ids, labels), each of
            [batch, num_virtual_tokens + tokens, ...].

        Raises:
            TypeError, ValueError: as ``lk.prompt_embedding``.
        """
        weight: Any = embedding
        if inputs_embeds is None and isinstance(embedding, nn.Module):
            weight = plain_weight(embedding)
            if weight is None:
                input_ids, inputs_embeds = None, embedding(input_ids)
        return prompt_embedding(
            input_ids, weight, self.prompt(), inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels,
            task_ids=task_ids, prompt_lengths=prompt_lengths, padding_side=padding_side,
        )  # fmt: skip


class PromptEmbedding(_Prompt):
    """A trainable prompt: prompt tuning.

    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021. ``prompt()`` is the parameter
    itself, [num_virtual_tokens, hidden_size]. ``forward(input_ids, embedding)`` is equivalent, with right padding, to::

        torch.cat([prompt().to(weight.dtype).expand(batch, -1, -1), embedding(input_ids)], dim=1)

    in one pass, with the mask, position ids and labels that go with it. The rows start normally distributed, as in
    ``nn.Embedding``; ``from_vocabulary`` and ``from_token_ids`` start them at embeddings of the model.

    Args:
        num_virtual_tokens: rows of the prompt, at least 1.
        hidden_size: size of the model's token embeddings.
        tasks: number of prompts to choose from by ``task_ids``. None means one prompt and no ``task_ids``.
        device, dtype: of the parameter. Over a bfloat16 or float16 model too it may be float32: rows are cast as they
            are written.

    Attributes:
        embedding: ``nn.Embedding`` of [tasks * num_virtual_tokens, hidden_size], the only parameter; named as PEFT's.
        num_virtual_tokens, hidden_size, tasks: the numbers above.

    Raises:
        TypeError, ValueError: a number that is not an integer of at least 1.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        hidden_size: int,
        *,
        tasks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("PromptEmbedding", "num_virtual_tokens", num_virtual_tokens)
        check_count("PromptEmbedding", "hidden_size", hidden_size)
        if tasks is not None:
            check_count("PromptEmbedding", "tasks", tasks)
        super().__init__()
        self.num_virtual_tokens, self.hidden_size, self.tasks = num_virtual_tokens, hidden_size, tasks
        rows = num_virtual_tokens * (1 if tasks is None else tasks)
        self.embedding = nn.Embedding(rows, hidden_size, device=device, dtype=dtype)

    @classmethod
    def from_vocabulary(
        cls,
        embedding: Tensor | nn.Module,
        num_virtual_tokens: int,
        *,
        tasks: int | None = None,
        generator: torch.Generator | None = None,
    ) -> PromptEmbedding:
        """A float32 prompt whose rows start at embeddings of randomly drawn tokens.

        Args:
            embedding: the model's token embedding: a table [vocabulary, hidden_size], or a module with that ``weight``.
            num_virtual_tokens, tasks: as the class.
            generator: draws the tokens, on the CPU; None means torch's own.
        """
        check_count("from_vocabulary", "num_virtual_tokens", num_virtual_tokens)
        table = _table("from_vocabulary", embedding)
        module = cls(num_virtual_tokens, table.shape[1], tasks=tasks, device=table.device, dtype=torch.float32)
        ids = torch.randint(table.shape[0], (module.embedding.num_embeddings,), generator=generator)
        return module._start_at(table, ids)

    @classmethod
    def from_token_ids(
        cls,
        token_ids: Sequence[int] | Tensor,
        embedding: Tensor | nn.Module,
        num_virtual_tokens: int | None = None,
        *,
        tasks: int | None = None,
    ) -> PromptEmbedding:
        """A float32 prompt whose rows start at the embeddings of a text, as a tokenizer's ids.

        Args:
            token_ids: the text, 1-D; repeated or cut to ``num_virtual_tokens``, as PEFT does.
            embedding: as ``from_vocabulary``.
            num_virtual_tokens: None means one per id.
            tasks: as the class; every task starts at the text.

        Raises:
            ValueError: no ids, or one outside the vocabulary.
        """
        table = _table("from_token_ids", embedding)
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device="cpu")
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"from_token_ids: token_ids must be [tokens], at least one, got shape {tuple(ids.shape)}")
        if ids.min() < 0 or ids.max() >= table.shape[0]:
            raise ValueError(f"from_token_ids: token_ids must be in [0, {table.shape[0]}), got {ids.tolist()}")
        rows = len(ids) if num_virtual_tokens is None else num_virtual_tokens
        module = cls(rows, table.shape[1], tasks=tasks, device=table.device, dtype=torch.float32)
        return module._start_at(table, ids[torch.arange(rows) % len(ids)].repeat(1 if tasks is None else tasks))

    @torch.no_grad()
    def _start_at(self, table: Tensor, ids: Tensor) -> PromptEmbedding:
        self.embedding.weight.copy_(table[ids.to(table.device)])
        return self

    def prompt(self) -> Tensor:
        rows = all_rows(self.embedding)
        return rows if self.tasks is None else rows.view(self.tasks, self.num_virtual_tokens, self.hidden_size)

    def load_peft_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads the tensors of a PEFT checkpoint of prompt tuning, or of P-tuning, whose prompt is then a parameter.

        Raises:
            ValueError: there are no rows of this shape in it.
        """
        load_rows("PromptEmbedding", self.embedding, state_dict)

    def extra_repr(self) -> str:
        text = f"num_virtual_tokens={self.num_virtual_tokens}, hidden_size={self.hidden_size}"
        return text if self.tasks is None else f"{text}, tasks={self.tasks}"


class PromptEncoder(_Prompt):
    """A prompt made by a small network: P-tuning.

    Liu et al., "GPT Understands, Too", 2021. ``prompt()`` runs the network on the virtual tokens once and returns
    [num_virtual_tokens, hidden_size]. PEFT's ``PromptEncoder`` computes the same on a copy for every sample::

        MLP:   Linear(ReLU(Linear(ReLU(Linear(embedding)))))
        LSTM:  Linear(ReLU(Linear(LSTM(embedding))))         # bidirectional

    Gradients are the same. Dropout inside the LSTM draws one mask per call instead of one per sample. Once trained, the
    prompt is a constant: keep ``prompt()`` and drop the network.

    Args:
        num_virtual_tokens: rows of the prompt, at least 1.
        hidden_size: size of the model's token embeddings.
        encoder_hidden_size: width of the network; None means ``hidden_size``.
        kind: "MLP" or "LSTM".
        num_layers: layers of the LSTM. The MLP always has three linear layers.
        dropout: between the layers of the LSTM while training, in [0, 1).
        device, dtype: of the parameters.

    Attributes:
        embedding, mlp_head, lstm_head (LSTM only): the network; names and shapes are PEFT's.
        num_virtual_tokens, hidden_size, kind: the arguments above.

    Raises:
        TypeError, ValueError: an argument that is not in its range.
    """

    num_virtual_tokens: int
    hidden_size: int
    kind: str

    def __init__(
        self,
        num_virtual_tokens: int,
        hidden_size: int,
        encoder_hidden_size: int | None = None,
        *,
        kind: str = "MLP",
        num_layers: int = 2,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = hidden_size if encoder_hidden_size is None else encoder_hidden_size
        for name, count in (
            ("num_virtual_tokens", num_virtual_tokens),
            ("hidden_size", hidden_size),
            ("encoder_hidden_size", width),
            ("num_layers", num_layers),
        ):
            check_count("PromptEncoder", name, count)
        if kind not in ("MLP", "LSTM"):
            raise ValueError(f'PromptEncoder: kind must be "MLP" or "LSTM", got {kind!r}')
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"PromptEncoder: dropout must be a number in [0, 1), got {dropout!r}")
        super().__init__()
        self.num_virtual_tokens, self.hidden_size, self.kind = num_virtual_tokens, hidden_size, kind
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(num_virtual_tokens, hidden_size, **factory)
        if kind == "LSTM":
            self.lstm_head = nn.LSTM(
                hidden_size, width, num_layers, dropout=dropout, bidirectional=True, batch_first=True, **factory
            )
            sizes = (2 * width, 2 * width, hidden_size)
        else:
            sizes = (hidden_size, width, width, hidden_size)
        linears = [nn.Linear(n, m, **factory) for n, m in itertools.pairwise(sizes)]
        layers = [part for linear in linears for part in (linear, nn.ReLU())]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def prompt(self) -> Tensor:
        return encoded_rows(self)

    def load_peft_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raises ValueError: PEFT's checkpoints hold the prompt and not the network that made it."""
        raise ValueError(
            "PromptEncoder: a PEFT checkpoint holds the prompt and not the network that made it; load it into a "
            "PromptEmbedding, or the state_dict of PEFT's module with load_state_dict"
        )

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, hidden_size={self.hidden_size}, kind={self.kind!r}"


def plain_weight(embedding: nn.Module) -> Tensor | None:
    """The table of a module whose call is exactly a gather of ``weight``, else None."""
    if type(embedding) is not nn.Embedding or "forward" in embedding.__dict__ or embedding.max_norm is not None:
        return None
    weight = embedding.weight
    if type(weight) not in PLAIN_TENSORS or has_hooks(embedding):
        return None
    # These change the gradient of the table only.
    special = embedding.padding_idx is not None or embedding.sparse or embedding.scale_grad_by_freq
    return None if special and weight.requires_grad else weight


def all_rows(embedding: nn.Embedding) -> Tensor:
    """The table, through the module where that does more than a gather: a sharded one must be called to be whole."""
    weight = plain_weight(embedding)
    if weight is not None:
        return weight
    return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))


def encoded_rows(encoder: Any) -> Tensor:
    """The prompt of a ``PromptEncoder``, ours or PEFT's: [num_virtual_tokens, hidden_size]."""
    rows = all_rows(encoder.embedding)
    lstm = encoder._modules.get("lstm_head")
    return run_mlp(encoder.mlp_head, rows if lstm is None else run_lstm(lstm, rows))


@torch.no_grad()
def load_rows(op: str, embedding: nn.Embedding, state_dict: Mapping[str, Tensor]) -> None:
    """Copies the rows of a PEFT checkpoint into ``embedding``."""
    rows, shape = state_dict.get(PROMPT_KEY), tuple(embedding.weight.shape)
    if not isinstance(rows, Tensor) or rows.shape != shape:
        found = tuple(rows.shape) if isinstance(rows, Tensor) else ", ".join(state_dict) or "nothing"
        raise ValueError(f"{op}: the checkpoint must hold {PROMPT_KEY} {shape}, got {found}")
    embedding.weight.copy_(rows)


def _table(op: str, embedding: Tensor | nn.Module) -> Tensor:
    """The [vocabulary, hidden] weight of an embedding."""
    weight = getattr(embedding, "weight", None) if isinstance(embedding, nn.Module) else embedding
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: embedding must be a tensor or a module with a weight, got {type(embedding).__name__}")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[0] < 1:
        expected = "a floating-point [vocabulary, hidden]"
        raise ValueError(f"{op}: embedding must be {expected}, got {weight.dtype} {tuple(weight.shape)}")
    return weight
