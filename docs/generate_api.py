"""Writes docs/api.md from the docstrings of the public names: ``make docs``.

griffe reads the sources without importing them, and takes the docstrings apart; what is here turns that into Markdown.
"""

from __future__ import annotations

import inspect
import logging
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
PACKAGE = "lora_kernels"
_WIDTH = 120
_HEAD = """# API

Every public name of `import lora_kernels as lk`. Made from the docstrings by `make docs`; do not edit.

Shapes stand in brackets, outermost dimension first; `...` is any number of leading dimensions, zero included.
"""
_SECTIONS = ("Functions", "Classes", "Autograd functions", "Constants")


def load() -> Any:
    """The package as griffe reads it, with docstrings in Google's style."""
    logging.getLogger("griffe").setLevel(logging.ERROR)  # arguments that share a line of their docstring have no type
    one_item: Any = {"returns_multiple_items": False, "returns_named_value": False}
    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser=griffe.Parser.google, docstring_options=one_item)
    package = loader.load(PACKAGE)
    loader.resolve_aliases()
    return package


def page() -> str:
    """The text of docs/api.md."""
    package = load()
    sections: dict[str, list[tuple[str, str]]] = {title: [] for title in _SECTIONS}
    for name in package.exports:  # __all__
        member = package[name].final_target if package[name].is_alias else package[name]
        sections[_section(name, member)].append((name, _entry(name, member)))
    parts = [_HEAD]
    for title, entries in sections.items():
        links = " ·\n".join(f"[`{name}`](#{name.lower()})" for name, _ in entries)
        parts += [f"## {title}", *([links] if title != "Constants" else []), *(text for _, text in entries)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _section(name: str, member: Any) -> str:
    if member.is_function:
        return "Functions"
    if member.is_attribute:
        return "Constants"
    return "Autograd functions" if name.endswith("Function") else "Classes"


def _entry(name: str, member: Any) -> str:
    parts = [f"### `{name}`" if name.startswith("_") else f"### {name}"]
    if member.is_attribute:
        assignment = f"{name} = {member.value}"
        parts += [_code(assignment)] if len(assignment) <= _WIDTH else []
        return "\n\n".join([*parts, *_docstring(member)])
    function = member.parameters if member.is_function else _constructor(member)
    if function is not None:
        parts.append(_code(_signature(name, function, member.returns if member.is_function else None)))
    parts += _docstring(member)
    if member.is_class:
        parts += _fields(member)
        for method in _methods(member):
            parts += [f"#### {name}.{method.name}", _code(_signature(method.name, method.parameters, method.returns))]
            parts += _docstring(method)
    return "\n\n".join(parts)


def _fields(member: Any) -> list[str]:
    """The attributes that have a docstring of their own."""
    found = [
        f"- `{field.name}`: {_prose(field.docstring.value)}"
        for field in member.members.values()
        if field.is_attribute and field.docstring and not field.name.startswith("_") and "property" not in field.labels
    ]
    return ["**Attributes**", "\n".join(found)] if found else []


def _methods(member: Any) -> list[Any]:
    """The class's own and those of its bases in the package that say what they do; a class's own come first."""
    found = {}
    for owner in (member, *member.mro()):
        for method in owner.members.values():
            if method.is_function and method.docstring and not method.name.startswith("_"):
                found.setdefault(method.name, method)
    return list(found.values())


def _constructor(member: Any) -> Any:
    """The parameters of a class that its docstring explains."""
    init = member.members.get("__init__")
    return init.parameters if init is not None and init.is_function else None


def _signature(name: str, parameters: Any, returns: Any) -> str:
    """As Python writes it, on one line or an argument a line."""
    arguments, star = [], False
    for parameter in parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value
        if kind == "keyword-only" and not star:
            arguments.append("*")
            star = True
        star = star or kind == "variadic positional"
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        text = f"{stars}{parameter.name}"
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and not stars:
            text += f" = {parameter.default}" if parameter.annotation is not None else f"={parameter.default}"
        arguments.append(text)
    end = f" -> {returns}" if returns is not None else ""
    line = f"{name}({', '.join(arguments)}){end}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){end}"])


def _docstring(member: Any) -> list[str]:
    if member.docstring is None:
        return []
    parts = []
    for section in member.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            parts.append(_prose(section.value))
        elif kind in ("returns", "yields"):
            parts += [f"**{kind.capitalize()}**", _prose("\n".join(map(_whole, section.value)))]
        elif kind == "attributes":
            parts += ["**Attributes**", "\n".join(_attributes(member.docstring.value))]
        elif kind in ("parameters", "raises"):
            parts += [f"**{kind.capitalize()}**", "\n".join(map(_explained, section.value))]
        else:
            raise ValueError(f"{member.path}: a section of the docstring that nothing here writes: {kind}")
    return parts


def _explained(element: Any) -> str:
    """A line of a list: an argument or an error, and what it is."""
    label = getattr(element, "name", "") or str(element.annotation).strip("()")
    return _listed(label, element.description)


def _listed(label: str, text: str) -> str:
    return f"- `{label}`: " + _prose(text).replace("\n", "\n  ")


def _whole(element: Any) -> str:
    """What is returned; griffe takes what stands before a colon for a type."""
    before = f"{element.annotation}: " if isinstance(element.annotation, str) else ""
    return before + element.description


def _attributes(docstring: str) -> list[str]:
    """The lines of "Attributes:", where several share one; griffe takes the second for a type of the first."""
    block = inspect.cleandoc(docstring).partition("Attributes:\n")[2].partition("\n\n")[0]
    items = re.split(r"\n(?=\S)", textwrap.dedent(block))
    return [_listed(*item.replace("\n    ", "\n").split(": ", 1)) for item in items]


def _prose(text: str) -> str:
    """reStructuredText's literals as Markdown's."""
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    literal = re.compile(r"::\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)
    return literal.sub(lambda block: ":\n\n" + _code(textwrap.dedent(block[1]).strip()) + "\n\n", text + "\n").strip()


def _code(text: str) -> str:
    """A block that no test runs: it is not a snippet."""
    return f"```\n{text}\n```"


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page())
