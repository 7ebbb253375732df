"""The seam to serving engines: pools of adapters, what a step knows of its rows, and the branch over a base output.

An engine makes the base product itself, from a weight that may be quantised or a shard, and wants what adapters add to
it, each row by its own::

    base_output[m] += scaling[i] * (x[m] @ lora_A[i].T) @ lora_B[i].T        i: the slot of row m's adapter, or none

Once per step ``ServingStep.fill`` says who the rows belong to; all layers read that. Every tensor stays where it is and
keeps its size: a CUDA graph that was captured once is right for the next step's adapters, ranks and factors, and for
adapters that were loaded in between.

Tensor parallelism needs nothing of its own, since the branch is linear. A column-parallel layer has all of lora_A and
its own rows of lora_B. A row-parallel one has its own columns of lora_A and all of lora_B, and adds its branch to its
part of the base output before these are summed over devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..functional.lora import frozen_linear
from ..functional.multi import multi_lora_linear
from ..functional.multi_branch import RowOrder, multi_lora_expand_, multi_lora_shrink, row_order

Device = torch.device | str | None
Pair = tuple[Tensor, Tensor]
"""lora_A [rank, in_features] and lora_B [out_features, rank]."""


class LoRAPool:
    """The adapters of one layer, or of one shard of it, each in a slot.

    A layer that is several stacked side by side (gate and up; q, k and v) has so many slices: each has factors of its
    own, one behind the other at the adapter's own rank in lora_A, and its own columns of the output.

    Args:
        slots: how many adapters there is room for.
        max_rank: the largest rank of one.
        in_features: columns of x.
        out_features: columns of the output, or of each slice.
        dtype: that of x, or float32 over a 16-bit x.
        device: that of x.

    Attributes:
        lora_A [slots, slices * max_rank, in_features], lora_B [slots, sum of out_features, max_rank].
        offsets: where each slice's columns begin, and where the last ones end.
    """

    def __init__(
        self,
        slots: int,
        max_rank: int,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
    ) -> None:
        widths = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        for name, number in (("slots", slots), ("max_rank", max_rank), ("the number of out_features", len(widths))):
            if number < 1:
                raise ValueError(f"LoRAPool: {name} must be at least 1, got {number}")
        self.max_rank = max_rank
        self.offsets = (0, *itertools.accumulate(widths))
        self.lora_A = torch.zeros((slots, len(widths) * max_rank, in_features), dtype=dtype, device=device)
        self.lora_B = torch.zeros((slots, self.offsets[-1], max_rank), dtype=dtype, device=device)

    @property
    def slices(self) -> int:
        return len(self.offsets) - 1

    @torch.no_grad()
    def write(self, slot: int, pairs: Sequence[Pair | None], rank: int) -> None:
        """Puts an adapter into a slot.

        Args:
            slot: which one.
            pairs: the factors of each slice; None for one that the adapter leaves alone.
            rank: the adapter's, at least that of each pair; a smaller one is filled up with zeros.

        Raises:
            ValueError: the numbers or shapes do not fit; the slot is then as it was.
        """
        self.check(slot, pairs, rank)
        of_slot_A, of_slot_B = self.lora_A[slot], self.lora_B[slot]
        of_slot_A.zero_()
        of_slot_B.zero_()
        for i, pair in enumerate(pairs):
            if pair is not None:
                own = len(pair[0])
                of_slot_A[i * rank : i * rank + own].copy_(pair[0])
                of_slot_B[self.offsets[i] : self.offsets[i + 1], :own].copy_(pair[1])

    def check(self, slot: int, pairs: Sequence[Pair | None], rank: int) -> None:
        """``ValueError`` unless ``write`` takes them."""
        if not 0 <= slot < len(self.lora_A):
            raise ValueError(f"LoRAPool: slot must be from 0 to {len(self.lora_A) - 1}, got {slot}")
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"LoRAPool: rank must be from 1 to {self.max_rank}, got {rank}")
        if len(pairs) != self.slices:
            raise ValueError(f"LoRAPool: pairs must be {self.slices}, one for each slice, got {len(pairs)}")
        in_features = self.lora_A.shape[2]
        for (first, last), pair in zip(itertools.pairwise(self.offsets), pairs):
            if pair is None:
                continue
            own = pair[0].shape[0]
            if own > rank or pair[0].shape != (own, in_features) or pair[1].shape != (last - first, own):
                raise ValueError(
                    f"LoRAPool: a pair must be [r, {in_features}] and [{last - first}, r] with r of at most {rank}, "
                    f"got {tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
                )

    def add_(self, base_output: Tensor, x: Tensor, step: ServingStep) -> Tensor:
        """Adds each row's branch to ``base_output`` [..., sum of out_features] in place; returns it."""
        return add_branch_(base_output, x, self.lora_A, self.lora_B, step, self.offsets)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, step: ServingStep) -> Tensor:
        """The whole layer over a plain weight: ``lk.multi_lora_linear``, or a base and ``add_`` where there are slices.

        Args:
            x: [..., in_features].
            weight: [sum of out_features, in_features]. bias: [sum of out_features] or None.
        """
        if self.slices > 1:
            return self.add_(frozen_linear(x, weight, bias), x, step)
        ids, _ = step.of(x)
        return multi_lora_linear(
            x, weight, self.lora_A, self.lora_B, ids.view(x.shape[:-1]), bias,
            scaling=step.slots.scalings, ranks=step.slots.ranks,
        )  # fmt: skip


