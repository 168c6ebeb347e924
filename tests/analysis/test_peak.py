"""The peak: where the trials of a study point while it trains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from hpo.analysis.peak import Peak, find_peak
from hpo.study.records import StudyRecord, TrialRecord
from tests.analysis.examples import make_study, make_trials, reporting


def parabola(lr: float, top: float) -> float:
    return 0.9 - 0.1 * math.log10(lr / top) ** 2


def peak_lr(study: StudyRecord, trials: list[TrialRecord]) -> float | None:
    found = find_peak(study, trials)
    return None if found is None else found.lr


def test_the_peak_is_the_top_of_a_parabola_through_the_trials_around_the_best() -> None:
    rates = (1e-5, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 9e-2)
    rows = [(lr, [parabola(lr, 8e-4)]) for lr in rates[1:-1]]
    far = [(rates[0], [0.1]), (rates[-1], [0.1])]  # more than a decade away: no part of it
    assert peak_lr(make_study(), reporting(*rows, *far)) == pytest.approx(8e-4)
    downward = [(lr, [-accuracy]) for lr, (accuracy,) in rows]
    objective = {"function": "m:f", "direction": "minimize", "metric": "val_accuracy"}
    assert peak_lr(make_study(objective=objective), reporting(*downward)) == pytest.approx(8e-4)


def test_a_peak_outside_what_was_tried_is_at_its_edge() -> None:
    rows = [(lr, [parabola(lr, 1e-1)]) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    assert peak_lr(make_study(), reporting(*rows)) == pytest.approx(8e-3)


@pytest.mark.parametrize("rates", [(1e-3,), (1e-3, 2e-3, 4e-3), (1e-3, 1e-3, 1e-3, 2e-3, 4e-3)])
def test_too_few_rates_for_a_parabola_leave_the_best(rates: tuple[float, ...]) -> None:
    found = peak_lr(make_study(), reporting(*((lr, [parabola(lr, 1.5e-3)]) for lr in rates)))
    assert found is not None
    assert found in (1e-3, 2e-3)


def test_a_response_that_bends_upward_leaves_the_best() -> None:
    rows = [(lr, [0.9 + 0.1 * math.log10(lr / 1e-3) ** 2]) for lr in (5e-4, 1e-3, 2e-3, 5e-3)]
    assert find_peak(make_study(), reporting(*rows)) == Peak(5e-3, 1, fitted=False)


def test_trials_are_compared_after_as_many_epochs_as_five_of_them_have_come_to() -> None:
    long = [(lr, [0.1, parabola(lr, 3e-3), 0.0]) for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    last = (6e-3, [0.1, parabola(6e-3, 3e-3)])
    short = [(lr, [0.95]) for lr in (3e-4, 4e-4)]  # their first epoch was good, and nobody's second is known
    found = find_peak(make_study(), reporting(*long, last, *short))
    assert found is not None
    assert found.lr == pytest.approx(3e-3)
    assert (found.epochs, found.fitted) == (2, True)


def test_only_trials_like_the_best_count_and_none_that_failed_or_has_no_number() -> None:
    rows = [(lr, [parabola(lr, 1e-3)]) for lr in (3e-4, 6e-4, 1.5e-3, 3e-3)]
    space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}, "optimizer": ["adam", "sgd"]}
    study = make_study(search={"space": space, "trials": 9})
    others = reporting((5e-3, [0.8]), (6e-3, [0.8]), optimizer="sgd")
    failed = reporting((2e-3, [0.99]), state="failed", optimizer="adam")
    unknown = reporting((2.5e-3, [None]), optimizer="adam")
    every = [*reporting(*rows, optimizer="adam"), *others, *failed, *unknown]
    numbered = [replace(trial, number=number) for number, trial in enumerate(every)]
    assert peak_lr(study, numbered) == pytest.approx(1e-3)
    assert peak_lr(study, numbered[-2:]) is None
    assert peak_lr(study, make_trials((0.1, "waiting"))) is None


@pytest.mark.parametrize("lrs", [("low", "high"), (-3.0, -1.0), (0, 0.0), (True, False)])
def test_where_a_loop_calls_something_else_lr_there_is_no_peak(lrs: tuple[Any, ...]) -> None:
    trials = reporting(*((lr, [0.5]) for lr in lrs))
    assert find_peak(make_study(), trials) is None


def test_a_metric_as_large_as_a_float_holds_is_no_crash() -> None:
    rows = [(lr, [1e308 * (1 - lr)] * 3) for lr in (1e-4, 2e-4, 4e-4, 8e-4)]
    assert peak_lr(make_study(), reporting(*rows)) in (None, 1e-4)
