"""Which trials of a study count for its answer, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hpo.search.space import Conditional
from hpo.study.records import StudyRecord, TrialRecord

TRAINED = ("complete", "pruned", "diverged")


def search_trials(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Without those that confirm what was found."""
    return [trial for trial in trials if trial.kind == "search"]


def best_trial(study: StudyRecord, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The complete trial with the best value, or None where no trial completed.

    Equal values are common with few validation pictures: then the lower validation loss wins, then the earlier trial.
    """
    complete = [trial for trial in search_trials(trials) if trial.state == "complete" and trial.value is not None]
    sign = direction_sign(study)
    return min(complete, key=lambda trial: (-sign * value_of(trial), _last_loss(trial), trial.number), default=None)


def rate_bounds(study: StudyRecord, trials: Sequence[TrialRecord]) -> tuple[float, float]:
    """The lowest and the highest learning rate that these trials, which are alike, could have or had."""
    rates = [float(trial.params["lr"]) for trial in trials if has_rate(trial)]
    parameter = study.spec.search.parameters.get("lr")
    if isinstance(parameter, Conditional):
        case = trials[0].params.get(parameter.by)
        parameter = next((values for name, values in parameter.cases.items() if name == str(case)), None)
    bounds = [float(value) for value in parameter.extreme_values() if is_rate(value)] if parameter else []
    return min(rates + bounds), max(rates + bounds)


def direction_sign(study: StudyRecord) -> int:
    return -1 if study.spec.direction == "minimize" else 1


def has_rate(trial: TrialRecord) -> bool:
    """A loop of the user's may call anything `lr`."""
    return is_rate(trial.params.get("lr"))


def is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_comparable(study: StudyRecord, trial: TrialRecord, winner: TrialRecord) -> bool:
    return has_rate(trial) and trial.state in TRAINED and are_alike(study, trial, winner)


def are_alike(study: StudyRecord, trial: TrialRecord, winner: TrialRecord) -> bool:
    listed = study.spec.search.listed_values
    return listed(trial.params) == listed(winner.params)


def standard_error(accuracy: float, num_pictures: int) -> float:
    """Of an accuracy measured on so many pictures, by Agresti and Coull (1998), who do not call 100 % certain."""
    count = num_pictures + 4
    share = (accuracy * num_pictures + 2) / count
    return math.sqrt(share * (1 - share) / count)


def value_of(trial: TrialRecord) -> float:
    assert trial.value is not None
    return trial.value


def _last_loss(trial: TrialRecord) -> float:
    losses = trial.curves.get("val_loss", ())
    return losses[-1] if losses and losses[-1] is not None else math.inf
