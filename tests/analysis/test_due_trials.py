"""Which learning rates are trained again, and which networks are tested."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.due_trials import candidates, plan_due_trials
from tests.analysis.confirmation_examples import RATES, again, make_study, make_trial, make_trials


@pytest.mark.parametrize(
    ("rows", "top", "expected"),
    [
        ([(1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8), (1e-1, "diverged")], 2, [1e-3, 1e-2]),
        ([(1e-4, 0.5), (1e-3, 0.9), (1.1e-3, 0.89), (1e-2, 0.8)], 2, [1e-3, 1e-2]),  # 1.1e-3 is no other rate
        ([(1e-4, 0.5), (1e-3, "pruned"), (1e-2, 0.8)], 3, [1e-2, 1e-4]),
        ([(1e-3, 0.9), (1e-3, 0.1), (1e-2, 0.8), (1e-4, 0.7)], 3, [1e-3, 1e-2, 1e-4]),  # 1e-3 won, whatever its mean
    ],
)
def test_the_best_different_rates_are_trained_again(
    rows: list[tuple[float, float | str]], top: int, expected: list[float]
) -> None:
    study, trials = make_study(top=top), make_trials(*rows)
    found = find_best(study, trials)
    assert found is not None
    assert [params["lr"] for params in candidates(study, trials, found)] == expected


def test_the_answers_rate_comes_first_where_any_can_be_trained_and_a_tried_one_where_not() -> None:
    rows = [(10 ** (-4 + 0.5 * n), 0.9 - 0.1 * abs(n - 2.7)) for n in range(7)]
    trials = make_trials(*rows)
    free = make_study(search={"sampler": "random", "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}}})
    listed = make_study(search={"sampler": "random", "space": {"lr": [rate for rate, _ in rows]}})
    for study in (free, listed):
        found = find_best(study, trials)
        assert found is not None
        assert found.response is not None
        first = candidates(study, trials, found)[0]["lr"]
        assert (first in [rate for rate, _ in rows]) == (study is listed)
        if study is free:
            assert first == pytest.approx(found.response.best, rel=1e-5)


def test_a_searched_seed_is_left_out_and_its_trials_count_with_their_mean() -> None:
    study = make_study(top=2, search={"sampler": "grid", "space": {"lr": RATES, "seed": [0, 1]}})
    trials = [
        make_trial(2 * index + seed, {"lr": RATES[index], "seed": seed}, value)
        for index, pair in enumerate([(0.95, 0.2), (0.8, 0.8), (0.7, 0.9), (0.1, 0.1)])
        for seed, value in enumerate(pair)
    ]
    found = find_best(study, trials)
    assert found is not None
    assert candidates(study, trials, found) == [{"lr": 1e-4}, {"lr": 1e-3}]


def test_every_rate_gets_the_same_seeds_and_the_winners_networks_are_tested() -> None:
    study = make_study(top=2, seeds=3)
    study = replace(study, metadata={**study.metadata, "has_test": True})
    trials = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8))
    found = find_best(study, trials)
    assert found is not None
    planned = plan_due_trials(study, trials, found)
    assert [(one.kind, one.params["lr"], one.replicate) for one in planned] == [
        ("confirm", rate, seed) for seed in range(3) for rate in (1e-3, 1e-2)
    ]
    trials += again(trials, [0.8, 0.7, "failed"], [0.9, 0.85, 0.95], params=[{"lr": 1e-3}, {"lr": 1e-2}])
    found = find_best(study, trials)
    assert found is not None
    assert found.confirmation is not None
    assert (found.trial, found.value, found.lr) == (1, 0.9, 1e-2)  # the trial is the search's, the rate is confirmed
    tests = plan_due_trials(study, trials, found)
    assert [(one.kind, one.params["lr"], one.tested) for one in tests] == [("test", 1e-2, n) for n in (6, 7, 8)]
