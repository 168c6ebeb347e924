"""Pieces of Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(names: Iterable[str]) -> str:
    """Return names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def unwrapped(text: str) -> str:
    """Return a text with one line for each paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def summary(thing: object) -> str:
    """Return the first paragraph of a docstring without its full stop."""
    return unwrapped(inspect.getdoc(thing) or "").split("\n\n")[0].removesuffix(".")


def with_names(text: str, names: Iterable[str]) -> str:
    """Return the text with these names as code."""
    for name in names:
        text = re.sub(rf"(?<![\w`]){re.escape(name)}(?![\w`])", f"`{name}`", text)
    return text
