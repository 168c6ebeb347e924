"""The answer: which trial is best, and which learning rates did as well."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpo.analysis import Best, best, standard_error
from hpo.records import Study, Trial
from hpo.spec import StudySpec


def make_study(num_val: int | None = 400, **settings: Any) -> Study:
    spec = StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}, **settings})
    return Study(1, "s", spec, {} if num_val is None else {"num_val": num_val}, None, None, 0.0)


def make_trials(*rows: tuple[float, float | str], **params: Any) -> list[Trial]:
    """Trials from (learning rate, value), or (learning rate, state) for those that did not complete."""
    return [
        Trial(
            number=number,
            state="complete" if isinstance(result, float) else result,
            params={"lr": lr, **params},
            value=result if isinstance(result, float) else None,
            attempt=1,
            reason=None,
            error=None,
            worker_id=None,
            attributes={},
            started=None,
            ended=None,
        )
        for number, (lr, result) in enumerate(rows)
    ]


def test_no_complete_trial_no_answer() -> None:
    assert best(make_study(), make_trials((0.1, "diverged"), (0.2, "failed"), (0.3, "running"))) is None


def test_the_best_is_the_highest_value_or_the_lowest_where_that_is_asked_for() -> None:
    trials = make_trials((0.1, 0.5), (0.2, 0.7), (0.3, 0.6))
    assert best(make_study(), trials) == Best(1, {"lr": 0.2}, 0.7, (0.2, 0.2))
    found = best(make_study(num_val=None, objective={"function": "m:f", "direction": "minimize"}), trials)
    assert found == Best(0, {"lr": 0.1}, 0.5, None)


def test_among_equal_values_the_lower_validation_loss_wins() -> None:
    trials = make_trials((0.1, 0.9), (0.2, 0.9), (0.3, 0.9))
    for trial, loss in zip(trials, (0.5, 0.3, None), strict=True):
        trial.curves["val_loss"] = [1.0, loss]  # type: ignore[index]
    found = best(make_study(), trials)
    assert found is not None
    assert found.trial == 1


@pytest.mark.parametrize(
    ("rows", "interval"),
    [
        # 0.90 on 400 pictures has a standard error of 0.015
        ([(1e-4, 0.80), (1e-3, 0.89), (3e-3, 0.90), (1e-2, 0.886), (1e-1, 0.5)], (1e-3, 1e-2)),
        ([(1e-4, 0.895), (1e-3, 0.80), (3e-3, 0.90)], (3e-3, 3e-3)),  # a worse one in between ends it
        ([(1e-3, 0.89), (3e-3, 0.90), (1e-2, "diverged"), (2e-2, 0.90)], (1e-3, 3e-3)),
        ([(1e-3, "pruned"), (3e-3, 0.90), (1e-2, 0.89)], (3e-3, 1e-2)),
        ([(1e-3, "failed"), (2e-3, 0.89), (3e-3, 0.90)], (2e-3, 3e-3)),
        ([(1e-4, 0.89), (1e-3, "failed"), (3e-3, 0.90)], (1e-4, 3e-3)),  # a failure says nothing about its rate
    ],
)
def test_the_interval_is_what_was_tried_around_the_best_within_one_standard_error(
    rows: list[tuple[float, float | str]], interval: tuple[float, float]
) -> None:
    found = best(make_study(), make_trials(*rows))
    assert found is not None
    assert found.interval == interval


def test_other_optimizers_do_not_count_towards_the_interval() -> None:
    trials = make_trials((1e-3, 0.90), (3e-3, 0.91), optimizer="adam") + make_trials((1e-2, 0.905), optimizer="sgd")
    study = make_study(search={"space": {"lr": [0.1, 0.2], "optimizer": ["adam", "sgd"]}})
    found = best(study, trials)
    assert found is not None
    assert found.interval == (1e-3, 3e-3)


def test_neither_do_other_values_of_a_listed_number_and_replicates_count_with_their_mean() -> None:
    study = make_study(search={"space": {"lr": [0.1, 0.2], "batch_size": [32, 256], "seed": [0, 1]}})
    trials = make_trials((1e-3, 0.90), (1e-2, 0.895), batch_size=32, seed=0)
    trials += make_trials((1e-3, 0.5), batch_size=256, seed=0)
    trials += make_trials((1e-3, 0.7), (1e-2, 0.889), batch_size=32, seed=1)
    found = best(study, trials)
    assert found is not None
    assert found.interval == (1e-3, 1e-2)
    worse = best(study, trials + make_trials((1e-2, 0.6), batch_size=32, seed=2))
    assert worse is not None
    assert worse.interval == (1e-3, 1e-3)


def test_the_standard_error_is_the_binomial_one_and_not_zero_at_100_percent() -> None:
    assert standard_error(0.9, 10_000) == pytest.approx(math.sqrt(0.9 * 0.1 / 10_000), rel=1e-2)
    assert 0.005 < standard_error(1.0, 144) < 0.02
