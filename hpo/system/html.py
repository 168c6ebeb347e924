"""HTML for a notebook: tables and paragraphs in which every text is shown as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from hpo.system.readable import one_line


def html_text(text: object) -> str:
    """Return a text that stands for nothing but itself."""
    return html.escape(one_line(str(text)))


def html_paragraph(text: object, *, bold: bool = False) -> str:
    """Return a paragraph."""
    return f"<p><b>{html_text(text)}</b></p>" if bold else f"<p>{html_text(text)}</p>"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; without column names it has no head."""
    head = f"<thead><tr>{_html_cells(columns, 'th')}</tr></thead>" if columns else ""
    body = "".join(f"<tr>{_html_cells(row, 'td', columns)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _html_cells(texts: Sequence[object], tag: str, columns: Sequence[str] = ()) -> str:
    """Return the cells of a row; those below names of columns have these as data, for pages too narrow for a head."""
    names = [f' data-column="{html_text(column)}"' for column in columns] or [""] * len(texts)
    return "".join(
        f'<{tag}{name} style="text-align: left">{html_text(text)}</{tag}>'
        for text, name in zip(texts, names, strict=True)
    )
