"""The report of a study: its answer, figures, trials and how it was made, as one HTML page, an image, Markdown or JSON.

The page holds all it needs, Plotly too, and asks nothing of any network: its Content-Security-Policy forbids it. What
comes from users and from the store (values, metrics, tracebacks) is data in it, never markup or script; only the two
scripts whose hashes the policy names may run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from hpo.analysis.answer import Best
from hpo.analysis.confirmation import Confirmation
from hpo.analysis.response import CONFIDENCE
from hpo.analysis.text import (
    answer_lines,
    as_text,
    counts_in_words,
    interval_in_words,
    no_answer,
    number_in_words,
    rate_in_words,
    study_in_words,
    value_in_words,
)  # fmt: skip
from hpo.errors import UserError, unknown_name
from hpo.report.figures import table as figures
from hpo.report.figures.style import THEMES, line_colours, short
from hpo.report.figures.table import FIGURES, Drawn
from hpo.study.records import ENDED, StudyRecord, TrialRecord, trial_as_dict
from hpo.system import provenance

if TYPE_CHECKING:
    from jinja2 import Template

MARK = "<!-- hpo report -->"
# How reports of ours begin or, those that are images, end: they alone may be written over. Anywhere inside, the words
# prove nothing: a database of studies holds them too, in the notes for optuna-dashboard.
BEGINS = (f"<!doctype html>\n{MARK}\n".encode(), f"{MARK}\n# Study ".encode(), b'{\n "what": "hpo report of study ')
PNG_TEXT = b"tEXtSoftware\0hpo report"
MOST_ROWS = 2000  # of the page's table of trials, and of Markdown's
MOST_FAILURES = 20  # whose tracebacks are shown
IMAGE_WIDTH = 900  # pixels; a PNG has twice as many
SYMBOLS = {"complete": "●", "pruned": "▼", "diverged": "✕", "failed": "■", "running": "◆", "waiting": "○"}
NUMERIC = ("trial", "epochs", "train_loss", "attempt", "seconds")


@dataclass(frozen=True)
class StudyReport:
    """A study at a moment. `drawn` are the figures that were asked for and have something to show."""

    study: StudyRecord
    trials: Sequence[TrialRecord]
    best: Best | None
    storage: str
    made: datetime
    drawn: Sequence[Drawn]

    @property
    def answer(self) -> list[str]:
        """The answer's sentences, without the warnings."""
        if self.best is None:
            return [no_answer(self.trials)]
        lines = answer_lines(self.study, self.best)
        return lines[: len(lines) - len(self.best.warnings)]

    @property
    def warnings(self) -> list[str]:
        found = [warning.text for warning in self.best.warnings] if self.best else []
        if left := sum(trial.state not in ENDED for trial in self.trials):
            found.append(f"the study is not finished: {left} of {len(self.trials)} trials are left")
        return found

    @property
    def counts(self) -> str:
        return counts_in_words(self.trials)


def make(
    study: StudyRecord,
    trials: Sequence[TrialRecord],
    best: Best | None,
    *,
    storage: str,
    names: Sequence[str] = tuple(FIGURES),
) -> StudyReport:
    """The report of these trials, with the figures of these names; `best` is their answer."""
    drawn = figures.draw(figures.findings(study, trials, best), names)
    return StudyReport(study, trials, best, storage, datetime.now(UTC), drawn)


def render(report: StudyReport, form: str, *, figure: str = "response") -> bytes:
    """The report in one of FORMATS; of an image, `figure` is the one that it shows. Raises UserError."""
    return FORMATS[form](report, figure)


def check_request(form: str, figure: str) -> None:
    """Raises UserError for a format or a figure that there is not."""
    if form not in FORMATS:
        raise unknown_name("--format", form, FORMATS)
    if figure not in FIGURES:
        raise unknown_name("--figure", figure, FIGURES)


