"""The race over seeds: who is trained on another one, and how often a rate is called worse by luck."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hpo.study.seed_race import FIRST_SEEDS, VERDICT_ERROR, SeedResults, error_of_look, find_lead, racing_on


def results(*values: float | None, num_diverged: int = 0) -> SeedResults:
    return SeedResults(values, num_diverged)


def race(values_KS: Any, *, grain: float = 0.0) -> tuple[list[int], list[int]]:
    """Return how many seeds each rate got of those given, and which rates were in the race at its end."""
    num_seeds, max_seeds = [FIRST_SEEDS] * len(values_KS), len(values_KS[0])
    while True:
        rates = [results(*values[:num]) for values, num in zip(values_KS, num_seeds, strict=True)]
        left = racing_on(rates, max_seeds=max_seeds, grain=grain)
        last = [index for index, num in enumerate(num_seeds) if num == max(num_seeds)]
        if not left or max(num_seeds) == max_seeds:
            return num_seeds, left or [min(last, key=lambda index: rates[index].rank)]
        for index in left:
            num_seeds[index] += 1


CLEAR = [[0.90, 0.91, 0.905, 0.9, 0.91], [0.80, 0.81, 0.804, 0.8, 0.81], [0.70, 0.71, 0.706, 0.7, 0.71]]


def test_rates_that_are_clearly_apart_cost_three_seeds_and_others_all() -> None:
    assert race(CLEAR) == ([3, 3, 3], [0])
    assert race([CLEAR[0], CLEAR[0]], grain=1e-3) == ([5, 5], [0, 1])
    rival = [0.91, 0.90, 0.9, 0.91, 0.905]
    assert race([CLEAR[0], rival, CLEAR[2]]) == ([5, 5, 3], [0, 1])
    assert race([CLEAR[0]]) == ([5], [0])  # a single one: its value is what is asked for


def test_a_rate_that_diverged_more_often_is_out_where_it_cannot_catch_up() -> None:
    good, once, thrice = results(0.9, 0.9, 0.9), results(0.95, None, 0.95, num_diverged=1), results(None, None, None)
    assert racing_on([good, once], max_seeds=5, grain=1e-3) == [0, 1]
    assert racing_on([good, once], max_seeds=3, grain=1e-3) == []
    assert racing_on([good, SeedResults(thrice.values, 3)], max_seeds=5, grain=1e-3) == []
    assert racing_on([thrice, thrice], max_seeds=5, grain=1e-3) == [0, 1]  # failed: they say nothing


@pytest.mark.parametrize("max_seeds", [2, 3, 4, 5, 20])
def test_all_looks_together_have_the_whole_error_and_the_last_one_half_of_it(max_seeds: int) -> None:
    looks = [error_of_look(seed, max_seeds=max_seeds) for seed in range(min(FIRST_SEEDS, max_seeds), max_seeds + 1)]
    assert sum(looks) == pytest.approx(VERDICT_ERROR)
    assert looks[-1] >= VERDICT_ERROR / 2


def test_a_lead_is_that_of_a_paired_t_test_on_the_seeds_that_completed_for_both() -> None:
    first, second = [0.5, 0.7, 0.65, 0.9], [0.45, 0.52, 0.61]
    lead = find_lead(results(*first, None), results(*second, None, 0.3), max_seeds=5, grain=0.0)
    test = stats.ttest_rel(first[:3], second)
    interval = test.confidence_interval(1 - error_of_look(5, max_seeds=5))
    assert lead is not None
    assert (lead.mean, *lead.interval) == pytest.approx(
        (np.mean(np.subtract(first[:3], second)), interval.low, interval.high)
    )
    assert find_lead(results(0.5, None), results(0.4, 0.3), max_seeds=5, grain=0.0) is None


@pytest.mark.parametrize("deviations", [(1, 1), (1, 1, 1), (1, 3)])
def test_of_equal_rates_one_is_called_worse_in_at_most_a_twentieth_of_races(deviations: Sequence[float]) -> None:
    random, num_races, num_worse, num_other = np.random.default_rng(0), 1500, 0, 0
    for _ in range(num_races):
        values = random.standard_normal((len(deviations), 6)) * np.array(deviations)[:, None]
        num_seeds, left = race(values.tolist())
        leaders = sorted(left, key=lambda index: -values[index, : max(num_seeds)].mean())
        num_worse += len(leaders) == 1
        num_other += leaders[0] != values.mean(axis=1).argmax()
    assert num_worse <= 0.06 * num_races
    assert num_other <= 0.01 * num_races  # the best on all seeds has hardly ever left before


def test_order_and_names_of_rates_change_nothing() -> None:
    rates = [results(*values[:3]) for values in CLEAR[:2]] + [results(0.9, 0.92, 0.9)]
    for order in itertools.permutations(range(3)):
        left = racing_on([rates[index] for index in order], max_seeds=5, grain=0.0)
        assert {order[index] for index in left} == {0, 2}
