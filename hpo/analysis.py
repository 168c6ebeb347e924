"""Trials -> the answer: the best learning rate, the interval of those that did as well, and where all of them point."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpo.records import Study, Trial
from hpo.space import Choice

COMPARED = 5  # trials are compared after as many epochs as so many of them have come to
WINDOW = 3  # epochs whose mean counts: one epoch's accuracy is noisy
DECADES = 1.0  # to either side of the best one: over more, the response is no parabola
LEAST_RATES = 4  # that a parabola is fitted to; three always fit


@dataclass(frozen=True)
class Peak:
    """The learning rate that the trials point to, compared after so many epochs; not `fitted`: the best one's."""

    lr: float
    epochs: int
    fitted: bool


@dataclass(frozen=True)
class Best:
    """The best complete trial. `interval` is None where the study has no learning rate or no picture count.

    `peak` is where all trials together point, None where no learning rate is searched.
    """

    trial: int
    params: Mapping[str, Any]
    value: float
    interval: tuple[float, float] | None
    peak: Peak | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def best(study: Study, trials: Sequence[Trial]) -> Best | None:
    """The complete trial with the best value, or None where no trial completed.

    Equal values are common with few validation pictures: then the lower validation loss wins, then the earlier trial.
    """
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    if not complete:
        return None
    sign = -1 if study.spec.direction == "maximize" else 1
    winner = min(complete, key=lambda trial: (sign * _value(trial), _last_loss(trial), trial.number))
    interval = learning_rate_interval(study, trials, winner)
    return Best(winner.number, winner.params, _value(winner), interval, peak(study, trials))


def learning_rate_interval(study: Study, trials: Sequence[Trial], winner: Trial) -> tuple[float, float] | None:
    """The tried learning rates around the winner's that did as well, as (lowest, highest).

    "As well" is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984): a validation
    accuracy within one binomial standard error of the winner's, for the number of validation pictures; replicates of a
    learning rate count with their mean. From the winner outward, the interval ends at the first learning rate that did
    worse, was pruned, or diverged. Trials that differ from the winner in a listed parameter (optimizer, batch size...)
    do not count; those that differ in a range count all the same.
    """
    num_val = study.facts.get("num_val")
    if "lr" not in winner.params or not num_val:
        return None
    least = _value(winner) - standard_error(_value(winner), num_val)
    alike = [trial for trial in trials if _is_comparable(study, trial, winner)]
    rates = sorted({float(trial.params["lr"]) for trial in alike})
    as_good = [_mean([trial for trial in alike if trial.params["lr"] == rate]) >= least for rate in rates]
    low = high = rates.index(float(winner.params["lr"]))
    while low > 0 and as_good[low - 1]:
        low -= 1
    while high < len(rates) - 1 and as_good[high + 1]:
        high += 1
    return rates[low], rates[high]


def peak(study: Study, trials: Sequence[Trial]) -> Peak | None:
    """Where the trials so far point, ended or not; None where no learning rate above 0 is searched or reported on.

    The best trial alone is the luckiest; the others say where the top of the response is. A parabola in log lr is
    fitted by least squares (a response surface: Box and Wilson, J. Royal Statistical Society B 13, 1951) to the trials
    within DECADES of the best one and with its listed parameters, after as many epochs as COMPARED trials have come to,
    each counting with its mean over the last WINDOW of those. The peak is its top, within the rates that were tried;
    where it has none, or too few rates, the best one. After few epochs it says where to look, and not what will win.
    `make bench-search` measures how soon it is right.
    """
    import numpy as np

    sign = -1 if study.spec.direction == "minimize" else 1
    curves = {
        trial.number: [math.nan if value is None else sign * value for value in trial.curves[study.spec.metric]]
        for trial in trials
        if _has_rate(trial) and trial.state != "failed" and trial.curves.get(study.spec.metric)
    }
    if not curves:
        return None
    lengths = sorted(map(len, curves.values()), reverse=True)
    epoch = lengths[min(COMPARED, len(lengths)) - 1]
    with np.errstate(over="ignore"):
        values = {
            number: float(np.mean(curve[max(0, epoch - WINDOW) : epoch]))
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
        if _is_alike(study, trial, leader) and abs(math.log10(trial.params["lr"] / top)) <= DECADES
    ]
    x = np.log10([trial.params["lr"] for trial in fitted])
    if len(set(x)) < LEAST_RATES:
        return Peak(top, epoch, fitted=False)
    parabola = np.polynomial.Polynomial.fit(x, [values[trial.number] for trial in fitted], 2)
    if parabola.deriv(2)(0) >= 0:
        return Peak(top, epoch, fitted=False)
    return Peak(float(10 ** np.clip(parabola.deriv().roots()[0], x.min(), x.max())), epoch, fitted=True)


def _has_rate(trial: Trial) -> bool:
    """A loop of the user's may call anything `lr`."""
    lr = trial.params.get("lr")
    return isinstance(lr, int | float) and not isinstance(lr, bool) and lr > 0


def _is_comparable(study: Study, trial: Trial, winner: Trial) -> bool:
    same = "lr" in trial.params and trial.state in ("complete", "pruned", "diverged")
    return same and _is_alike(study, trial, winner)


def _is_alike(study: Study, trial: Trial, winner: Trial) -> bool:
    listed = {key for key, p in study.spec.search.parameters.items() if isinstance(p, Choice)} - {"lr", "seed"}
    return all(trial.params.get(key) == winner.params.get(key) for key in listed)


def _mean(replicates: Sequence[Trial]) -> float:
    """The mean value of complete trials; where one did not complete, no value is as good."""
    values = [trial.value if trial.state == "complete" else None for trial in replicates]
    return -math.inf if None in values else statistics.fmean(value for value in values if value is not None)


def standard_error(accuracy: float, num_pictures: int) -> float:
    """Of an accuracy measured on so many pictures, by Agresti and Coull (1998), who do not call 100 % certain."""
    count = num_pictures + 4
    share = (accuracy * num_pictures + 2) / count
    return math.sqrt(share * (1 - share) / count)


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def _last_loss(trial: Trial) -> float:
    losses = trial.curves.get("val_loss", ())
    return losses[-1] if losses and losses[-1] is not None else math.inf
