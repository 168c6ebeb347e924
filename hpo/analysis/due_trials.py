"""The trials that follow a search: which learning rates are confirmed on fresh seeds, and which networks are tested."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.analysis.answer import Best
from hpo.search.space import Categorical, Conditional, Range, Scalar
from hpo.study.records import StudyRecord, TrialRecord
from hpo.study.stages import Planned, due

MIN_APART_DECADES = 0.1  # learning rates that are closer than this count as one


def plan_due_trials(study: StudyRecord, trials: Sequence[TrialRecord], answer: Best) -> list[Planned]:
    """Return the trials that are due after these, given the answer so far; none if no stage is due."""
    assert study.spec.confirm is not None
    stage = due(study, trials)
    if stage == "confirm":
        used = [trial.replicate + 1 for trial in trials if trial.replicate is not None]
        chosen = candidates(study, trials, answer)
        seeds = range(max(used, default=0), max(used, default=0) + study.spec.confirm.seeds)
        return [Planned(stage, params, seed) for seed in seeds for params in chosen]
    if stage == "test":
        assert answer.confirmation is not None
        tested = [trial for trial in trials if trial.number in answer.confirmation.winner.trials]
        return [
            Planned(stage, trial.params, trial.replicate or 0, trial.number)
            for trial in tested
            if trial.state == "complete"
        ]
    return []


def candidates(study: StudyRecord, trials: Sequence[TrialRecord], answer: Best) -> list[dict[str, Scalar]]:
    """Return the values to train again, at most `confirm.top`: first the answer's, then those of the best trials.

    A searched seed is left out. Trials that differ in nothing else count with their mean.
    """
    assert study.spec.confirm is not None
    first = _without_seed(answer.params)
    rate = _free_rate(study, first)
    if answer.response is not None and rate is not None:
        ends = [float(end) for end in rate.extreme_values()]  # Optuna refuses what is beyond them by a last digit
        first["lr"] = min(max(float(f"{answer.response.best:.6g}"), min(ends)), max(ends))
    values: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for trial in trials:
        if trial.kind == "search" and trial.state == "complete" and trial.value is not None:
            values.setdefault(tuple(_without_seed(trial.params).items()), []).append(trial.value)
    ranked = sorted(values, key=lambda key: statistics.fmean(values[key]), reverse=study.spec.direction == "maximize")
    chosen: list[dict[str, Scalar]] = []
    for params in [first, *map(dict, ranked)]:
        if all(_are_apart(study, params, other) for other in chosen):
            chosen.append(params)
    return chosen[: study.spec.confirm.top]


def _without_seed(params: Mapping[str, Any]) -> dict[str, Scalar]:
    return {key: value for key, value in params.items() if key != "seed"}


def _free_rate(study: StudyRecord, params: Mapping[str, Scalar]) -> Range | Categorical | None:
    """Return what the learning rate is searched in, if rates between the tried ones can be trained, else None.

    They cannot for a list or a range with steps. A grid's list is the exception: Optuna is told that it is a range.
    """
    spec = study.spec.search
    parameter = spec.parameters.get("lr")
    if isinstance(parameter, Conditional):
        parameter = parameter.cases.get(str(params.get(parameter.by)))
    if parameter is None or isinstance(parameter, Conditional):
        return None
    is_free = spec.sampler == "grid" or (isinstance(parameter, Range) and parameter.step is None)
    return parameter if is_free else None


def _are_apart(study: StudyRecord, params: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> bool:
    """Return whether values differ in a listed parameter or by MIN_APART_DECADES in the learning rate.

    Without learning rates, any difference counts.
    """
    if any(params.get(key) != other.get(key) for key in study.spec.search.listed_values(params)):
        return True
    lr, other_lr = params.get("lr"), other.get("lr")
    if isinstance(lr, int | float) and isinstance(other_lr, int | float) and lr > 0 and other_lr > 0:
        return abs(math.log10(lr / other_lr)) > MIN_APART_DECADES
    return params != other
