"""The dropout mask in plain torch, from Philox 4x32-10.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

This is the definition that ``csrc/philox.h`` and the Triton kernels follow bit for bit. Element (m, k) of a [M, K]
matrix belongs to group ``g = m * ceil(K / 8) + k // 8``. Philox with counter ``(lo32(g), hi32(g), 0, 0)`` and key
``(lo32(seed), hi32(seed))`` gives four words for the group; element ``k % 8`` takes 16 bits of word ``k % 8 // 2``,
low half first. With ``T = round(65536 * p)`` the element is kept iff its 16 bits are >= T, and scaled by
``65536 / (65536 - T)``.
"""

from __future__ import annotations

from typing import Any

import torch

_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MEMBER = 0xD1B54A32D192ED03


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox over int64 tensors that hold unsigned 32-bit values.

    Args:
        counter: four broadcastable int64 tensors.
        key: two broadcastable int64 tensors.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64, but its bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW32) ^ c1 ^ k0, p1 & _LOW32, (p0 >> 32 & _LOW32) ^ c3 ^ k1, p0 & _LOW32
        k0, k1 = k0 + _WEYL[0] & _LOW32, k1 + _WEYL[1] & _LOW32
    return c0, c1, c2, c3


def member_seed(seed: torch.Tensor | int, member: int) -> Any:
    """The seed of the i-th of several masks that are drawn from one: ``seed + member * 0xD1B54A32D192ED03`` mod 2**64.

    The number is odd, so that no two members' seeds are equal; the first member has the seed itself.

    Args:
        seed: int64 [1], or an int.
        member: its place, from 0 on.

    Returns:
        As ``seed`` is given; an int is the one that int64 holds.
    """
    step = _as_int64(member * _MEMBER)
    return seed + step if isinstance(seed, torch.Tensor) else _as_int64(seed + step)


def _as_int64(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def keep_threshold(p: float) -> int:
    """T of the module docstring: an element is kept iff its 16 random bits are >= T."""
    return int(65536 * p + 0.5)


def keep_scale(p: float) -> float:
    """Factor on kept elements, ``65536 / (65536 - T)``; 0 where nothing is kept."""
    kept = 65536 - keep_threshold(p)
    return 65536 / kept if kept else 0.0


def keep_mask(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """The mask of a [rows, columns] matrix.

    Args:
        seed: int64 [1].
        p: probability of dropping, in [0, 1].

    Returns:
        bool [rows, columns] on seed's device, True where the element is kept.
    """
    groups_per_row = (columns + 7) // 8
    group = torch.arange(rows * groups_per_row, dtype=torch.int64, device=seed.device)
    return keep_groups(seed, group, p).view(rows, groups_per_row * 8)[:, :columns]


def keep_groups(seed: torch.Tensor, group: torch.Tensor, p: float) -> torch.Tensor:
    """The eight elements of each group: bool [..., 8] for ``group`` [...], int64."""
    zero = torch.zeros_like(group)
    words = philox4x32((group & _LOW32, group >> 32 & _LOW32, zero, zero), (seed & _LOW32, seed >> 32 & _LOW32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return halves >= keep_threshold(p)