class AdapterSlots:
    """The adapters that are loaded: which slot of all pools is whose, of which rank and factor.

    Args:
        count: how many slots.
        pools: of the layers, by name, each with as many slots; they may be left out where an engine fills its own.
        device: that of the pools.

    Attributes:
        ranks int32 [count], scalings float32 [count]: of each slot; 0 where there is none. They stay where they are.
    """

    def __init__(self, count: int, pools: Mapping[str, LoRAPool] | None = None, *, device: Device = None) -> None:
        self.pools = dict(pools or {})
        for name, pool in self.pools.items():
            if len(pool.lora_A) != count:
                raise ValueError(f"AdapterSlots: pool {name!r} must have {count} slots, got {len(pool.lora_A)}")
        self.ranks = torch.zeros(count, dtype=torch.int32, device=device)
        self.scalings = torch.zeros(count, dtype=torch.float32, device=device)
        self._slot_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def loaded(self) -> dict[str, int]:
        """The slot of each adapter that is loaded, by name."""
        return dict(self._slot_of)

    def slot_of(self, adapter: str | int | None) -> int:
        """The number of a slot, by itself or by its adapter's name; -1 for None."""
        if adapter is None:
            return -1
        if isinstance(adapter, str):
            if adapter not in self._slot_of:
                known = ", ".join(map(repr, self._slot_of)) or "none"
                raise ValueError(f"AdapterSlots: adapter {adapter!r} is not loaded, loaded are {known}")
            return self._slot_of[adapter]
        if not -1 <= adapter < len(self):
            raise ValueError(f"AdapterSlots: an adapter's number must be from -1 to {len(self) - 1}, got {adapter}")
        return int(adapter)

    def load(self, name: str, weights: Mapping[str, Pair | Sequence[Pair | None]], *, scaling: float) -> int:
        """Loads an adapter into a free slot, between two steps.

        Args:
            name: of the adapter, which must not be loaded yet.
            weights: its factors by pool; a sequence of one per slice where a pool has several. Pools that are not named
                get none.
            scaling: factor of its updates, alpha / rank in most files.

        Returns:
            The slot.

        Raises:
            ValueError: the name is taken, no slot is free (``evict`` one), a pool is unknown, or shapes do not fit.
                Nothing is changed then.
        """
        if name in self._slot_of:
            raise ValueError(f"AdapterSlots: an adapter {name!r} is loaded already")
        free = sorted({*range(len(self))} - {*self._slot_of.values()})
        if not free:
            raise ValueError(f"AdapterSlots: all {len(self)} slots are taken; evict an adapter first")
        unknown = sorted(weights.keys() - self.pools.keys())
        if unknown or not weights:
            raise ValueError(f"AdapterSlots: weights must name pools of {sorted(self.pools)}, got {unknown or 'none'}")
        slices = {key: _of_slices(given) for key, given in weights.items()}
        rank = max((len(pair[0]) for pairs in slices.values() for pair in pairs if pair is not None), default=0)
        if rank == 0:
            raise ValueError(f"AdapterSlots: weights must have at least one pair of rank >= 1, got {sorted(weights)}")
        of_pools = [(pool, slices.get(key, (None,) * pool.slices)) for key, pool in self.pools.items()]
        for pool, pairs in of_pools:
            pool.check(free[0], pairs, rank)
        for pool, pairs in of_pools:
            pool.write(free[0], pairs, rank)
        self.ranks[free[0]], self.scalings[free[0]] = rank, scaling
        self._slot_of[name] = free[0]
        return free[0]

    def evict(self, name: str) -> None:
        """Gives an adapter's slot back, between two steps: the next one may be loaded into it.

        Raises:
            ValueError: it is not loaded.
        """
        slot = self.slot_of(name)
        self.ranks[slot] = 0
        del self._slot_of[name]

    def assign(self, ranks: Sequence[int], scalings: Sequence[float]) -> None:
        """Ranks and factors of all slots at once, for engines whose own pools these are; fewer leave the rest empty."""
        if len(ranks) != len(scalings) or len(ranks) > len(self):
            raise ValueError(
                f"AdapterSlots: ranks and scalings must be one for each of {len(self)} slots, got {len(ranks)} and "
                f"{len(scalings)}"
            )
        rest = [0] * (len(self) - len(ranks))
        self.ranks.copy_(torch.tensor([*ranks, *rest], dtype=torch.int32))
        self.scalings.copy_(torch.tensor([*scalings, *rest], dtype=torch.float32))


