"""A study at a moment: its answer, warnings, figures, table of trials and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import tomli_w

from hpo.analysis.answer import Best
from hpo.analysis.text import (
    answer_lines,
    cell_text,
    counts_text,
    no_answer_text,
    study_text,
    value_text,
)  # fmt: skip
from hpo.report.figures import table as figures
from hpo.report.figures.style import round_digits
from hpo.report.figures.table import FIGURES, DrawnFigure
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.system import provenance

if TYPE_CHECKING:
    pass


MAX_LISTED_TRIALS = 2000  # of the page's table of trials, and of Markdown's


@dataclass(frozen=True)
class StudyReport:
    """A study at a moment. `drawn` are the figures that were asked for and have something to show."""

    study: StudyRecord
    trials: Sequence[TrialRecord]
    best: Best | None
    storage: str
    made: datetime
    drawn: Sequence[DrawnFigure]

    @property
    def answer(self) -> list[str]:
        """The answer's sentences, without the warnings."""
        if self.best is None:
            return [no_answer_text(self.trials)]
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
        return counts_text(self.trials)


def make_report(
    study: StudyRecord,
    trials: Sequence[TrialRecord],
    best: Best | None,
    *,
    storage: str,
    names: Sequence[str] = tuple(FIGURES),
) -> StudyReport:
    """The report of these trials, with the figures of these names; `best` is their answer."""
    drawn = figures.draw_figures(figures.make_figure_data(study, trials, best), names)
    return StudyReport(study, trials, best, storage, datetime.now(UTC), drawn)


def trial_table(report: StudyReport) -> tuple[list[str], list[tuple[TrialRecord, list[tuple[str, Any]]]]]:
    """Its columns, and for each trial its cells: what is shown, and what it is sorted by; the best ones first where
    there are more than fit."""
    study = report.study
    keys = list(dict.fromkeys(key for trial in report.trials for key in trial.params))
    trials = list(report.trials)
    if len(trials) > MAX_LISTED_TRIALS:
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
        cells += [(cell_text(trial.params.get(key)), trial.params.get(key, "")) for key in keys]
        cells += [
            ("" if trial.value is None else value_text(trial.value, study), trial.value),
            (str(len(trial.epochs)), len(trial.epochs)),
            (f"{losses[-1]:.4g}" if losses else "", losses[-1] if losses else None),
            (str(trial.attempt), trial.attempt),
            ("" if seconds is None else f"{seconds:.1f}", seconds),
            *[(place, place) for place in [_machine(trial.attributes)]],
            (trial.reason or "", trial.reason or ""),
        ]
        rows.append((trial, [(shown, round_digits(key, 6) if isinstance(key, float) else key) for shown, key in cells]))
    return columns, rows


def _machine(attributes: Mapping[str, Any]) -> str:
    return f"{attributes.get('host', '')} {attributes.get('device', '')}".strip()


def provenance_rows(report: StudyReport) -> list[tuple[str, str]]:
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
        "study": f"{study.name}, {study_text(study)}",
        "trials": report.counts,
        "seeds": f"search {spec.search.seed}, training {spec.training.seed}, split {spec.data.split_seed}; each "
        "trial's own is in hpo trials --json",
        "trained": " to ".join(_utc_text(time) for time in (min(times), max(times))) if times else "",
        "machines": "; ".join(dict.fromkeys(place for some in known if (place := _machine(some)))),
        "attempts": f"{len(attempts)} by {len(workers)} workers" if attempts else "",
        "git revision": "; ".join(dict.fromkeys(str(some["git_revision"]) for some in known if some["git_revision"])),
        "versions": "; ".join(versions),
        "store": report.storage,
        "report": f"hpo {provenance.versions().get('hpo', '')}, {report.made.isoformat(timespec='seconds')}",
    }  # fmt: skip
    return [(what, how) for what, how in found.items() if how]


def _utc_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def spec_toml(study: StudyRecord) -> str:
    return tomli_w.dumps(study.spec.frozen())
