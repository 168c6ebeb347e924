"""Studies with a confirmation, and their trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpo.config.study_spec import StudySpec
from hpo.study.records import StudyRecord, TrialRecord

RATES = [1e-4, 1e-3, 1e-2, 1e-1]


def make_study(top: int = 2, seeds: int = 3, **settings: Any) -> StudyRecord:
    search = {"sampler": "grid", "space": {"lr": RATES}}
    spec = StudySpec.from_dict({"name": "s", "search": search, "confirm": {"top": top, "seeds": seeds}, **settings})
    return StudyRecord(1, "s", spec, {"num_val": 400}, None, None, 0.0)


def make_trial(number: int, params: dict[str, Any], result: float | str, **more: Any) -> TrialRecord:
    """Return a trial with this value, or of this state if it did not complete."""
    state, value = ("complete", result) if isinstance(result, float) else (result, None)
    return TrialRecord(number, state, params, value, 1, None, None, None, {}, None, None, **more)


def make_trials(*rows: tuple[float, float | str]) -> list[TrialRecord]:
    """Return trials of the search from (learning rate, value or state)."""
    return [make_trial(number, {"lr": lr}, result) for number, (lr, result) in enumerate(rows)]


def again(
    trials: Sequence[TrialRecord], *values: Sequence[float | str], params: Sequence[dict[str, Any]]
) -> list[TrialRecord]:
    """Return trials that confirm, after `trials`: for each of `params` the value or the state of each seed."""
    rows = [
        (of_trial, seed, value)
        for of_trial, of_seeds in zip(params, values, strict=True)
        for seed, value in enumerate(of_seeds)
    ]
    return [
        make_trial(len(trials) + index, of_trial, value, kind="confirm", replicate=seed)
        for index, (of_trial, seed, value) in enumerate(rows)
    ]
