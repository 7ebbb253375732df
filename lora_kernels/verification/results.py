"""What ``verify`` finds, and when two results are as good as equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

OK, DIFFERS, RAISED, KEPT = "ok", "differs", "raised", "kept"
UNCOUNTED = "torch's own product, for so many rows"
"""``FrozenLinear`` and merged layers of ours leave to torch what it multiplies as fast."""
SHARDS = "not compared: its weights are spread over processes; verify the model before that"
SEED = 1

Results = dict[str, Tensor]
"""What one call gives, by name: "y", "dx", and the gradient of each parameter."""


@dataclass(frozen=True)
class Check:
    """One layer's outcome.

    Attributes:
        name: of the module in the model.
        op: the op that served it, "" if none did.
        verdict: "ok"; "differs": some result is further from float64 than allowed; "raised": the fused layer raised
            where the original did not; "kept": the original computed it, or it holds shards: nothing is compared.
        error, allowed: of the result that is worst by their quotient, both as largest elements.
        detail: which result that is; what was raised; why the original is kept.
        trains: whether a parameter of its adapter requires grad.
    """

    name: str
    op: str
    verdict: str
    error: float = 0.0
    allowed: float = 0.0
    detail: str = ""
    trains: bool = True

    def cells(self) -> tuple[str, ...]:
        compared = self.verdict in (OK, DIFFERS)
        numbers = (f"{self.error:.1e}", f"{self.allowed:.1e}") if compared else ("", "")
        return self.verdict, self.name, self.op, *numbers, self.detail + ("" if self.trains else "; adapter frozen")


@dataclass
class Verification:
    """Result of ``verify``; ``print`` it for a table. ``ok`` is True if no layer differs or raised.

    Attributes:
        checks: a row per layer: its name, op, error, what is allowed, and the verdict.
    """

    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.verdict in (OK, KEPT) for check in self.checks)

    def __str__(self) -> str:
        counts = {verdict: sum(c.verdict == verdict for c in self.checks) for verdict in (OK, DIFFERS, RAISED, KEPT)}
        frozen = sum(not check.trains for check in self.checks)
        summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n or verdict == OK)
        summary += f"; {frozen} whose adapter does not train" if frozen else ""
        rows = [("", "module", "op", "error", "allowed", "worst result, or reason"), *(c.cells() for c in self.checks)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            [summary] + ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        )


def max_error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference from ``exact``, which is float64; NaN if there is one."""
    return (actual.double() - exact).abs().max().item()


def badness(check: Check) -> tuple[bool, float]:
    """To sort by: what differs first of all, then the error as a share of what is allowed."""
    quotient = check.error / check.allowed if check.allowed else (math.inf if check.error else 0.0)
    return check.verdict == DIFFERS, quotient
