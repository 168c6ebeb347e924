"""The bench of the analysis: its truths are true, and its measures measure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from scripts.bench import analysis as bench


@pytest.mark.parametrize("name", bench.MADE)
def test_the_best_rate_of_a_made_response_is_where_trials_do_best(name: str) -> None:
    random = np.random.default_rng(0)
    task = bench.MADE[name](-3.0, random)

    def mean(x: float) -> float:
        curves = [task.curve(x, random) for _ in range(1000)]
        return float(np.mean([bench.CHANCE if curve is None else curve[-1] for curve in curves]))

    everywhere = np.linspace(task.low, task.high, 21)
    assert mean(task.best) >= max(map(mean, everywhere)) - 0.01
    assert mean(task.best) == pytest.approx(float(task.worth(task.best)), abs=0.02)


def test_the_best_of_recorded_rates_is_one_that_did_well() -> None:
    tasks = [bench.recorded("mnist-adam", np.random.default_rng(seed)) for seed in range(20)]
    assert {round(10**task.best, 4) for task in tasks} <= {0.0006, 0.001, 0.0016, 0.0025, 0.004}
    assert len({task.best for task in tasks}) > 1


REPEATED = [*bench.SCENARIOS][::4]  # they differ in the task and the pruner, not in where their numbers come from


@pytest.mark.parametrize("scenario", bench.SCENARIOS)
def test_a_study_of_every_kind_is_answered_and_the_same_when_repeated(scenario: str) -> None:
    one = bench.repeat((scenario, 1))
    if scenario in REPEATED:
        assert one == bench.repeat((scenario, 1))
    assert one["interval"][0] < one["interval"][1]
    assert one["quarter"][0] <= one["quarter"][1]
    # The best rate of a made response is known to a thousandth of a decade.
    assert min(one["regret"], one["trial_regret"]) > -1e-6


def test_trials_under_asha_are_pruned() -> None:
    random = np.random.default_rng(0)
    trials = bench.run(bench.MADE["smooth"](-3.0, random), "asha", random, sampler="random")
    states = {trial.state for trial in trials}
    assert states == {"complete", "pruned", "diverged"}
    assert all(len(trial.epochs) < bench.EPOCHS for trial in trials if trial.state == "pruned")


def results(*rows: tuple[float, float, float]) -> list[dict[str, Any]]:
    return [{"best": best, "quarter": [low, high]} for best, low, high in rows]


def test_an_interval_holds_what_is_in_it_and_nearly_what_is_within_half_a_step() -> None:
    inside, near, outside, wide = results((0.5, 0, 1), (1.05, 0, 1), (1.2, 0, 1), (1.2, 0, 1.6))
    every = (inside, near, outside, wide)
    assert [bench.holds(one, "quarter") for one in every] == [True, False, False, True]
    assert [bench.holds(one, "quarter", slack=0.1) for one in every] == [True, True, False, True]
    assert bench.holds(outside, "quarter", 1.5)
    assert bench.width([inside, wide], "quarter", 2.0) == pytest.approx(2.6)


def test_a_span_is_stretched_until_it_holds_as_often() -> None:
    every = results((1.0, 0, 1), (1.5, 0, 1), (5.5, 0, 1), (99, 0, 0))
    assert bench.stretched(every, 0.25) == pytest.approx(1.0)
    assert bench.stretched(every, 0.5) == pytest.approx(2.0)
    assert bench.stretched(every, 0.75) == pytest.approx(10.0)
    assert bench.stretched(every, 1.0) == math.inf


def test_where_nothing_is_to_be_found_the_best_trial_is_above_the_truth_and_the_response_less() -> None:
    equal = [bench.flat(number) for number in range(6)]
    assert np.mean([one["trial_inflation"] for one in equal]) > 0.01
    assert abs(np.mean([one["response_inflation"] for one in equal])) < 0.008
