"""Trials -> the answer: the best learning rate, how sure that is, where training breaks, and what to beware of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpo.analysis.confirmation import Confirmation, find_confirmation
from hpo.analysis.response import Observations, Response, fit_response
from hpo.analysis.trials import (
    _is_comparable,
    best_trial,
    direction_sign,
    has_rate,
    rate_bounds,
    search_trials,
    standard_error,
    value_of,
)
from hpo.analysis.warnings import StudyWarning, find_warnings
from hpo.study.records import StudyRecord, TrialRecord


@dataclass(frozen=True)
class Best:
    """The answer of a study. `trial`, `params` and `value` are those of the best complete trial.

    `responses` has the response for each combination of listed parameters (optimizer, batch size...) of which enough is
    known, and `find_response` is that of the best trial's. `interval` is that response's for the best learning rate; where
    there is none, the tried rates that did as well, or None where the study has no learning rate or no picture count.
    """

    trial: int
    params: Mapping[str, Any]
    value: float
    interval: tuple[float, float] | None
    responses: Sequence[tuple[Mapping[str, Any], Response]] = ()
    response: Response | None = None
    warnings: Sequence[StudyWarning] = field(default=())
    confirmation: Confirmation | None = None  # of trials trained again on fresh seeds, where there was one
    range_test: Sequence[Mapping[str, Any]] | None = None  # where the range of learning rates came from one

    @property
    def lr(self) -> float | None:
        """The learning rate to train with, of `recommended`."""
        return self.recommended.get("lr")

    @property
    def recommended(self) -> dict[str, Any]:
        """The values to train with: those that were confirmed, else the best trial's with the response's best rate."""
        if self.confirmation is not None:
            return dict(self.confirmation.winner.params)
        return {**self.params, "lr": self.response.best} if self.response else dict(self.params)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the curves of the responses."""
        return {
            "trial": self.trial,
            "params": dict(self.params),
            "value": self.value,
            "lr": self.lr,
            "recommended": self.recommended,
            "interval": self.interval,
            "response": None if self.response is None else self.response.in_figures(),
            "responses": [{"params": dict(params), **response.in_figures()} for params, response in self.responses],
            "warnings": [asdict(warning) for warning in self.warnings],
            "confirmation": None if self.confirmation is None else self.confirmation.as_dict(),
            "range_test": self.range_test,
        }


def find_best(study: StudyRecord, trials: Sequence[TrialRecord]) -> Best | None:
    """The answer, or None where no trial completed."""
    winner = best_trial(study, trials)
    if winner is None:
        return None
    confirmed, every = find_confirmation(study, trials, first=value_of(winner)), trials
    trials = search_trials(trials)
    responses = [
        (group, found)
        for group, alike in _group_by_lists(study, trials)
        if (found := find_response(study, alike)) is not None
    ]
    listed = study.spec.search.listed_values
    group = listed(confirmed.winner.params if confirmed else winner.params)
    lead = best_trial(study, [trial for trial in trials if listed(trial.params) == group]) or winner
    mine = next((found for other, found in responses if other == group and has_rate(lead)), None)
    interval = mine.interval if mine else learning_rate_interval(study, trials, lead)
    beware = find_warnings(study, every, lead, mine)
    tested = study.facts.get("range_test")
    return Best(winner.number, winner.params, value_of(winner), interval, responses, mine, beware, confirmed, tested)


def find_response(study: StudyRecord, trials: Sequence[TrialRecord]) -> Response | None:
    """The response of trials that differ in their learning rate; None where too few rates have a value.

    A pruned trial counts with what complete trials have still gained from its last epoch on, on average; it is the more
    doubtful the more they gained, the more they differ in that, and the further they were from it at that epoch. Trials
    that differ in another range count all the same: it is part of the noise.
    """
    import numpy as np

    sign, metric = direction_sign(study), study.spec.metric
    rated = [trial for trial in trials if has_rate(trial)]
    complete = [trial for trial in rated if trial.state == "complete" and trial.value is not None]
    curves = {trial.number: dict(zip(trial.epochs, trial.curves.get(metric, ()), strict=False)) for trial in rated}
    seen = [(float(trial.params["lr"]), sign * value_of(trial), 0.0) for trial in complete]
    for trial in rated:
        if trial.state != "pruned" or trial.value is None:
            continue
        epoch = trial.epochs[-1] if trial.epochs else 0
        at_epoch = [(value_of(other), curves[other.number].get(epoch)) for other in complete]
        known = [(last, then) for last, then in at_epoch if then is not None]
        if known:
            gains = [sign * (last - then) for last, then in known]
            gain = statistics.fmean(gains)
            # They are the survivors: a trial that was worse, and far from them, may have gained anything.
            apart = abs(value_of(trial) - statistics.fmean(then for _, then in known))
            doubt = max(statistics.pstdev(gains), abs(gain) / 2, apart)
            seen.append((float(trial.params["lr"]), sign * value_of(trial) + gain, doubt))
    if not seen:
        return None
    lrs, values, doubts = np.array(seen).T
    diverged = [float(trial.params["lr"]) for trial in rated if trial.state == "diverged"]
    classes = None if study.spec.objective else study.facts.get("num_classes")
    low, high = rate_bounds(study, trials)
    found = fit_response(
        Observations(np.log10(lrs), values, doubts, np.log10(diverged), floor=1 / classes if classes else math.inf),
        low=low,
        high=high,
    )
    return found if found is None or sign == 1 else found.mirrored()


def learning_rate_interval(
    study: StudyRecord, trials: Sequence[TrialRecord], winner: TrialRecord
) -> tuple[float, float] | None:
    """The tried learning rates around the winner's that did as well, as (lowest, highest).

    "As well" is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984): a validation
    accuracy within one binomial standard error of the winner's, for the number of validation pictures; replicates of a
    learning rate count with their mean. From the winner outward, the interval ends at the first learning rate that did
    worse, was pruned, or diverged. Trials that differ from the winner in a listed parameter (optimizer, batch size...)
    do not count; those that differ in a range count all the same.
    """
    num_val = study.facts.get("num_val")
    if not has_rate(winner) or not num_val:
        return None
    least = value_of(winner) - standard_error(value_of(winner), num_val)
    alike = [trial for trial in trials if _is_comparable(study, trial, winner)]
    rates = sorted({float(trial.params["lr"]) for trial in alike})
    as_good = [_mean_value([trial for trial in alike if trial.params["lr"] == rate]) >= least for rate in rates]
    low = high = rates.index(float(winner.params["lr"]))
    while low > 0 and as_good[low - 1]:
        low -= 1
    while high < len(rates) - 1 and as_good[high + 1]:
        high += 1
    return rates[low], rates[high]


def _group_by_lists(
    study: StudyRecord, trials: Sequence[TrialRecord]
) -> list[tuple[dict[str, Any], list[TrialRecord]]]:
    """The trials of each combination of listed parameters, in the order in which they first come."""
    groups: list[tuple[dict[str, Any], list[TrialRecord]]] = []
    for trial in trials:
        key = study.spec.search.listed_values(trial.params)
        known = next((alike for other, alike in groups if other == key), None)
        if known is None:
            groups.append((key, known := []))
        known.append(trial)
    return groups


def _mean_value(replicates: Sequence[TrialRecord]) -> float:
    """The mean value of complete trials; where one did not complete, no value is as good."""
    values = [trial.value if trial.state == "complete" else None for trial in replicates]
    return -math.inf if None in values else statistics.fmean(value for value in values if value is not None)
