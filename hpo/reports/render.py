"""The formats of a report: one HTML page, an image of one figure, Markdown or JSON; a table, one entry each."""

from __future__ import annotations

from collections.abc import Callable

from hpo.errors import unknown_name
from hpo.reports.figures.table import FIGURES
from hpo.reports.html_page import render_html
from hpo.reports.images import render_png, render_svg
from hpo.reports.json_text import render_json
from hpo.reports.markdown import render_markdown
from hpo.reports.study_report import StudyReport

FORMATS: dict[str, Callable[[StudyReport, str], bytes]] = {
    "html": render_html,
    "png": render_png,
    "svg": render_svg,
    "md": render_markdown,
    "json": render_json,
}


def render_report(report: StudyReport, form: str, *, figure: str = "response") -> bytes:
    """Return the report in one of FORMATS; an image shows only `figure`.

    Raises:
        UserError: The figure has nothing to show, or this machine cannot draw images.
    """
    return FORMATS[form](report, figure)


def check_request(form: str, figure: str) -> None:
    """Raise UserError if there is no such format or figure."""
    if form not in FORMATS:
        raise unknown_name("--format", form, FORMATS)
    if figure not in FIGURES:
        raise unknown_name("--figure", figure, FIGURES)
