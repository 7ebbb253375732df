"""What was swapped in a model, what was left alone, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .reasons import Reason

FUSED = "lora_linear"
"""Reason of a fused row: every plain call of the layer is one ``lora_linear``."""
FUSED_COLUMNS, FUSED_ROWS = "lora_linear, column-parallel", "lora_linear, row-parallel"
"""Reasons of fused rows: every plain call is one ``lora_linear`` on this process's shards, and sums over processes."""
FUSED_GATHERED = "lora_linear, gathered by ZeRO-3"
"""Reason of a fused row: every plain call is one ``lora_linear``, for which DeepSpeed makes the parameters whole."""
FUSED_POOL = "multi_lora_linear"
"""Reason of a fused row: every call is one ``multi_lora_linear``."""
FUSED_PACK = "lora_pack"
"""Reason of a fused row: the layer and its siblings, which read the same tensor, are one ``lora_pack``."""
FUSED_MLP = "lora_mlp"
"""Reason of a fused row: the layer is one of the three of a gated MLP, which is one ``lora_mlp``."""
FROZEN_UPCAST = "frozen, upcast"
"""Reason of a fused row: a frozen ``nn.Linear`` whose low-precision product goes through fp32."""
FROZEN_PAST_MKL = "frozen, past MKL"
"""Reason of a fused row: a frozen fp32 ``nn.Linear`` that oneDNN multiplies faster than the library torch takes."""
FROZEN_PACKED = "frozen, packed"
"""Reason of a fused row: a frozen layer without an adapter, multiplied from its quantised weight."""
PROMPT = "prompt_embedding"
"""Reason of a fused row: the op puts an adapter's prompt in front of the text, in PEFT's layout."""
PROMPT_FIXED = "prompt_embedding, left padding fixed"
"""The same, in the layout of ``patch(left_padding="fixed")``."""
PREFIX = "prefix_kv"
"""Reason of a fused row: the op makes an adapter's keys and values."""
LOSS = "linear_cross_entropy"
"""Reason of a fused row: head and loss of a language model are one op, which makes no logits."""
LOSS_ROW = "loss_function"
"""How the row of a language model's loss is named, behind the model."""
PROMPT_MODULE = "prompt_encoder"
"""Where PEFT's models keep what makes their prompts."""

_PROMPT_ROWS = (PROMPT, PROMPT_FIXED, PREFIX)
_FROZEN_PRODUCTS = {FROZEN_UPCAST: "upcast", FROZEN_PAST_MKL: "past MKL", FROZEN_PACKED: "packed"}
_FROZEN_ROWS = (*_FROZEN_PRODUCTS, Reason.FAST_PRODUCT)


@dataclass
class Report:
    """Result of ``patch``, ``inject`` and ``quantize_``; ``print`` it for a table.

    Attributes:
        fused: (module name, what serves it), in the model's order.
        kept: (module name, why it keeps its own forward).
        status, done: the words for ``fused`` in the table and above it.
        apart: (module name, why its layers are not one op); they are in ``fused`` or ``kept`` by themselves.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    status: str = "fused"
    done: str = "LoRA layers fused"
    apart: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            (status, str(count), reason, pattern)
            for status, pairs in ((self.status, self.fused), ("kept", self.kept), ("apart", self.apart))
            for reason, names in _by_reason(pairs).items()
            for pattern, count in collapse(names)
        ]
        count_width = max((len(row[1]) for row in rows), default=0)
        reason_width = max((len(row[2]) for row in rows), default=0)
        lines = [self._summary()]
        lines += [f"  {s:5}  {n:>{count_width}}  {reason:{reason_width}}  {names}" for s, n, reason, names in rows]
        return "\n".join(lines)

    def _summary(self) -> str:
        frozen = Counter(reason for _, reason in self.fused if reason in _FROZEN_PRODUCTS)
        fused_prompts = sum(reason in _PROMPT_ROWS for _, reason in self.fused)
        prompts = fused_prompts + sum(PROMPT_MODULE in name.split(".") for name, _ in self.kept)
        fused_losses, losses = (
            sum(name.split(".")[-1] == LOSS_ROW for name, _ in rows) for rows in (self.fused, self.fused + self.kept)
        )
        layers = sum(reason not in _FROZEN_ROWS for _, reason in self.fused + self.kept) - prompts - losses
        parts = []
        if layers:
            parts.append(f"{len(self.fused) - frozen.total() - fused_prompts - fused_losses} of {layers} {self.done}")
        if prompts:
            parts.append(f"{fused_prompts} of {prompts} prompt{'' if prompts == 1 else 's'} fused")
        if losses:
            parts.append(f"{fused_losses} of {losses} loss{'' if losses == 1 else 'es'} fused")
        for reason, count in frozen.items():
            parts.append(f"{count} frozen linear{'' if count == 1 else 's'} {_FROZEN_PRODUCTS[reason]}")
        if not parts:
            parts.append("0 frozen linears swapped")
        return ", ".join(parts)


def _by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in pairs:
        groups.setdefault(str(reason), []).append(name)
    return groups


def collapse(names: Iterable[str]) -> list[tuple[str, int]]:
    """Folds module names that differ in an index or in their last part.

    ``a.0.q``, ``a.0.k``, ``a.1.q``, ``a.1.k`` become ``[("a.{0..1}.{q,k}", 4)]``. Each pattern stands for
    exactly the names it was made from, in the order of its first one.
    """
    counts = Counter(tuple(name.split(".")) for name in names)
    depth = max((len(parts) for parts in counts), default=0)
    # From the right, so that the layers that hold the same set of leaves are folded last, and completely.
    for position in reversed(range(depth)):
        groups: dict[tuple, list[tuple[str, ...]]] = {}
        for parts in counts:
            last = position == len(parts) - 1
            foldable = last or (position < len(parts) and parts[position].isdecimal())
            key = (parts[:position], parts[position + 1 :], last) if foldable else (parts,)
            groups.setdefault(key, []).append(parts)
        counts = Counter({_fold(members, position): sum(counts[m] for m in members) for members in groups.values()})
    return [(".".join(parts), count) for parts, count in counts.items()]


def _fold(members: list[tuple[str, ...]], position: int) -> tuple[str, ...]:
    first = members[0]
    if len(members) == 1:
        return first
    values = [m[position] for m in members]
    inner = _ranges(sorted(map(int, values))) if all(v.isdecimal() for v in values) else ",".join(values)
    return (*first[:position], "{" + inner + "}", *first[position + 1 :])


def _ranges(numbers: list[int]) -> str:
    """``0..3,7`` for [0, 1, 2, 3, 7]."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in spans)