def write(path: Path, content: bytes) -> None:
    """Puts a report there, all of it or nothing. Raises UserError where there is no report of ours."""
    try:
        path = path.resolve()  # what a link leads to is replaced, not the link
        if path.exists() and not is_ours(path.read_bytes()):
            raise UserError(f"--output {path} exists and is no report of ours; name another file")
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(aside, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def is_ours(content: bytes) -> bool:
    """Whether a file is a report that `render` made."""
    is_svg = content.startswith(b"<svg") and content.endswith(f"{MARK}\n".encode())
    is_png = content.startswith(b"\x89PNG") and content[:-16].endswith(PNG_TEXT)  # before its checksum and IEND
    return content.startswith(BEGINS) or is_svg or is_png


# The page


def _html(report: StudyReport, _figure: str) -> bytes:
    scripts = {"plotly": _plotly_js(), "page": _resource("report.js")}
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values()]
    columns, rows = _table(report)
    page = _template("report.html.j2").render(
        report=report,
        study=report.study,
        headline=report.answer[0][0].upper() + report.answer[0][1:],
        searched=study_in_words(report.study),
        key_figures=_key_figures(report),
        columns=columns,
        rows=rows[:MOST_ROWS],
        num_rows=len(rows),
        numeric={*NUMERIC, report.study.spec.metric},
        failures=[trial for trial in report.trials if trial.error][:MOST_FAILURES],
        provenance=_provenance(report),
        spec=_spec(report.study),
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
        value = (f"best {study.spec.metric}", value_in_words(best.value, study), f"trial {best.trial}")
        rate = [("best learning rate", as_text(best.lr), "of those tried")] if best.lr is not None else []
        return [*rate, value]
    value = (f"expected {study.spec.metric}", value_in_words(found.value, study),
             f"give or take {value_in_words(found.noise, study)}")  # fmt: skip
    key = [
        ("best learning rate", rate_in_words(best.lr or found.best), f"plateau {interval_in_words(found.plateau)}"),
        (f"{CONFIDENCE:.0%} interval", interval_in_words(found.interval), "holds the best learning rate"),
        *([value] if best.confirmation is None else _confirmed_figures(study, best.confirmation)),
    ]
    if found.edge is not None:
        key.append(("half diverge at", rate_in_words(found.edge.lr), interval_in_words(found.edge.interval)))
    return key


def _confirmed_figures(study: StudyRecord, found: Confirmation) -> list[tuple[str, str, str]]:
    error = found.standard_error
    doubt = f"± {value_in_words(error, study)}, {len(found.winner.values)} fresh seeds" if error is not None else ""
    figures = [(f"confirmed {study.spec.metric}", value_in_words(found.value, study), doubt)]
    if found.test_value is not None:
        error = found.test_standard_error
        doubt = f"± {value_in_words(error, study)}" if error is not None else ""
        figures.append(("on the test set", value_in_words(found.test_value, study), doubt))
    return figures


def _table(report: StudyReport) -> tuple[list[str], list[tuple[TrialRecord, list[tuple[str, Any]]]]]:
    """Its columns, and for each trial its cells: what is shown, and what it is sorted by; the best ones first where
    there are more than fit."""
    study = report.study
    keys = list(dict.fromkeys(key for trial in report.trials for key in trial.params))
    trials = list(report.trials)
    if len(trials) > MOST_ROWS:
        sign = -1 if study.spec.direction == "maximize" else 1
        trials.sort(key=lambda trial: (trial.value is None, sign * (trial.value or 0)))
    columns = ["trial", "state", "kind", *keys, study.spec.metric]
    columns += ["epochs", "train_loss", "attempt", "seconds", "device", "why it ended"]
    rows = []
    for trial in trials:
        losses = [loss for loss in trial.curves.get("train_loss", ()) if loss is not None]
        seconds = trial.ended - trial.started if trial.ended and trial.started else None
        cells: list[tuple[str, Any]] = [(str(trial.number), trial.number), (trial.state, trial.state)]
        cells += [(trial.kind, trial.kind)]
        cells += [(as_text(trial.params.get(key)), trial.params.get(key, "")) for key in keys]
        cells += [
            ("" if trial.value is None else value_in_words(trial.value, study), trial.value),
            (str(len(trial.epochs)), len(trial.epochs)),
            (f"{losses[-1]:.4g}" if losses else "", losses[-1] if losses else None),
            (str(trial.attempt), trial.attempt),
            ("" if seconds is None else f"{seconds:.1f}", seconds),
            *[(place, place) for place in [_place(trial.attributes)]],
            (trial.reason or "", trial.reason or ""),
        ]
        rows.append((trial, [(shown, short(key, 6) if isinstance(key, float) else key) for shown, key in cells]))
    return columns, rows


def _place(attributes: Mapping[str, Any]) -> str:
    return f"{attributes.get('host', '')} {attributes.get('device', '')}".strip()


def _provenance(report: StudyReport) -> list[tuple[str, str]]:
    """How the study and its report were made, (what, how)."""
    study, spec = report.study, report.study.spec
    known = [{"git_revision": None, **trial.attributes} for trial in report.trials if trial.attributes]
    attempts = [attempt for trial in report.trials for attempt in trial.attempts]
    workers = {attempt.worker_id for attempt in attempts}
    times = [time for attempt in attempts for time in (attempt.began, attempt.ended) if time]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in some["versions"].items())
        for some in known if some.get("versions")
    )  # fmt: skip
    found = {
        "study": f"{study.name}, {study_in_words(study)}",
        "trials": report.counts,
        "seeds": f"search {spec.search.seed}, training {spec.training.seed}, split {spec.data.split_seed}; each "
        "trial's own is in hpo trials --json",
        "trained": " to ".join(_moment(time) for time in (min(times), max(times))) if times else "",
        "machines": "; ".join(dict.fromkeys(place for some in known if (place := _place(some)))),
        "attempts": f"{len(attempts)} by {len(workers)} workers" if attempts else "",
        "git revision": "; ".join(dict.fromkeys(str(some["git_revision"]) for some in known if some["git_revision"])),
        "versions": "; ".join(versions),
        "store": report.storage,
        "report": f"hpo {provenance.versions().get('hpo', '')}, {report.made.isoformat(timespec='seconds')}",
    }  # fmt: skip
    return [(what, how) for what, how in found.items() if how]


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _spec(study: StudyRecord) -> str:
    return tomli_w.dumps(study.spec.frozen())


