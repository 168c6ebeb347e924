"""The peak: the learning rate that the trials of a study point to, also while they are still in training.

It comes from the same response as the answer: what the end of training may bring, from the curves so far.
`make bench-search` measures how soon it is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.analysis.answer import find_response
from hpo.analysis.response import Response
from hpo.analysis.trials import are_alike, direction_sign, has_rate, search_trials
from hpo.study.records import StudyRecord, TrialRecord

NUM_COMPARED = 5  # trials are compared after the largest number of epochs that so many of them have reached
AVERAGED_EPOCHS = 3  # one epoch's accuracy is noisy


@dataclass(frozen=True)
class Peak:
    """The learning rate that the trials point to.

    Attributes:
        lr: The best learning rate by the response to it, else that of the best trial.
        epochs: After how many epochs trials were compared to find the best of them.
        fitted: There is a response.
        interval: The learning rates between which the best one lies, by the response; None without one.
    """

    lr: float
    epochs: int
    fitted: bool
    interval: tuple[float, float] | None = None


def find_peak(
    study: StudyRecord, trials: Sequence[TrialRecord], *, responses: Iterable[tuple[Any, Response]] = ()
) -> Peak | None:
    """Return where the trials point so far, whether they have ended or not.

    Trials are compared after as many epochs as NUM_COMPARED of them have reached. Each counts with its mean over the
    last AVERAGED_EPOCHS of these. The response is that of the trials which share the listed parameters of the best one.

    Args:
        study: The study.
        trials: Its trials.
        responses: Those of `find_best`, by listed parameters, if it was asked already: to fit one takes seconds.

    Returns:
        The peak, or None if no learning rate above 0 is searched, or no trial has reported yet.
    """
    values, epoch = _values_at_equal_epochs(study, trials)
    known = [trial for trial in trials if math.isfinite(values.get(trial.number, math.nan))]
    if not known:
        return None
    leader = max(known, key=lambda trial: values[trial.number])
    listed = study.spec.search.listed_values(leader.params)
    response = next((response for combination, response in responses if combination == listed), None)
    response = response or find_response(
        study, [trial for trial in search_trials(trials) if are_alike(study, trial, leader)]
    )
    if response is None:
        return Peak(float(leader.params["lr"]), epoch, fitted=False)
    return Peak(response.best, epoch, fitted=True, interval=response.interval)


def _values_at_equal_epochs(study: StudyRecord, trials: Sequence[TrialRecord]) -> tuple[dict[int, float], int]:
    """Return the value of each comparable trial by its number, higher is better, and the epoch of the comparison."""
    import numpy as np

    sign = direction_sign(study)
    curves = {
        trial.number: [math.nan if value is None else sign * value for value in trial.curves[study.spec.metric]]
        for trial in search_trials(trials)
        if has_rate(trial) and trial.state != "failed" and trial.curves.get(study.spec.metric)
    }
    if not curves:
        return {}, 0
    lengths = sorted(map(len, curves.values()), reverse=True)
    epoch = lengths[min(NUM_COMPARED, len(lengths)) - 1]
    with np.errstate(over="ignore"):
        values = {
            number: float(np.mean(curve[max(0, epoch - AVERAGED_EPOCHS) : epoch]))
            for number, curve in curves.items()
            if len(curve) >= epoch
        }
    return values, epoch