class ServingStep:
    """Who the rows of a step belong to, in buffers of the largest size, which ``fill`` writes anew.

    Args:
        max_rows: the most rows that a step can have, or of a batch that a graph is captured for.
        slots: what is loaded.

    Attributes:
        adapter_ids int32 [max_rows]: the slot of each row, -1 for none; so are rows behind those that were filled.
        order int32 [max_rows], ends int32 [slots]: the rows of each slot, as ``RowOrder`` has them.
        row_ranks int64 [max_rows]: the rank of each row's adapter.
        rows: how many were filled.
    """

    def __init__(self, max_rows: int, slots: AdapterSlots) -> None:
        if max_rows < 1:
            raise ValueError(f"ServingStep: max_rows must be at least 1, got {max_rows}")
        device = slots.ranks.device
        self.slots, self.rows = slots, 0
        self.adapter_ids = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self.order = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.ends = torch.zeros(len(slots), dtype=torch.int32, device=device)
        self.row_ranks = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def fill(self, adapters: Sequence[str | int | None] | Tensor, lengths: Sequence[int] | None = None) -> None:
        """Says who the rows of the next step belong to; after adapters were loaded and evicted, before the first layer.

        Args:
            adapters: of each request, the name or the slot of its adapter, None or -1 for the base alone. Or an integer
                tensor of slots, one for each row, whose range nobody looks at on a GPU.
            lengths: how many rows each request has, one behind the other; None: one each.

        Raises:
            ValueError: an adapter is not loaded, lengths do not fit, or there are more rows than ``max_rows``. The step
                is then as it was.
        """
        ids = adapters if isinstance(adapters, Tensor) else self._ids(adapters, lengths)
        if ids.dim() != 1 or ids.is_floating_point() or (ids is adapters and lengths is not None):
            raise ValueError("ServingStep: a tensor of adapters must be integers, one for each row, without lengths")
        if len(ids) > len(self.adapter_ids):
            raise ValueError(f"ServingStep: there is room for {len(self.adapter_ids)} rows, got {len(ids)}")
        order = row_order(ids, len(self.slots))
        self.rows = len(ids)
        self.adapter_ids[: self.rows].copy_(ids)
        self.adapter_ids[self.rows :].fill_(-1)
        self.order[: self.rows].copy_(order.rows)
        self.ends.copy_(order.ends)
        own = self.adapter_ids.clamp(min=0, max=len(self.slots) - 1)
        self.row_ranks.copy_(torch.where(self.adapter_ids < 0, 0, self.slots.ranks[own]))

    def _ids(self, adapters: Sequence[str | int | None], lengths: Sequence[int] | None) -> Tensor:
        ids = torch.tensor([self.slots.slot_of(adapter) for adapter in adapters], dtype=torch.int32)
        if lengths is None:
            return ids
        if len(lengths) != len(ids) or any(length < 0 for length in lengths):
            raise ValueError(f"ServingStep: lengths must be {len(ids)} numbers from 0 on, got {list(lengths)}")
        return ids.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))

    def of(self, x: Tensor) -> tuple[Tensor, RowOrder]:
        """The ids of x's rows and their order, as views of the buffers.

        x may have more rows than were filled, as padded batches do: these get nothing.

        Raises:
            ValueError: x has fewer rows, or more than ``max_rows``.
        """
        rows = x.shape[:-1].numel()
        if not self.rows <= rows <= len(self.adapter_ids):
            raise ValueError(
                f"ServingStep: {self.rows} rows were filled and there is room for {len(self.adapter_ids)}, got x with "
                f"{rows}"
            )
        return self.adapter_ids[:rows], RowOrder(self.order[:rows], self.ends)


