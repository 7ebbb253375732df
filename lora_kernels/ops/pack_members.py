"""The members of a pack: what each has of its lists of operands, and what they have together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .. import dispatch, philox
from ..spec import OpSpec, Verdict

Tensors = list[Tensor]


def members(
    weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, seed: Tensor | None, scalings: list[float],
    dropout_p: list[float],
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, float, float]]:  # fmt: skip
    """(weight, lora_A, lora_B, seed, scaling, dropout_p) of each member."""
    for i, (weight, A, B, scaling, p) in enumerate(zip(weights, lora_As, lora_Bs, scalings, dropout_p, strict=True)):
        yield weight, A, B, None if seed is None else philox.member_seed(seed, i), scaling, p


def total_rank(lora_As: Tensors) -> int:
    return sum(A.shape[0] for A in lora_As)


def empty_s(x: Tensor, lora_As: Tensors) -> Tensor:
    """Memory of s."""
    return x.new_empty(x.shape[:-1].numel() * total_rank(lora_As))


def parts_of(s: Tensor, x: Tensor, lora_As: Tensors) -> list[Tensor]:
    """Each member's s, [..., rank]."""
    lead, ranks = x.shape[:-1], [A.shape[0] for A in lora_As]
    parts = s.split([lead.numel() * rank for rank in ranks])
    return [part.view(*lead, rank) for part, rank in zip(parts, ranks)]


def of_member(spec: OpSpec, rank_of: int) -> Callable[..., Any]:
    """The op, but that a member without an adapter, of which argument ``rank_of`` tells, is torch's."""

    def run(*args: Any) -> Any:
        return dispatch.run(spec, *args) if args[rank_of].shape[0] else spec.reference(*args)

    return run


def of_all(verdicts: Sequence[Verdict]) -> Verdict:
    """One schedule where members have the same, or theirs one after the other."""
    first = verdicts[0]
    if all(verdict.schedule == first.schedule for verdict in verdicts):
        return first
    return Verdict(", ".join(str(verdict.schedule) for verdict in verdicts), "members' products differ in what is best")


def sizes(x: Tensor, weights: Tensors, lora_As: Tensors) -> tuple[int, int, int, int]:
    """m, the sum of n, k, the sum of ranks."""
    return x.shape[:-1].numel(), sum(w.shape[0] for w in weights), x.shape[-1], total_rank(lora_As)


def expansions(weights: Tensors, lora_As: Tensors) -> int:
    """Elements of all B."""
    return sum(weight.shape[0] * A.shape[0] for weight, A in zip(weights, lora_As))
