"""This machine's measured speeds, and the time that the least work of a case would take at them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..functional.lora import frozen_linear
from .cases import Case
from .measure import Timer

SIDE, COPIED_BYTES, ROUNDS = 2048, 1 << 28, 7


class Light(NamedTuple):
    """The best of a few runs, on this machine, now."""

    flops: float
    """Multiply-adds count as two; per second, of a square fp32 product."""
    bytes: float
    """Per second, read and written by a copy far larger than the caches."""

    def seconds(self, case: Case) -> float:
        """Time for the case's least work and least traffic, whichever takes longer; 0 where they are not known.

        The operands of small cases stay in the caches, so their traffic takes less than that.
        """
        if "float32" not in case.name:
            return 0.0
        return max(case.flops / self.flops, case.bytes / self.bytes) if case.flops else 0.0


def measure_light(device: torch.device, timer: Timer) -> Light:
    """Runs a square product and a copy."""
    with torch.no_grad():
        x, weight = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
        product = min(timer(lambda: torch.mm(x, weight), 1) for _ in range(ROUNDS))
        if device.type == "cpu":  # oneDNN may be faster than what is behind torch.mm
            product = min(product, *(timer(lambda: frozen_linear(x, weight), 1) for _ in range(ROUNDS)))
        source = torch.ones(COPIED_BYTES // 2, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        copied = min(timer(lambda: target.copy_(source), 1) for _ in range(ROUNDS))
    return Light(2 * SIDE**3 / product, COPIED_BYTES / copied)
