"""The project's Markdown, taken apart: fenced blocks, inline code, headings and links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "bench/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block: what language it says it is in, and the line of its first line in the file."""

    language: str
    line: int
    text: str


def read(file: str) -> str:
    return (ROOT / file).read_text()


def blocks(text: str, language: str) -> list[Block]:
    """The fenced blocks of ``text`` in one language."""
    found = (Block(m[1], text.count("\n", 0, m.start(2)) + 1, m[2]) for m in _FENCE.finditer(text))
    return [block for block in found if block.language == language]


def prose(text: str) -> str:
    """``text`` without its fenced blocks."""
    return _FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def links(text: str) -> list[str]:
    """Targets of links and pictures, also of a link whose text is a picture or a bracket."""
    return _LINK.findall(prose(text))


def anchors(text: str) -> set[str]:
    """What a link may point at, as GitHub names it: headings in lower case, without punctuation, numbered if equal."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = found.setdefault(slug, 0)
        found[slug] += 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def commands(text: str) -> list[str]:
    """What the console blocks tell to type, without the remarks."""
    lines = [line for block in blocks(text, "console") for line in block.text.splitlines()]
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]
