"""Trials -> the answer: the best learning rate and the interval of those that did as well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpo.records import Study, Trial


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
    accuracy within one binomial standard error of the winner's, for the number of validation pictures. From the winner
    outward, the interval ends at the first learning rate that did worse, was pruned, or diverged. Trials that differ
    from the winner in a category (optimizer, schedule...) do not count.
    """
    num_val = study.facts.get("num_val")
    if "lr" not in winner.params or not num_val:
        return None
    least = _value(winner) - standard_error(_value(winner), num_val)
    comparable = sorted(
        (
            trial
            for trial in trials
            if _same_categories(trial, winner) and trial.state in ("complete", "pruned", "diverged")
        ),
        key=lambda trial: float(trial.params["lr"]),
    )
    as_good = [trial.state == "complete" and _value(trial) >= least for trial in comparable]
    low = high = comparable.index(winner)
    while low > 0 and as_good[low - 1]:
        low -= 1
    while high < len(comparable) - 1 and as_good[high + 1]:
        high += 1
    return float(comparable[low].params["lr"]), float(comparable[high].params["lr"])


def standard_error(accuracy: float, num_pictures: int) -> float:
    """Of an accuracy measured on so many pictures, by Agresti and Coull (1998), who do not call 100 % certain."""
    count = num_pictures + 4
    share = (accuracy * num_pictures + 2) / count
    return math.sqrt(share * (1 - share) / count)


def _same_categories(trial: Trial, winner: Trial) -> bool:
    return "lr" in trial.params and all(
        trial.params.get(key) == value for key, value in winner.params.items() if isinstance(value, str | bool)
    )


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def _last_loss(trial: Trial) -> float:
    losses = trial.curves.get("val_loss", ())
    return losses[-1] if losses and losses[-1] is not None else math.inf
