"""The report of a study: its answer, figures, trials and how it was made, as one HTML page, an image, Markdown or JSON.

The page holds all it needs, Plotly too, and asks nothing of any network: its Content-Security-Policy forbids it. What
comes from users and from the store (values, metrics, tracebacks) is data in it, never markup or script; only the two
scripts whose hashes the policy names may run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hpo.errors import unknown_name
from hpo.report.figures.table import FIGURES

if TYPE_CHECKING:
    pass
from hpo.report.html_page import render_html
from hpo.report.images import render_png, render_svg
from hpo.report.json_text import render_json
from hpo.report.markdown import render_markdown
from hpo.report.study_report import StudyReport


def render_report(report: StudyReport, form: str, *, figure: str = "response") -> bytes:
    """The report in one of FORMATS; of an image, `figure` is the one that it shows. Raises UserError."""
    return FORMATS[form](report, figure)


def check_request(form: str, figure: str) -> None:
    """Raises UserError for a format or a figure that there is not."""
    if form not in FORMATS:
        raise unknown_name("--format", form, FORMATS)
    if figure not in FIGURES:
        raise unknown_name("--figure", figure, FIGURES)


FORMATS: dict[str, Callable[[StudyReport, str], bytes]] = {
    "html": render_html,
    "png": render_png,
    "svg": render_svg,
    "md": render_markdown,
    "json": render_json,
}
