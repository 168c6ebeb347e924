"""What a report shows of a study at one moment: its answer, warnings, figures, table of trials and provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import tomli_w

from hpo.analysis.answer import Best
from hpo.analysis.answer_text import AnswerText, describe_answer
from hpo.analysis.confirmation import find_test_metric
from hpo.analysis.text import (
    cell_text,
    marked_text,
    metric_value_text,
    no_answer_text,
    plural,
    study_text,
    trials_text,
    value_text,
)
from hpo.reports.figures.style import round_digits
from hpo.reports.figures.table import FIGURES, DrawnFigure, draw_figures, make_figure_data
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.system import provenance

MAX_LISTED_TRIALS = 2000  # in the table of the page and of Markdown
SAID_ONCE = ("kind", "attempt", "device")  # columns in which trials are often alike


@dataclass(frozen=True)
class StudyReport:
    """A study at one moment. `figures` are those that were asked for and have something to show."""

    study: StudyRecord
    trials: Sequence[TrialRecord]
    best: Best | None
    storage: str
    made: datetime
    figures: Sequence[DrawnFigure]

    @cached_property
    def answer(self) -> AnswerText:
        """The answer in words, with one more warning if the study is not finished."""
        if self.best is None:
            text = AnswerText(no_answer_text(self.trials), [], [], [])
        else:
            text = describe_answer(self.study, self.best)
        left = sum(trial.state not in ENDED for trial in self.trials)
        verb = "is" if left == 1 else "are"
        is_left = f"the study is not finished: {left} of {plural(len(self.trials), 'trial')} {verb} left"
        unfinished = [is_left] if left else []
        return replace(text, warnings=[*text.warnings, *unfinished])

    @cached_property
    def marked(self) -> set[int]:
        """The numbers of the trials that have the recommended values."""
        best = self.best
        return {trial.number for trial in self.trials if best is not None and best.is_recommended(trial.params)}

    @property
    def marked_text(self) -> str:
        """Which trials of the table are marked, empty without an answer."""
        return marked_text(self.best.recommended, len(self.marked)) if self.best else ""

    @property
    def counts(self) -> str:
        """How many trials are in each state."""
        return trials_text(self.study, self.trials)


def make_report(
    study: StudyRecord,
    trials: Sequence[TrialRecord],
    best: Best | None,
    *,
    storage: str,
    names: Sequence[str] = tuple(FIGURES),
) -> StudyReport:
    """Return the report of a study with these trials and this answer, with the figures of these names."""
    figures = draw_figures(make_figure_data(study, trials, best), names)
    return StudyReport(study, trials, best, storage, datetime.now(UTC), figures)


# The table of trials


class TableCell(NamedTuple):
    """A cell of the table: the text that is shown, and the key that its column is sorted by."""

    text: str
    key: Any


class TableRow(NamedTuple):
    """A trial and its cells, one for each column."""

    trial: TrialRecord
    cells: list[TableCell]


class TrialTable(NamedTuple):
    """The names of the columns, a row for each trial, and what is said of all trials."""

    columns: list[str]
    rows: list[TableRow]
    text: str


def trial_table(report: StudyReport) -> TrialTable:
    """Return the table of trials. If there are more than MAX_LISTED_TRIALS, the best ones come first.

    Columns without any text are left out, and those of SAID_ONCE in which all trials are alike: the text says these.
    """
    study = report.study
    keys = list(dict.fromkeys(key for trial in report.trials for key in trial.params))
    trials = list(report.trials)
    if len(trials) > MAX_LISTED_TRIALS:
        sign = -1 if study.spec.direction == "maximize" else 1
        trials.sort(key=lambda trial: (trial.value is None, sign * (trial.value or 0)))
    tests = [trial for trial in trials if trial.kind == "test" and trial.state == "complete"]
    test_metric = find_test_metric(study, tests)
    columns = ["trial", "state", "kind", *keys, study.spec.metric, test_metric]
    columns += ["epochs", "train_loss", "attempt", "seconds", "device", "why it ended"]
    table = [[_rounded(cell) for cell in _cells(study, trial, keys, test_metric=test_metric)] for trial in trials]
    texts = {name: {row[index].text for row in table} for index, name in enumerate(columns)}
    alike = {name: next(iter(texts[name])) for name in SAID_ONCE if len(texts[name]) == 1 < len(table)}
    shown = [index for index, name in enumerate(columns) if name not in alike and texts[name] != {""}]
    of_all = ", ".join(f"{name} {text}" for name, text in alike.items() if text)
    said = [report.counts, report.marked_text, f"all have {of_all}" if of_all else ""]
    return TrialTable(
        [columns[index] for index in shown],
        [TableRow(trial, [row[index] for index in shown]) for trial, row in zip(trials, table, strict=True)],
        f"{'; '.join(text for text in said if text)}.",
    )


def _cells(study: StudyRecord, trial: TrialRecord, keys: Sequence[str], *, test_metric: str) -> Iterator[TableCell]:
    tested = trial.curves.get(test_metric, ())[-1:] if trial.kind == "test" else ()
    losses = [loss for loss in trial.curves.get("train_loss", ()) if loss is not None]
    seconds = trial.duration_s
    machine, reason = _machine(trial.attributes), trial.reason or ""
    yield TableCell(str(trial.number), trial.number)
    yield TableCell(trial.state, trial.state)
    yield TableCell(trial.kind, trial.kind)
    for key in keys:
        yield TableCell(cell_text(trial.params.get(key)), trial.params.get(key, ""))
    yield TableCell("" if trial.value is None else value_text(trial.value, study), trial.value)
    if tested and tested[0] is not None:
        yield TableCell(metric_value_text(tested[0], test_metric), tested[0])
    else:
        yield TableCell("", None)
    yield TableCell(str(len(trial.epochs)), len(trial.epochs))
    yield TableCell(f"{losses[-1]:.4g}" if losses else "", losses[-1] if losses else None)
    yield TableCell(str(trial.attempt), trial.attempt)
    yield TableCell("" if seconds is None else f"{seconds:.1f}", seconds)
    yield TableCell(machine, machine)
    yield TableCell(reason, reason)


def _rounded(cell: TableCell) -> TableCell:
    return TableCell(cell.text, round_digits(cell.key, 6)) if isinstance(cell.key, float) else cell


# How it was made


def provenance_rows(report: StudyReport) -> list[tuple[str, str]]:
    """Return how the study and its report were made, as (what, how)."""
    study, spec = report.study, report.study.spec
    attributes = [trial.attributes for trial in report.trials if trial.attributes]
    attempts = [attempt for trial in report.trials for attempt in trial.attempts]
    workers = {attempt.worker_id for attempt in attempts}
    times = [time for attempt in attempts for time in (attempt.began, attempt.ended) if time]
    versions = [
        ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        for known in attributes
        if known.get("versions")
    ]
    revisions = [str(known["git_revision"]) for known in attributes if known.get("git_revision")]
    rows = {
        "study": f"{study.name}, {study_text(study)}",
        "trials": report.counts,
        "seeds": f"search {spec.search.seed}, training {spec.training.seed}, split {spec.data.split_seed}; each "
        "trial's own is in hpo trials --json",
        "trained": f"{_utc_text(min(times))} to {_utc_text(max(times))}" if times else "",
        "machines": _listed_once([machine for known in attributes if (machine := _machine(known))]),
        "CPU threads": _listed_once([str(known["threads"]) for known in attributes if known.get("threads")]),
        "attempts": f"{len(attempts)} by {plural(len(workers), 'worker')}" if attempts else "",
        "git revision": _listed_once(revisions),
        "versions": _listed_once(versions),
        "store": report.storage,
        "report": f"hpo {provenance.versions().get('hpo', '')}, {report.made.isoformat(timespec='seconds')}",
    }
    return [(what, how) for what, how in rows.items() if how]


def spec_toml(study: StudyRecord) -> str:
    """Return the study file of a study, with every default."""
    return tomli_w.dumps(study.spec.frozen())


def _machine(attributes: Mapping[str, Any]) -> str:
    return f"{attributes.get('host', '')} {attributes.get('device', '')}".strip()


def _listed_once(texts: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _utc_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