# The other formats


def _markdown(report: StudyReport, _figure: str) -> bytes:
    lines = [MARK, f"# Study {_plain(report.study.name)}", "", *markdown_answer(report), ""]
    for entry in report.drawn:
        lines += [f"## {entry.title}", "", _plain(entry.text), ""]
    columns, rows = _table(report)
    lines += ["## Trials", "", f"{report.counts}.", ""]
    if len(rows) > MOST_ROWS:
        lines += [f"The best {MOST_ROWS} of {len(rows)}:", ""]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_row([shown for shown, _ in cells]) for _, cells in rows[:MOST_ROWS]]
    lines += ["", "## How it was made", "", *(f"- {what}: {_plain(how)}" for what, how in _provenance(report)), ""]
    lines += ["```toml", _spec(report.study).strip().replace("```", "'''"), "```", ""]
    return "\n".join(lines).encode()


def markdown_answer(report: StudyReport) -> list[str]:
    """The answer and its warnings as lines of Markdown."""
    first, *others = map(_plain, report.answer)
    return [f"**{first}**", "", *(f"- {line}" for line in others), *(f"- beware: {_plain(w)}" for w in report.warnings)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = " ".join(text.split())
    for character in "\\`*[]<>|":
        text = text.replace(character, f"\\{character}")
    return text


def _json(report: StudyReport, _figure: str) -> bytes:
    found = report.best
    answer = found.as_dict() if found else {"trial": None, "warnings": []}
    curves = [{"params": dict(params), **asdict(curve)} for params, curve in found.responses] if found else []
    told = {
        "what": f"hpo report of study {report.study.name}",
        "study": report.study.name,
        "answer": report.answer,
        **answer,
        "responses": curves,
        "figures": {entry.name: entry.text for entry in report.drawn},
        "trials": [trial_as_dict(trial) for trial in report.trials],
        "facts": dict(report.study.facts),
        "provenance": dict(_provenance(report)),
        "spec": report.study.spec.frozen(),
    }
    return (json.dumps(told, indent=1, allow_nan=False) + "\n").encode()


def _png(report: StudyReport, figure: str) -> bytes:
    image = _image(report, "png", figure)
    chunk = struct.pack(">I", len(PNG_TEXT) - 4) + PNG_TEXT + struct.pack(">I", zlib.crc32(PNG_TEXT))
    end = image.rindex(b"IEND") - 4
    return image[:end] + chunk + image[end:]


def _svg(report: StudyReport, figure: str) -> bytes:
    return _image(report, "svg", figure).rstrip() + f"\n{MARK}\n".encode()


def _image(report: StudyReport, form: str, name: str) -> bytes:
    """A figure on white, drawn by kaleido in a Chromium of this machine, which asks nothing of a network."""
    entry = next((entry for entry in report.drawn if entry.name == name), None)
    if entry is None:
        shown = ", ".join(drawn.name for drawn in report.drawn) or "none"
        raise UserError(f"--figure {name} has nothing to show in study {report.study.name!r}; there are: {shown}")
    try:
        import kaleido
    except ImportError:
        raise UserError(f"--format {form} needs the package kaleido: pip install 'hpo-studies[images]'") from None
    import plotly

    figure = entry.figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    options = {"format": form, "width": IMAGE_WIDTH, "height": figure.layout.height, "scale": 2 if form == "png" else 1}
    plotly_js = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    try:
        # MathJax would be fetched from a network.
        image = kaleido.calc_fig_sync(figure, opts=options, kopts={"mathjax": False, "plotlyjs": plotly_js})
    except Exception as error:  # of several packages; whatever it is, no image can be drawn on this machine
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--format {form} needs a Chrome or Chromium that starts on this machine: {said}") from None
    return bytes(image)


FORMATS: dict[str, Callable[[StudyReport, str], bytes]] = {
    "html": _html,
    "png": _png,
    "svg": _svg,
    "md": _markdown,
    "json": _json,
}


# What the page is made of


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
    environment.globals.update(symbols=SYMBOLS, number=number_in_words)
    return environment.from_string(_resource(name))