def shrink(x: Tensor, lora_A: Tensor, step: ServingStep, slices: int = 1) -> Tensor:
    """s = x Aᵀ of each row's adapter, [..., slices * max_rank]; an adapter's slices one behind the other, then zeros.

    Args:
        x: [..., in_features].
        lora_A: [slots, slices * max_rank, in_features].
    """
    ids, order = step.of(x)
    ranks = step.slots.ranks if slices == 1 else step.slots.ranks * slices
    return multi_lora_shrink(x, lora_A, ids, ranks=ranks, order=order)


def expand_(y: Tensor, s: Tensor, lora_B: Tensor, step: ServingStep, offsets: Sequence[int] | None = None) -> Tensor:
    """y += scaling * s Bᵀ of each row's adapter, slice by slice, in place.

    Args:
        y: [..., columns], of which those from the last offset on are left alone.
        s: [..., slices * max_rank], as ``shrink`` returns it.
        lora_B: [slots, offsets[-1], max_rank].
        offsets: where the columns of each slice begin and the last ones end; None: there is one slice.
    """
    ids, order = step.of(y)
    offsets = (0, lora_B.shape[1]) if offsets is None else offsets
    for i, (first, last) in enumerate(itertools.pairwise(offsets)):
        part = _slice_of(s, i, lora_B.shape[2], step.row_ranks[: len(ids)])
        multi_lora_expand_(
            y[..., first:last], part, lora_B[:, first:last], ids,
            scaling=step.slots.scalings, ranks=step.slots.ranks, order=order,
        )  # fmt: skip
    return y


def add_branch_(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, step: ServingStep, offsets: Sequence[int] | None = None
) -> Tensor:
    """``shrink``, then ``expand_``, over an engine's own pools. Returns y."""
    return expand_(y, shrink(x, lora_A, step, 1 if offsets is None else len(offsets) - 1), lora_B, step, offsets)


def _slice_of(s: Tensor, i: int, max_rank: int, row_ranks: Tensor) -> Tensor:
    """The i-th slice of each row's s, [..., max_rank]; it begins at i times the row's rank."""
    if i == 0:
        return s[..., :max_rank]
    first = (row_ranks * i).view(*s.shape[:-1], 1)
    columns = first + torch.arange(max_rank, device=s.device)
    return s.gather(-1, columns.clamp(max=s.shape[-1] - 1))


def _of_slices(given: Pair | Sequence[Pair | None]) -> Sequence[Pair | None]:
    """A pair by itself is that of the only slice."""
    return (given,) if len(given) == 2 and isinstance(given[0], Tensor) else given  # type: ignore[return-value]
