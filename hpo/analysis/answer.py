"""The answer of a study: the best learning rate, how sure that is, where training breaks, and the warnings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hpo.analysis.confirmation import Confirmation, exclude_worse, find_confirmation
from hpo.analysis.response import ObservedTrial, Response, fit_response
from hpo.analysis.text import interval_text, number_text, rate_text, search_end_text
from hpo.analysis.trials import (
    TRAINED,
    are_alike,
    best_trial,
    direction_sign,
    has_rate,
    is_rate,
    rate_bounds,
    search_trials,
    value_of,
)
from hpo.analysis.warnings import StudyWarning, find_warnings
from hpo.study.chance import counting_error, guess_value
from hpo.study.records import StudyRecord, TrialRecord
from hpo.train.metrics import is_share

OBSERVED = (*TRAINED, "running", "waiting")  # states of trials that say something about their learning rate


@dataclass(frozen=True, repr=False)
class Best:
    """The answer of a study.

    Attributes:
        trial: The number of the best complete trial of the search.
        params: The values of that trial.
        value: The value of that trial.
        interval: The learning rates between which the best one lies, by `response`. Without a response: the tried
            rates that did as well, or None if the study has no learning rate or no number of validation images.
        responses: For each combination of listed parameters (optimizer, batch size...) of which enough is known, the
            combination and its response.
        response: The response of the combination that the best trial has.
        warnings: What to be careful about in this answer.
        confirmation: The result of training the best learning rates again on fresh seeds, if that was asked for.
        range_test: The range tests that set the range of learning rates, if `lr` was "auto".
        search_end: After how many trials the search ended and why, if `search.until` or `search.hours` ended it.
        num_complete: Of how many complete trials of the search `trial` is the best.
    """

    trial: int
    params: Mapping[str, Any]
    value: float
    interval: tuple[float, float] | None
    responses: Sequence[tuple[Mapping[str, Any], Response]] = ()
    response: Response | None = None
    warnings: Sequence[StudyWarning] = field(default=())
    confirmation: Confirmation | None = None
    range_test: Sequence[Mapping[str, Any]] | None = None
    search_end: str | None = None
    num_complete: int = 1

    @property
    def lr(self) -> float | None:
        """The learning rate to train with, from `recommended`."""
        return self.recommended.get("lr")

    @property
    def recommended(self) -> dict[str, Any]:
        """The values to train with: the confirmed ones, else the best trial's with the response's best rate."""
        if self.confirmation is not None:
            return dict(self.confirmation.winner.params)
        return {**self.params, "lr": self.response.best} if self.response else dict(self.params)

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={number_text(value)}" for key, value in self.recommended.items())
        interval = f", interval {interval_text(self.interval)}" if self.interval else ""
        warnings = "".join(f", warning: {warning.kind}" for warning in self.warnings)
        return f"Best({values}{interval}{warnings})"

    def is_recommended(self, params: Mapping[str, Any]) -> bool:
        """Return whether a trial's values are the recommended ones, whatever its seed.

        Args:
            params: The trial's values. Learning rates are the same if their two digits are: no more of them are known.

        Returns:
            True if they are.
        """
        return all(
            rate_text(params.get(key)) == rate_text(value) if key == "lr" else params.get(key) == value
            for key, value in self.recommended.items()
            if key != "seed"
        )

    def is_open(self, response: Response) -> bool:
        """Return whether a response leaves open which rate is best, and no confirmation tells it.

        Args:
            response: One of `responses`.

        Returns:
            True if it does. Then no rates are said to do equally well.
        """
        return self.confirmation is None and not response.is_determined

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as plain data for JSON, without the curves of the responses."""
        best_trial = {"params": dict(self.params), "value": self.value}
        return {
            "trial": self.trial,
            **best_trial,
            "best_trial": {"number": self.trial, **best_trial},
            "lr": self.lr,
            "recommended": self.recommended,
            "determined": None if self.response is None else self.response.is_determined,
            "interval": self.interval,
            "response": None if self.response is None else self.response.summary_dict(),
            "responses": [{"params": dict(params), **response.summary_dict()} for params, response in self.responses],
            "warnings": [asdict(warning) for warning in self.warnings],
            "confirmation": None if self.confirmation is None else self.confirmation.as_dict(),
            "range_test": self.range_test,
            "search_end": self.search_end,
            "num_complete": self.num_complete,
        }


def find_best(study: StudyRecord, trials: Sequence[TrialRecord]) -> Best | None:
    """Return the answer of a study with these trials, or None if no trial completed."""
    winner = best_trial(study, trials)
    if winner is None:
        return None
    confirmation = find_confirmation(study, trials, search_value=value_of(winner))
    searched = search_trials(trials)
    responses = [
        (combination, response)
        for combination, alike in _group_by_lists(study, searched)
        if (response := find_response(study, alike)) is not None
    ]
    listed_values = study.spec.search.listed_values
    chosen = listed_values(confirmation.winner.params if confirmation else winner.params)
    leader = best_trial(study, [trial for trial in searched if listed_values(trial.params) == chosen]) or winner
    worse = find_worse_rates(study, confirmation)
    rate = float(confirmation.winner.params["lr"]) if confirmation and worse else math.nan
    for index, (other, known) in enumerate(responses):
        if other == chosen:
            responses[index] = other, replace(known, plateau=exclude_worse(known.plateau, worse=worse, winner=rate))
    response = next((known for other, known in responses if other == chosen and has_rate(leader)), None)
    interval = response.interval if response else learning_rate_interval(study, searched, leader)
    if response is None and interval is not None:
        interval = exclude_worse(interval, worse=worse, winner=rate)
    return Best(
        trial=winner.number,
        params=winner.params,
        value=value_of(winner),
        interval=interval,
        responses=responses,
        response=response,
        warnings=find_warnings(study, trials, leader, response, is_told_apart=bool(worse)),
        confirmation=confirmation,
        range_test=study.metadata.get("range_test"),
        search_end=search_end_text(study, trials),
        num_complete=sum(trial.state == "complete" and trial.value is not None for trial in searched),
    )


