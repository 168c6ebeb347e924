"""The bench of searches: its curves are whole, its verdicts right, and ours is measured through the real worker."""

from __future__ import annotations

import importlib
import itertools
import json
from typing import Any

import pytest

bench = importlib.import_module("scripts.bench_search")
RECORDED: dict[str, dict[str, Any]] = json.loads(bench.CURVES.read_text())["tasks"]


def landscape(task: str = "mnist-adam", repetition: int = 0) -> Any:
    return bench.Landscape(task, RECORDED[task], repetition)


@pytest.mark.parametrize("task", RECORDED)
def test_the_recorded_curves_are_whole(task: str) -> None:
    recorded = RECORDED[task]
    assert recorded["lrs"] == sorted(recorded["lrs"])
    assert [recorded["lrs"][0], recorded["lrs"][-1]] == recorded["range"]
    assert {len(seeds) for seeds in recorded["val_accuracy"]} == {10}
    curves = [curve for seeds in recorded["val_accuracy"] for curve in seeds]
    assert {1, recorded["epochs"]} <= {len(curve) for curve in curves} <= set(range(1, recorded["epochs"] + 1))
    assert all(0 <= accuracy <= 1 for curve in curves for accuracy in curve)


def best_of(found: Any, seeds: set[int]) -> float:
    """The learning rate of the grid with the highest final accuracy over these seeds."""
    recorded = found.recorded
    totals = [sum(curves[seed][-1] for seed in seeds) for curves in recorded["val_accuracy"]]
    return float(recorded["lrs"][totals.index(max(totals))])


def test_a_choice_is_judged_by_seeds_that_no_tuner_trains_with() -> None:
    found = landscape()
    fresh = set(range(10)) - set(found._seeds)
    assert len(fresh) == bench.FRESH
    best = best_of(found, fresh)
    assert [found.is_good(lr) for lr in (None, 1e-5, best, 1.1 * best, 1e-1)] == [False, False, True, True, False]
    curve, diverges = found.curve(1.1e-3)
    nearest = found.recorded["lrs"].index(1e-3)
    assert curve in [found.recorded["val_accuracy"][nearest][seed] for seed in found._seeds]
    assert not diverges
    assert found.whole_curve(1e-1) == found.curve(1e-1)[0] + [found.curve(1e-1)[0][-1]] * 8


def test_good_for_good_is_good_to_the_end() -> None:
    found = landscape()
    good = best_of(found, set(range(10)) - set(found._seeds))

    def steps(*rates: float | None) -> list[Any]:
        return [bench.Step(epoch, lr) for epoch, lr in enumerate(rates, start=1)]

    assert bench.settled(found, steps(None, 1e-5)) == (None, None)
    assert bench.settled(found, moved := steps(None, good, 1e-1, good, 1.1 * good)) == (moved[1], moved[3])
    assert bench.settled(found, lost := steps(good, 1e-1)) == (lost[0], None)


def test_every_tuner_reports_each_epoch_of_all_its_trials() -> None:
    found = landscape()
    ours = bench.measure("ours", found, live=False)
    assert [step.epochs for step in ours] == list(range(len(ours)))
    assert ours[8].lr == pytest.approx(1e-3, rel=2)  # every eighth of the range has been tried, for an epoch
    assert bench.TRIALS + 8 < ours[-1].epochs < bench.TRIALS * found.epochs
    script = bench.measure("optuna", found, live=False)
    assert [step.epochs for step in script] == list(range(1, len(script) + 1))
    assert bench.TRIALS < len(script) < bench.TRIALS * found.epochs
    assert {later.seconds >= earlier.seconds for earlier, later in itertools.pairwise(script)} == {True}
