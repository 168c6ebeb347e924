"""The peak: the learning rate that the trials of a study point to, also while they are still in training.

The best trial alone is the luckiest one; the others say where the top of the response is. So a parabola in log lr is
fitted by least squares to the trials around the best one (a response surface: Box and Wilson, J. Royal Statistical
Society B 13, 1951). After few epochs the peak says where to look, and not what will win. `make bench-search` measures
how soon it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.analysis.trials import are_alike, direction_sign, has_rate, search_trials
from hpo.study.records import StudyRecord, TrialRecord

NUM_COMPARED = 5  # trials are compared after the largest number of epochs that so many of them have reached
AVERAGED_EPOCHS = 3  # one epoch's accuracy is noisy
FITTED_DECADES = 1.0  # on either side of the best trial; over more, the response is no parabola
MIN_PARABOLA_RATES = 4  # different learning rates; a parabola always fits three


@dataclass(frozen=True)
class Peak:
    """The learning rate that the trials point to, compared after `epochs`; not `fitted`: that of the best trial."""

    lr: float
    epochs: int
    fitted: bool


def find_peak(study: StudyRecord, trials: Sequence[TrialRecord]) -> Peak | None:
    """Return where the trials point so far, whether they have ended or not.

    Trials are compared after as many epochs as NUM_COMPARED of them have reached. Each counts with its mean over the
    last AVERAGED_EPOCHS of these. The parabola is fitted to the trials within FITTED_DECADES of the best one that share
    its listed parameters, and the peak is its top, within the tried learning rates. If it has no top, or there are
    fewer than MIN_PARABOLA_RATES, the peak is the best trial's learning rate.

    Returns:
        The peak, or None if no learning rate above 0 is searched, or no trial has reported yet.
    """
    import numpy as np

    values, epoch = _values_at_equal_epochs(study, trials)
    known = [trial for trial in trials if math.isfinite(values.get(trial.number, math.nan))]
    if not known:
        return None
    leader = max(known, key=lambda trial: values[trial.number])
    best_rate = float(leader.params["lr"])
    fitted = [
        trial
        for trial in known
        if are_alike(study, trial, leader) and abs(math.log10(trial.params["lr"] / best_rate)) <= FITTED_DECADES
    ]
    x = np.log10([trial.params["lr"] for trial in fitted])
    if len(set(x)) < MIN_PARABOLA_RATES:
        return Peak(best_rate, epoch, fitted=False)
    parabola = np.polynomial.Polynomial.fit(x, [values[trial.number] for trial in fitted], 2)
    if parabola.deriv(2)(0) >= 0:
        return Peak(best_rate, epoch, fitted=False)
    return Peak(float(10 ** np.clip(parabola.deriv().roots()[0], x.min(), x.max())), epoch, fitted=True)


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