def find_worse_rates(study: StudyRecord, confirmation: Confirmation | None) -> list[float]:
    """Return the learning rates that a confirmation found worse than its winner's, with the same listed parameters."""
    if confirmation is None:
        return []
    listed_values, winner = study.spec.search.listed_values, confirmation.winner.params
    alike = [rate.params for rate in confirmation.worse if listed_values(rate.params) == listed_values(winner)]
    return [
        float(params["lr"])
        for params in alike
        if is_rate(winner.get("lr")) and is_rate(params["lr"]) and params["lr"] != winner["lr"]
    ]


def find_response(study: StudyRecord, trials: Sequence[TrialRecord]) -> Response | None:
    """Return the response of trials that differ in their learning rate, or None if too few rates have a value.

    Trials that also differ in another range count all the same: that is part of the noise.
    """
    sign, metric, spec = direction_sign(study), study.spec.metric, study.spec
    rated = [trial for trial in trials if has_rate(trial) and trial.state in OBSERVED]
    reached = max((epoch for trial in rated for epoch in trial.epochs), default=1)
    num_epochs = reached if spec.objective else spec.max_epochs
    observed = [
        _observe(trial, metric, sign, num_epochs)
        for trial in rated
        if trial.state != "complete" or trial.value is not None
    ]
    if not observed:
        return None
    # A loss may be worse than a guess although the network has learned: it is then too sure of its mistakes.
    guess = guess_value(study.spec, study.metadata) if sign == 1 else None
    low, high = rate_bounds(study, trials)
    response = fit_response(
        observed,
        num_epochs=num_epochs,
        low=low,
        high=high,
        floor=-math.inf if guess is None else guess,
        is_share=is_share(metric) and sign == 1,
    )
    return response if response is None or sign == 1 else response.mirrored()


def _observe(trial: TrialRecord, metric: str, sign: int, num_epochs: int) -> ObservedTrial:
    """Return what a trial has shown: its curve, or its value alone if it reported nothing."""
    seen = zip(trial.epochs, trial.curves.get(metric, ()), strict=False)
    curve = {epoch: sign * value for epoch, value in seen if value is not None and math.isfinite(value)}
    if trial.state in ("complete", "pruned") and trial.value is not None:
        curve[max(trial.epochs, default=num_epochs)] = sign * value_of(trial)
    return ObservedTrial(math.log10(trial.params["lr"]), trial.state, list(curve), list(curve.values()))


def learning_rate_interval(
    study: StudyRecord, trials: Sequence[TrialRecord], winner: TrialRecord
) -> tuple[float, float] | None:
    """Return the tried learning rates around the winner's that did as well, as (lowest, highest).

    "As well" is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984): a validation
    accuracy within one binomial standard error of the winner's, for the number of validation images. Replicates of a
    learning rate count with their mean. From the winner outward, the interval ends at the first learning rate that did
    worse, was pruned, or diverged. Trials that differ from the winner in a listed parameter (optimizer, batch size...)
    do not count; those that differ in a range count all the same.
    """
    error = counting_error(study.spec, study.metadata, value_of(winner))
    if not has_rate(winner) or error is None:
        return None
    least = value_of(winner) - error
    alike = [
        trial for trial in trials if has_rate(trial) and trial.state in TRAINED and are_alike(study, trial, winner)
    ]
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
    """Return each combination of listed parameters with its trials, in the order of their first trials."""
    groups: list[tuple[dict[str, Any], list[TrialRecord]]] = []
    for trial in trials:
        combination = study.spec.search.listed_values(trial.params)
        members = next((alike for other, alike in groups if other == combination), None)
        if members is None:
            groups.append((combination, members := []))
        members.append(trial)
    return groups


def _mean_value(replicates: Sequence[TrialRecord]) -> float:
    """Return the mean value of the trials, or -inf if one did not complete: then no value is as good."""
    values = [trial.value if trial.state == "complete" else None for trial in replicates]
    return -math.inf if None in values else statistics.fmean(value for value in values if value is not None)


def trial_of_weights(study: StudyRecord, answer: Best) -> int:
    """Return the number of the trial whose weights are to be used: of the confirmed rate the best one, or the best."""
    if answer.confirmation is None:
        return answer.trial
    winner, sign = answer.confirmation.winner, direction_sign(study)
    complete = [
        (sign * value, -number) for number, value in zip(winner.trials, winner.values, strict=True) if value is not None
    ]
    return -max(complete)[1]
