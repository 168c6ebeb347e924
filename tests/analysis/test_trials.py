"""Which trial is the best, and how sure its accuracy is."""

from __future__ import annotations

import math

import pytest

from hpo.analysis.trials import best_trial, race_progress
from hpo.study.chance import standard_error
from tests.analysis.examples import make_study, make_trials, reporting


def test_among_equal_values_the_lower_validation_loss_wins() -> None:
    trials = make_trials((0.1, 0.9), (0.2, 0.9), (0.3, 0.9))
    for trial, loss in zip(trials, (0.5, 0.3, None), strict=True):
        trial.curves["val_loss"] = [1.0, loss]  # type: ignore[index]
    found = best_trial(make_study(), trials)
    assert found is not None
    assert found.number == 1


def test_a_race_is_as_far_as_its_epochs_until_it_is_over() -> None:
    space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}
    study = make_study(search={"sampler": "race", "space": space}, training={"epochs": 10})
    waiting = [*reporting((1e-3, [0.1, 0.2]), (1e-2, [0.3]), state="waiting"), *make_trials((1e-1, "waiting"))]
    assert race_progress(study, waiting) == (3, 20)
    assert race_progress(study, make_trials((1e-3, 0.5), (1e-2, "pruned"))) is None
    assert race_progress(make_study(), waiting) is None


def test_the_standard_error_is_the_binomial_one_and_not_zero_at_100_percent() -> None:
    assert standard_error(0.9, 10_000) == pytest.approx(math.sqrt(0.9 * 0.1 / 10_000), rel=1e-2)
    assert 0.005 < standard_error(1.0, 144) < 0.02
