"""Text for people: one line of a message, aligned tables, sizes."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(message: object) -> str:
    """``message`` with its line breaks and runs of blanks collapsed."""
    return " ".join(str(message).split())


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, which is what fits a terminal; two where the first ends with a colon."""
    lines = [one_line(line) for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """An aligned text table. ``right`` lists the columns to align on the right (numbers)."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def mebibytes(count: float) -> str:
    """Bytes as MiB, with a decimal below 100."""
    value = count / 2**20
    return f"{value:,.0f} MiB" if value >= 100 else f"{value:.1f} MiB"
