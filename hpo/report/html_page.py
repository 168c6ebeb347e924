"""A report as one HTML page that holds all it needs, Plotly too, and asks nothing of any network.

Its Content-Security-Policy forbids requests and lets only the two scripts run whose hashes it names. What comes from
users and from the store (values, metrics, tracebacks) is data in the page, never markup or script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from hpo.analysis.confirmation import Confirmation
from hpo.analysis.response import CONFIDENCE, Response
from hpo.analysis.text import cell_text, interval_text, number_text, rate_text, study_text, value_text
from hpo.report.figures.style import THEMES, line_colours
from hpo.report.study_report import MAX_LISTED_TRIALS, StudyReport, provenance_rows, spec_toml, trial_table
from hpo.study.records import StudyRecord
from hpo.system.readable import one_line, visible

if TYPE_CHECKING:
    from jinja2 import Template

MAX_FAILURES = 20  # failed trials whose tracebacks are shown
SYMBOLS = {"complete": "●", "pruned": "▼", "diverged": "✕", "failed": "■", "running": "◆", "waiting": "○"}
NUMERIC = ("trial", "epochs", "train_loss", "attempt", "seconds")  # columns


def render_html(report: StudyReport, _figure: str) -> bytes:
    """Return the report as an HTML page."""
    scripts = {"plotly": _plotly_js(), "page": _resource("report.js")}
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values()]
    columns, rows = trial_table(report)
    page = _template("report.html.j2").render(
        report=report,
        study=report.study,
        headline=report.answer[0][0].upper() + report.answer[0][1:],
        searched=study_text(report.study),
        key_numbers=_key_numbers(report),
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
        data=_embeddable_json(_script_data(report)),
    )
    return page.encode(errors="backslashreplace")  # half characters are left in the JSON alone, which reads this


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
    lines = {theme: line_colours(theme) for theme in THEMES}
    return {"figures": figures, "labels": labels, "themes": THEMES, "lines": lines}


def _embeddable_json(value: Any) -> str:
    """Return JSON for a script element; no text in it can end that element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# The numbers at the head of the page


class KeyNumber(NamedTuple):
    """A number of the answer with its label and its doubt."""

    label: str
    number: str
    doubt: str


def _key_numbers(report: StudyReport) -> list[KeyNumber]:
    study, best = report.study, report.best
    if best is None:
        return []
    response = best.response
    if response is None:
        value = KeyNumber(f"best {study.spec.metric}", value_text(best.value, study), f"trial {best.trial}")
        if best.lr is None:
            return [value]
        return [KeyNumber("best learning rate", cell_text(best.lr), "of those tried"), value]
    plateau, interval = interval_text(response.plateau), interval_text(response.interval)
    numbers = [
        KeyNumber(
            "best learning rate" if response.is_determined else "best learning rate so far, not determined",
            rate_text(best.lr or response.best),
            f"plateau {plateau}",
        ),
        KeyNumber(f"{CONFIDENCE:.0%} interval", interval, "holds the best learning rate"),
    ]
    if best.confirmation is None:
        numbers.append(_expected_number(study, response))
    else:
        numbers += _confirmed_numbers(study, best.confirmation)
    if response.divergence_lr is not None:
        lr, interval = rate_text(response.divergence_lr.lr), interval_text(response.divergence_lr.interval)
        numbers.append(KeyNumber("half diverge at", lr, interval))
    return numbers


def _expected_number(study: StudyRecord, response: Response) -> KeyNumber:
    doubt = f"give or take {value_text(response.noise, study)}"
    return KeyNumber(f"expected {study.spec.metric}", value_text(response.value, study), doubt)


def _confirmed_numbers(study: StudyRecord, confirmation: Confirmation) -> list[KeyNumber]:
    error = confirmation.standard_error
    seeds = len(confirmation.winner.values)
    doubt = f"± {value_text(error, study)}, {seeds} fresh seeds" if error is not None else ""
    numbers = [KeyNumber(f"confirmed {study.spec.metric}", value_text(confirmation.value, study), doubt)]
    if confirmation.test_value is not None:
        error = confirmation.test_standard_error
        doubt = f"± {value_text(error, study)}" if error is not None else ""
        numbers.append(KeyNumber("on the test set", value_text(confirmation.test_value, study), doubt))
    return numbers


# The files of the page


@cache
def _resource(name: str) -> str:
    return (files("hpo.report") / "templates" / name).read_text(encoding="utf-8")


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
