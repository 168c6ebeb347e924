"""How far a study has come: what its display shows while it trains, in a terminal or in a notebook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hpo.analysis.peak import find_peak
from hpo.analysis.text import metric_value_text, number_text, params_text, peak_text, value_text
from hpo.analysis.trials import best_trial, search_trials
from hpo.search.race import course_of
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.study.stages import latest

MIN_PACE_S = 5.0  # a study whose trials have been watched for less says nothing of the time that is left


@dataclass(frozen=True)
class StudyProgress:
    """What there is to show of a study in training.

    Attributes:
        done: How many trials have ended or, of a race, how many epochs were trained.
        total: How many there are at most, those that confirm included.
        unit: What is counted: "trials" or "epochs".
        columns: What is known of a trial in training.
        rows: The trials in training, a text for each column.
        lines: Sentences on the best trial and on where all of them point.
    """

    done: int
    total: int
    unit: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str]


class Pace:
    """How fast a study trains, by the epochs that were seen to end since the first call."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def seconds_left(self, study: StudyRecord, trials: Sequence[TrialRecord]) -> float | None:
        """Return for about how many seconds the study will train, or None while that cannot be said."""
        now, trained = time.monotonic(), _epochs_trained(trials)
        if self._began is None or trained < self._began[1]:
            self._began = now, trained
        elapsed, gained = now - self._began[0], trained - self._began[1]
        return epochs_left(study, trials) * elapsed / gained if elapsed >= MIN_PACE_S and gained else None


def study_progress(study: StudyRecord, trials: Sequence[TrialRecord]) -> StudyProgress:
    """Return what there is to show of a study."""
    done, total, unit = amount_done(study, trials)
    running = [trial for trial in trials if trial.state == "running"]
    keys = [key for key in dict.fromkeys(key for trial in running for key in trial.params) if key != "lr"]
    has_rate = any("lr" in trial.params for trial in running)
    devices = {trial.attributes["device"] for trial in running if "device" in trial.attributes}
    columns = ["trial", *(["learning rate"] if has_rate else []), *(["values"] if keys else []), "epoch"]
    is_timed = any(trial.curves.get("seconds") for trial in running)
    has_loss = study.spec.has_recipe or any("train_loss" in trial.curves for trial in running)
    columns += [
        *(["loss"] if has_loss else []),
        study.spec.metric,
        *(["time left"] if is_timed else []),
        *(["device"] if len(devices) > 1 else []),
    ]
    rows = [
        [
            str(trial.number),
            *([number_text(trial.params.get("lr", ""))] if has_rate else []),
            *([params_text({key: value for key, value in trial.params.items() if key != "lr"})] if keys else []),
            f"{max(trial.epochs, default=0)}/{num_epochs(study, trial)}",
            *([last_text(study, trial, "train_loss")] if has_loss else []),
            last_text(study, trial, study.spec.metric),
            *([_trial_time_left(study, trial)] if is_timed else []),
            *([str(trial.attributes.get("device", ""))] if len(devices) > 1 else []),
        ]
        for trial in running
    ]
    return StudyProgress(done, total, unit, columns, rows, _sentences(study, trials))


def _sentences(study: StudyRecord, trials: Sequence[TrialRecord]) -> list[str]:
    lines = []
    if (found := best_trial(study, trials)) is not None and found.value is not None:
        value = f"{study.spec.metric} {value_text(found.value, study)}"
        lines.append(f"best trial so far: {params_text(found.params)}, {value}, trial {found.number}")
    where = find_peak(study, trials)
    if where is not None and where.interval is not None:
        lines.append(peak_text(where.lr, where.interval))
    return lines


def amount_done(study: StudyRecord, trials: Sequence[TrialRecord]) -> tuple[int, int, str]:
    """Return how much of a study is done, how much there is at most, and what is counted: always the same."""
    counted, following = [trial for trial in trials if trial.kind != "test"], num_following(study, trials)
    if (course := course_of(study.spec)) is None:
        return sum(trial.state in ENDED for trial in counted), len(counted) + following, "trials"
    confirming = sum(num_epochs(study, trial) for trial in counted if trial.kind == "confirm")
    total = course.budget + confirming + following * study.spec.max_epochs
    is_over = all(trial.state in ENDED for trial in trials)
    return total if is_over and not following else min(_epochs_trained(counted), total), total, "epochs"


def num_following(study: StudyRecord, trials: Sequence[TrialRecord]) -> int:
    """Return how many trials may yet be added to confirm what the search finds."""
    spec, found = study.spec.confirm, latest(trials)
    is_over = any(trial.kind == "test" for trial in found) or (found and all(trial.state in ENDED for trial in found))
    return 0 if spec is None or is_over else max(0, spec.top * spec.seeds - len(found))


def epochs_left(study: StudyRecord, trials: Sequence[TrialRecord]) -> float:
    """Return about how many epochs are left: a trial of the search takes as many as the mean of those that ended."""
    ended = [len(trial.epochs) for trial in search_trials(trials) if trial.state in ENDED and trial.epochs]
    following = float(num_following(study, trials) * study.spec.max_epochs)
    if (course := course_of(study.spec)) is not None:
        searched = search_trials(trials)
        if any(trial.state not in ENDED for trial in searched):
            return max(0, course.budget - _epochs_trained(searched)) + following
    for trial in trials:
        if trial.kind != "test" and trial.state == "running":
            following += num_epochs(study, trial) - len(trial.epochs)
        elif trial.kind != "test" and trial.state == "waiting":
            following += fmean(ended) if ended and trial.kind == "search" else num_epochs(study, trial)
    return following


def _epochs_trained(trials: Sequence[TrialRecord]) -> int:
    return sum(max(trial.epochs, default=0) for trial in trials if trial.kind != "test")


def num_epochs(study: StudyRecord, trial: TrialRecord) -> int:
    """Return how many epochs a trial has when it is not stopped early."""
    return int(trial.params.get("epochs", study.spec.training.epochs))


def last_text(study: StudyRecord, trial: TrialRecord, metric: str) -> str:
    """Return the latest value of one of a trial's curves."""
    values = trial.curves.get(metric, ())
    return "" if not values else "not finite" if values[-1] is None else metric_value_text(values[-1], metric)


def _trial_time_left(study: StudyRecord, trial: TrialRecord) -> str:
    seconds = [value for value in trial.curves.get("seconds", ()) if value is not None]
    return duration_text((num_epochs(study, trial) - len(trial.epochs)) * fmean(seconds)) if seconds else ""


def duration_text(seconds: float) -> str:
    """Return a duration in two digits of the unit that suits it."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
