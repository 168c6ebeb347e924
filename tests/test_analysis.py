"""The answer: which trial is best, and which learning rates did as well."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from hpo.analysis import Best, Peak, best, peak, standard_error
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


def reporting(*rows: tuple[float, list[float | None]], state: str = "running", **params: Any) -> list[Trial]:
    """Trials in training, from (learning rate, accuracy after each epoch)."""
    return [
        replace(trial, curves={"val_accuracy": curve}, epochs=range(1, len(curve) + 1))
        for trial, (_, curve) in zip(make_trials(*((lr, state) for lr, _ in rows), **params), rows, strict=True)
    ]


def parabola(lr: float, top: float) -> float:
    return 0.9 - 0.1 * math.log10(lr / top) ** 2


def peak_lr(study: Study, trials: list[Trial]) -> float | None:
    found = peak(study, trials)
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
    assert peak_lr(make_study(), reporting(*((lr, [parabola(lr, 1.5e-3)]) for lr in rates))) in (1e-3, 2e-3)


def test_a_response_that_bends_upward_leaves_the_best() -> None:
    rows = [(lr, [0.9 + 0.1 * math.log10(lr / 1e-3) ** 2]) for lr in (5e-4, 1e-3, 2e-3, 5e-3)]
    assert peak(make_study(), reporting(*rows)) == Peak(5e-3, 1, fitted=False)


def test_trials_are_compared_after_as_many_epochs_as_five_of_them_have_come_to() -> None:
    long = [(lr, [0.1, parabola(lr, 3e-3), 0.0]) for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    last = (6e-3, [0.1, parabola(6e-3, 3e-3)])
    short = [(lr, [0.95]) for lr in (3e-4, 4e-4)]  # their first epoch was good, and nobody's second is known
    assert peak(make_study(), reporting(*long, last, *short)) == Peak(pytest.approx(3e-3), 2, fitted=True)


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
    assert peak(make_study(), trials) is None


def test_a_metric_as_large_as_a_float_holds_is_no_crash() -> None:
    rows = [(lr, [1e308 * (1 - lr)] * 3) for lr in (1e-4, 2e-4, 4e-4, 8e-4)]
    assert peak_lr(make_study(), reporting(*rows)) in (None, 1e-4)
