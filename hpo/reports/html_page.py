"""A report as one HTML page that holds all it needs, Plotly too, and asks nothing of any network.

Its Content-Security-Policy forbids requests and lets only the two scripts run whose hashes it names. What comes from
users and from the store (values, metrics, tracebacks) is data in the page, never markup or script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hpo.analysis.text import number_text, study_text
from hpo.reports.figures.style import THEMES, line_colours
from hpo.reports.study_report import MAX_LISTED_TRIALS, StudyReport, TableCell, provenance_rows, spec_toml, trial_table
from hpo.system.readable import one_line, visible

if TYPE_CHECKING:
    from jinja2 import Template

MAX_FAILURES = 20  # failed trials whose tracebacks are shown
SYMBOLS = {"complete": "●", "pruned": "▼", "diverged": "✕", "failed": "■", "running": "◆", "waiting": "○"}


def render_html(report: StudyReport, _figure: str) -> bytes:
    """Return the report as an HTML page."""
    scripts = {"plotly": _plotly_js(), "page": _resource("report.js")}
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values()]
    columns, rows, table_text = trial_table(report)
    page = _template("report.html.j2").render(
        report=report,
        study=report.study,
        headline=report.answer.headline[0].upper() + report.answer.headline[1:],
        searched=study_text(report.study),
        columns=columns,
        rows=rows[:MAX_LISTED_TRIALS],
        num_rows=len(rows),
        table_text=table_text,
        numeric={name for index, name in enumerate(columns) if _has_number(row.cells[index] for row in rows)},
        failures=[trial for trial in report.trials if trial.error][:MAX_FAILURES],
        provenance=provenance_rows(report),
        spec=spec_toml(report.study),
        made=report.made.strftime("%Y-%m-%d %H:%M UTC"),
        scripts=scripts,
        hashes=hashes,
        style=_resource("report.css"),
        data=_embeddable_json(_script_data(report)),
    )
    return page.encode(errors="backslashreplace")  # half characters are left in the JSON alone, which reads this


def _has_number(cells: Iterable[TableCell]) -> bool:
    return any(isinstance(cell.key, int | float) for cell in cells)


# The data of the page's script


def _script_data(report: StudyReport) -> dict[str, Any]:
    """Return what the page's script draws; labels of trials, which several figures show, are in it only once."""
    figures: dict[str, Any] = {}
    labels: dict[int, str] = {}
    for drawn in report.figures:
        figure = json.loads(drawn.figure.to_json())
        figure["layout"].pop("template")  # the page has one for each theme
        for trace in figure["data"]:
            if trace.get("meta", {}).get("labelled"):
                labels.update(zip(trace["customdata"], trace.pop("text"), strict=True))
        figures[drawn.name] = figure
    lines = {name: line_colours(theme) for name, theme in THEMES.items()}
    return {"figures": figures, "labels": labels, "themes": THEMES, "lines": lines}


def _embeddable_json(value: Any) -> str:
    """Return JSON for a script element; no text in it can end that element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# The files of the page


@cache
def _resource(name: str) -> str:
    return (files("hpo.reports") / "templates" / name).read_text(encoding="utf-8")


@cache
def _plotly_js() -> str:
    """Return Plotly for browsers, fit for a script element."""
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs().replace("\r\n", "\n")  # as a browser reads it: the hash is of that
    assert "</script" not in text.lower()
    return text


def _template(name: str) -> Template:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.globals.update(symbols=SYMBOLS, number=number_text)
    environment.filters["lines"] = lambda text: Markup(escape(visible(text)))
    return environment.from_string(_resource(name))


def _shown(value: Any) -> Any:
    """Return a value as the page shows it: what is no markup yet on one line, without control characters."""
    return one_line(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
