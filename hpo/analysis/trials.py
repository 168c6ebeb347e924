"""Trials as the answer sees them: which of them count, which are alike, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hpo.search.race import course_of
from hpo.search.space import Conditional
from hpo.study.records import ENDED, StudyRecord, TrialRecord

TRAINED = ("complete", "pruned", "diverged")  # final states that say something about a learning rate


def search_trials(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials of the search, without those that confirm or test its result."""
    return [trial for trial in trials if trial.kind == "search"]


def best_trial(study: StudyRecord, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the complete trial of the search with the best value, or None if no trial completed.

    Equal values are common with few validation images. The lower validation loss then wins, and after that the earlier
    trial.
    """
    complete = [trial for trial in search_trials(trials) if trial.state == "complete" and trial.value is not None]
    sign = direction_sign(study)
    return min(complete, key=lambda trial: (-sign * value_of(trial), _last_loss(trial), trial.number), default=None)


def race_progress(study: StudyRecord, trials: Sequence[TrialRecord]) -> tuple[int, int] | None:
    """Return how many epochs a race has trained and its budget; None where it is over, or the sampler is another one.

    Its trials wait for each other: how many of them have ended says nothing of how far it has come.
    """
    course, searched = course_of(study.spec), search_trials(trials)
    if course is None or all(trial.state in ENDED for trial in searched):
        return None
    return sum(max(trial.epochs, default=0) for trial in searched), course.budget


def rate_bounds(study: StudyRecord, trials: Sequence[TrialRecord]) -> tuple[float, float]:
    """Return the lowest and the highest learning rate that these trials had or could have had.

    The trials must be alike in their listed parameters.
    """
    rates = [float(trial.params["lr"]) for trial in trials if has_rate(trial)]
    parameter = study.spec.search.parameters.get("lr")
    if isinstance(parameter, Conditional):
        case = trials[0].params.get(parameter.by)
        parameter = next((values for name, values in parameter.cases.items() if name == str(case)), None)
    bounds = [float(value) for value in parameter.extreme_values() if is_rate(value)] if parameter else []
    return min(rates + bounds), max(rates + bounds)


def direction_sign(study: StudyRecord) -> int:
    """Return 1 if higher values are better in this study, and -1 if lower ones are."""
    return -1 if study.spec.direction == "minimize" else 1


def has_rate(trial: TrialRecord) -> bool:
    """Return whether the trial's `lr` is a learning rate; a user's own loop may call anything `lr`."""
    return is_rate(trial.params.get("lr"))


def is_rate(value: Any) -> bool:
    """Return whether a value can be a learning rate: a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def are_alike(study: StudyRecord, trial: TrialRecord, other: TrialRecord) -> bool:
    """Return whether two trials have the same values of all listed parameters (optimizer, batch size...)."""
    listed_values = study.spec.search.listed_values
    return listed_values(trial.params) == listed_values(other.params)


def value_of(trial: TrialRecord) -> float:
    """Return the value of a trial that has one."""
    assert trial.value is not None
    return trial.value


def _last_loss(trial: TrialRecord) -> float:
    losses = trial.curves.get("val_loss", ())
    return losses[-1] if losses and losses[-1] is not None else math.inf
