"""Views of a study for samplers, so that they learn from the whole search."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

DIVERGED_PREFIX = "diverged"  # the user attribute "ended" of a diverged trial begins with it
KIND_ATTRIBUTE = "kind"  # the user attribute of trials that are not of the search


class SearchStudy(optuna.Study):
    """An Optuna study without the trials that confirm its answer: no sampler learns from them.

    All trials have the ranges that are searched now. Those from before a range was widened have another one in the
    store, and no sampler would learn of that parameter from trials that differ in its range.
    """

    ranges: Mapping[str, BaseDistribution] = {}  # by Optuna's names

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy=False, use_cache=use_cache)
        searched = [trial for trial in trials if KIND_ATTRIBUTE not in trial.user_attrs]
        return _of_states([_in_ranges(trial, self.ranges) for trial in searched], states)


class ReportsStudy(SearchStudy):
    """An Optuna study for TPE, in which a trial in training counts by its last report, as a pruned one does.

    TPE itself counts trials in training among the worst, whatever they report. With many trials at once it would keep
    away from where they do best.
    """

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy=False, use_cache=use_cache)
        shown = [
            _as_pruned(trial) if trial.state is TrialState.RUNNING and trial.intermediate_values else trial
            for trial in trials
        ]
        return _of_states(shown, states)


class ValuesStudy(SearchStudy):
    """An Optuna study for GP and CMA-ES, in which every pruned or diverged trial counts as complete.

    GP and CMA-ES do not see such trials otherwise, and would return to their learning rates for ever. A pruned trial
    counts with its last report, a diverged one with the worst value of all.
    """

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy=False, use_cache=use_cache)
        known = [trial.value for trial in trials if trial.value is not None]
        worst = _worst_value(self.direction.name.lower(), known)
        return _of_states(
            [_as_complete(trial, worst) if trial.state is TrialState.PRUNED else trial for trial in trials], states
        )


def _of_states(trials: Iterable[FrozenTrial], states: Any) -> list[FrozenTrial]:
    return [trial for trial in trials if states is None or trial.state in states]


def _in_ranges(trial: FrozenTrial, ranges: Mapping[str, BaseDistribution]) -> FrozenTrial:
    known = trial.distributions
    if all(ranges.get(name, known[name]) == known[name] for name in known):
        return trial
    shown = copy.copy(trial)
    shown.distributions = {name: ranges.get(name, known[name]) for name in known}
    return shown


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    shown = copy.copy(trial)
    shown.state = TrialState.PRUNED
    return shown


def _as_complete(trial: FrozenTrial, worst: float) -> FrozenTrial:
    shown = copy.copy(trial)
    shown.state = TrialState.COMPLETE
    diverged = str(trial.user_attrs.get("ended", "")).startswith(DIVERGED_PREFIX)
    shown.value = worst if trial.value is None or diverged else trial.value
    return shown


def _worst_value(direction: str, values: list[float]) -> float:
    """Return the value that a diverged trial counts with: no better than the worst one seen."""
    finite = [value for value in values if math.isfinite(value)]
    if direction == "maximize":
        return min([0.0, *finite])
    return max(finite, default=0.0)
