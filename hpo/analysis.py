"""Trials -> the answer: the best learning rate and the interval of those that did as well."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpo.records import Study, Trial
from hpo.space import Choice


@dataclass(frozen=True)
class Best:
    """The best complete trial. `interval` is None where the study has no learning rate or no picture count."""

    trial: int
    params: Mapping[str, Any]
    value: float
    interval: tuple[float, float] | None

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
    return Best(winner.number, winner.params, _value(winner), learning_rate_interval(study, trials, winner))


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


def _is_comparable(study: Study, trial: Trial, winner: Trial) -> bool:
    listed = {key for key, p in study.spec.search.parameters.items() if isinstance(p, Choice)} - {"lr", "seed"}
    same = all(trial.params.get(key) == winner.params.get(key) for key in listed)
    return same and "lr" in trial.params and trial.state in ("complete", "pruned", "diverged")


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
