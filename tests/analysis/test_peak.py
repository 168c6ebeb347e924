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


def test_the_peak_is_the_best_rate_of_the_response() -> None:
    rates = (1e-5, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 9e-2)
    rows = [(lr, [parabola(lr, 8e-4)]) for lr in rates]
    found = find_peak(make_study(), reporting(*rows))
    assert found is not None
    assert found.fitted
    assert found.lr == pytest.approx(8e-4, rel=0.3)
    assert found.interval is not None
    assert found.interval[0] < 8e-4 < found.interval[1]
    downward = [(lr, [1 - accuracy]) for lr, (accuracy,) in rows]
    objective = {"function": "m:f", "direction": "minimize", "metric": "val_loss"}
    losses = [replace(trial, curves={"val_loss": trial.curves["val_accuracy"]}) for trial in reporting(*downward)]
    assert peak_lr(make_study(objective=objective), losses) == pytest.approx(8e-4, rel=0.5)


def test_a_peak_outside_what_was_tried_is_at_its_edge() -> None:
    rows = [(lr, [parabola(lr, 1e-1)]) for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]
    assert peak_lr(make_study(), reporting(*rows)) == pytest.approx(8e-3)


@pytest.mark.parametrize("rates", [(1e-3,), (1e-3, 2e-3, 4e-3), (1e-3, 1e-3, 1e-3, 2e-3, 4e-3)])
def test_too_few_rates_for_a_response_leave_the_best(rates: tuple[float, ...]) -> None:
    found = peak_lr(make_study(), reporting(*((lr, [parabola(lr, 1.5e-3)]) for lr in rates)))
    assert found is not None
    assert found in (1e-3, 2e-3)


def test_trials_are_compared_after_as_many_epochs_as_five_of_them_have_reached() -> None:
    long = [(lr, [0.1, parabola(lr, 3e-3), 0.0]) for lr in (1e-3, 2e-3, 3e-3, 3e-3)]
    last = (4e-3, [0.1, parabola(4e-3, 3e-3)])
    short = [(1e-3, [0.95]), (2e-3, [0.95])]  # their first epoch was good, and nobody's second is known
    assert find_peak(make_study(), reporting(*long, last, *short)) == Peak(3e-3, 2, fitted=False)


def test_a_rate_that_falls_behind_later_is_not_the_peak() -> None:
    """High rates are the best after an epoch, and not after ten; some trials show how it goes on."""

    def accuracies(x: float, until: int) -> list[float]:
        return [0.9 - 0.4 / epoch - 0.1 * (x + 3 - 1.5 * (1 / epoch - 0.1)) ** 2 for epoch in range(1, until + 1)]

    rows = [(10**x, accuracies(x, until)) for x, until in zip((-4.5, -4, -3.5, -3, -2.5, -2), (10, 3) * 3, strict=True)]
    found = find_peak(make_study(), reporting(*rows))
    assert found is not None
    assert max(rows, key=lambda row: row[1][0])[0] == pytest.approx(10**-2)
    assert found.lr == pytest.approx(1e-3, rel=1.5)
    assert found.interval is not None
    assert found.interval[0] < 1e-3 < found.interval[1]


def test_only_trials_like_the_best_count_and_none_that_failed_or_has_no_number() -> None:
    rows = [(lr, [parabola(lr, 1e-3)]) for lr in (1e-4, 3e-4, 6e-4, 1.5e-3, 3e-3)]
    space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}, "optimizer": ["adam", "sgd"]}
    study = make_study(search={"space": space, "trials": 9})
    others = reporting((5e-3, [0.8]), (6e-3, [0.8]), optimizer="sgd")
    failed = reporting((2e-3, [0.99]), state="failed", optimizer="adam")
    unknown = reporting((2.5e-3, [None]), optimizer="adam")
    every = [*reporting(*rows, optimizer="adam"), *others, *failed, *unknown]
    numbered = [replace(trial, number=number) for number, trial in enumerate(every)]
    assert peak_lr(study, numbered) == pytest.approx(1e-3, rel=0.5)
    assert peak_lr(study, numbered[-2:]) is None
    assert peak_lr(study, make_trials((0.1, "waiting"))) is None


@pytest.mark.parametrize("lrs", [("low", "high"), (-3.0, -1.0), (0, 0.0), (True, False)])
def test_where_a_loop_calls_something_else_lr_there_is_no_peak(lrs: tuple[Any, ...]) -> None:
    trials = reporting(*((lr, [0.5]) for lr in lrs))
    assert find_peak(make_study(), trials) is None


def test_a_metric_as_large_as_a_float_holds_is_no_crash() -> None:
    rows = [(lr, [1e308 * (1 - lr)] * 3) for lr in (1e-4, 2e-4, 4e-4, 8e-4)]
    assert peak_lr(make_study(), reporting(*rows)) in (None, 1e-4)
