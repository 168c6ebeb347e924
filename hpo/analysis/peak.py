"""Where the trials of a study point while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.analysis.trials import are_alike, direction_sign, has_rate, search_trials
from hpo.study.records import StudyRecord, TrialRecord

NUM_COMPARED = 5  # trials are compared after as many epochs as so many of them have come to
AVERAGED_EPOCHS = 3  # epochs whose mean counts: one epoch's accuracy is noisy
FITTED_DECADES = 1.0  # to either side of the best one: over more, the response is no parabola
MIN_PARABOLA_RATES = 4  # that a parabola is fitted to; three always fit


@dataclass(frozen=True)
class Peak:
    """The learning rate that the trials point to, compared after so many epochs; not `fitted`: the best one's."""

    lr: float
    epochs: int
    fitted: bool


def find_peak(study: StudyRecord, trials: Sequence[TrialRecord]) -> Peak | None:
    """Where the trials so far point, ended or not; None where no learning rate above 0 is searched or reported on.

    The best trial alone is the luckiest; the others say where the top of the response is. A parabola in log lr is
    fitted by least squares (a response surface: Box and Wilson, J. Royal Statistical Society B 13, 1951) to the trials
    within DECADES of the best one and with its listed parameters, after as many epochs as COMPARED trials have come to,
    each counting with its mean over the last WINDOW of those. The peak is its top, within the rates that were tried;
    where it has none, or too few rates, the best one. After few epochs it says where to look, and not what will win.
    `make bench-search` measures how soon it is right.
    """
    import numpy as np

    sign = direction_sign(study)
    curves = {
        trial.number: [math.nan if value is None else sign * value for value in trial.curves[study.spec.metric]]
        for trial in search_trials(trials)
        if has_rate(trial) and trial.state != "failed" and trial.curves.get(study.spec.metric)
    }
    if not curves:
        return None
    lengths = sorted(map(len, curves.values()), reverse=True)
    epoch = lengths[min(NUM_COMPARED, len(lengths)) - 1]
    with np.errstate(over="ignore"):
        values = {
            number: float(np.mean(curve[max(0, epoch - AVERAGED_EPOCHS) : epoch]))
            for number, curve in curves.items()
            if len(curve) >= epoch
        }
    known = [trial for trial in trials if math.isfinite(values.get(trial.number, math.nan))]
    if not known:
        return None
    leader = max(known, key=lambda trial: values[trial.number])
    top = float(leader.params["lr"])
    fitted = [
        trial
        for trial in known
        if are_alike(study, trial, leader) and abs(math.log10(trial.params["lr"] / top)) <= FITTED_DECADES
    ]
    x = np.log10([trial.params["lr"] for trial in fitted])
    if len(set(x)) < MIN_PARABOLA_RATES:
        return Peak(top, epoch, fitted=False)
    parabola = np.polynomial.Polynomial.fit(x, [values[trial.number] for trial in fitted], 2)
    if parabola.deriv(2)(0) >= 0:
        return Peak(top, epoch, fitted=False)
    return Peak(float(10 ** np.clip(parabola.deriv().roots()[0], x.min(), x.max())), epoch, fitted=True)
