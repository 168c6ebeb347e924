"""A report as a page."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hpo.analysis.confirmation import Confirmation
from hpo.analysis.response import CONFIDENCE
from hpo.analysis.text import (
    cell_text,
    interval_text,
    number_text,
    rate_text,
    study_text,
    value_text,
)  # fmt: skip
from hpo.report.figures.style import THEMES, line_colours
from hpo.study.records import StudyRecord

if TYPE_CHECKING:
    from jinja2 import Template
from hpo.report.study_report import MAX_LISTED_TRIALS, StudyReport, provenance_rows, spec_toml, trial_table

MAX_FAILURES = 20  # whose tracebacks are shown
SYMBOLS = {"complete": "●", "pruned": "▼", "diverged": "✕", "failed": "■", "running": "◆", "waiting": "○"}
NUMERIC = ("trial", "epochs", "train_loss", "attempt", "seconds")


def render_html(report: StudyReport, _figure: str) -> bytes:
    scripts = {"plotly": _plotly_js(), "page": _resource("report.js")}
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values()]
    columns, rows = trial_table(report)
    page = _template("report.html.j2").render(
        report=report,
        study=report.study,
        headline=report.answer[0][0].upper() + report.answer[0][1:],
        searched=study_text(report.study),
        key_figures=_key_figures(report),
        columns=columns,
        rows=rows[:MAX_LISTED_TRIALS],
        num_rows=len(rows),
        numeric={*NUMERIC, report.study.spec.metric},
        failures=[trial for trial in report.trials if trial.error][:MAX_FAILURES],
        provenance=provenance_rows(report),
        spec=spec_toml(report.study),
        made=report.made.strftime("%Y-%m-%d %H:%M UTC"),
        scripts=scripts,
        hashes=hashes,
        style=_resource("report.css"),
        data=_embedded(_figures_data(report)),
    )
    return page.encode()


def _figures_data(report: StudyReport) -> dict[str, Any]:
    """What the page's script draws; the labels of trials, which several figures show, are there once."""
    figures: dict[str, Any] = {}
    labels: dict[int, str] = {}
    for entry in report.drawn:
        figure = json.loads(entry.figure.to_json())
        figure["layout"].pop("template")  # the page has one for each theme
        for trace in figure["data"]:
            if trace.get("meta", {}).get("labelled"):
                labels.update(zip(trace["customdata"], trace.pop("text"), strict=True))
        figures[entry.name] = figure
    lines = {theme: line_colours(theme) for theme in THEMES}
    return {"figures": figures, "labels": labels, "themes": THEMES, "lines": lines}


def _embedded(value: Any) -> str:
    """JSON that can stand inside a script element: whatever it holds, it cannot end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _key_figures(report: StudyReport) -> list[tuple[str, str, str]]:
    """(what, its figure, its doubt) of the answer, for the head of the page."""
    study, best = report.study, report.best
    if best is None:
        return []
    if (found := best.response) is None:
        value = (f"best {study.spec.metric}", value_text(best.value, study), f"trial {best.trial}")
        rate = [("best learning rate", cell_text(best.lr), "of those tried")] if best.lr is not None else []
        return [*rate, value]
    value = (f"expected {study.spec.metric}", value_text(found.value, study),
             f"give or take {value_text(found.noise, study)}")  # fmt: skip
    key = [
        ("best learning rate", rate_text(best.lr or found.best), f"plateau {interval_text(found.plateau)}"),
        (f"{CONFIDENCE:.0%} interval", interval_text(found.interval), "holds the best learning rate"),
        *([value] if best.confirmation is None else _confirmed_figures(study, best.confirmation)),
    ]
    if found.divergence_lr is not None:
        key.append(("half diverge at", rate_text(found.divergence_lr.lr), interval_text(found.divergence_lr.interval)))
    return key


def _confirmed_figures(study: StudyRecord, found: Confirmation) -> list[tuple[str, str, str]]:
    error = found.standard_error
    doubt = f"± {value_text(error, study)}, {len(found.winner.values)} fresh seeds" if error is not None else ""
    figures = [(f"confirmed {study.spec.metric}", value_text(found.value, study), doubt)]
    if found.test_value is not None:
        error = found.test_standard_error
        doubt = f"± {value_text(error, study)}" if error is not None else ""
        figures.append(("on the test set", value_text(found.test_value, study), doubt))
    return figures


@cache
def _resource(name: str) -> str:
    return (files("hpo.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _plotly_js() -> str:
    """Plotly for browsers, as it stands inside a script element."""
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs().replace("\r\n", "\n")  # as a browser reads it, which the hash is of
    assert "</script" not in text.lower()
    return text


def _template(name: str) -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(symbols=SYMBOLS, number=number_text)
    return environment.from_string(_resource(name))
