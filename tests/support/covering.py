"""Few combinations of many parameters."""

from __future__ import annotations


def covering_pairs(**axes):
    """Few combinations that hold every pair of values of every two axes, chosen greedily."""
    names = list(axes)
    open_pairs = {(a, x, b, y) for i, a in enumerate(names) for b in names[i + 1 :] for x in axes[a] for y in axes[b]}
    chosen = []
    while open_pairs:
        a, x, b, y = min(open_pairs, key=repr)
        case = {a: x, b: y}
        for name in names:
            if name not in case:
                case[name] = max(axes[name], key=lambda v: len(_pairs({**case, name: v}, names) & open_pairs))
        open_pairs -= _pairs(case, names)
        chosen.append(case)
    return chosen


def case_id(case):
    """A readable name for a combination, or for anything else beside it."""
    if not isinstance(case, dict):
        return str(case)
    return "-".join(f"{name}={value}".replace("torch.", "") for name, value in case.items())


def _pairs(case, names):
    known = [n for n in names if n in case]
    return {(a, case[a], b, case[b]) for i, a in enumerate(known) for b in known[i + 1 :]}
