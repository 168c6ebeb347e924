"""The bench of searches: its curves are whole, its verdicts right, and hpo is measured through the real worker."""

from __future__ import annotations

import itertools
import json
import statistics
from typing import Any

import pytest

from scripts.bench import search as bench
from scripts.bench.record_curves import CURVES

RECORDED: dict[str, dict[str, Any]] = json.loads(CURVES.read_text())["tasks"]


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


@pytest.mark.parametrize(
    ("task", "best"), [("mnist-adam", 1e-3), ("cifar10-adam", 1.585e-3), ("cifar10-sgd", 2.512e-2)]
)
def test_good_are_the_rates_within_a_standard_error_of_the_best(task: str, best: float) -> None:
    found = landscape(task)
    means = {
        lr: statistics.fmean(curve[-1] for curve in curves)
        for lr, curves in zip(RECORDED[task]["lrs"], RECORDED[task]["val_accuracy"], strict=True)
    }
    assert max(means, key=means.__getitem__) == best
    assert best in found.good
    worst, left_out = min(means[lr] for lr in found.good), max(means[lr] for lr in means if lr not in found.good)
    assert left_out < worst
    assert means[best] - worst < 0.02 < means[best] - means[found.low]
    assert found.is_good(best * 1.1)
    assert not found.is_good(None)


def test_a_trial_is_one_of_the_recorded_ones_and_the_same_for_every_tuner() -> None:
    found = landscape()
    curve, diverges = found.curve(1.1e-3)
    assert curve in RECORDED["mnist-adam"]["val_accuracy"][RECORDED["mnist-adam"]["lrs"].index(1e-3)]
    assert not diverges
    assert landscape().curve(1.1e-3) == (curve, diverges)
    assert len({tuple(landscape(repetition=number).curve(1.1e-3)[0]) for number in range(20)}) > 4
    assert found.whole_curve(1e-1) == found.curve(1e-1)[0] + [found.curve(1e-1)[0][-1]] * 8


def test_good_for_good_is_good_to_the_end() -> None:
    found = landscape()
    good = found.good[0]

    def steps(*rates: float | None) -> list[Any]:
        return [bench.Step(epoch, lr) for epoch, lr in enumerate(rates, start=1)]

    assert bench.settled(found, steps(None, 1e-5)) == (None, None)
    assert bench.settled(found, moved := steps(None, good, 1e-1, good, 1.1 * good)) == (moved[1], moved[3])
    assert bench.settled(found, lost := steps(good, 1e-1)) == (lost[0], None)


def test_the_share_that_is_good_is_counted_at_the_last_step_within_a_budget() -> None:
    found = landscape()
    good = [bench.Step(0, None), bench.Step(7, found.good[0]), bench.Step(40, 1e-5)]
    bad = [bench.Step(1, 1e-5), bench.Step(33, found.good[-1])]
    assert bench.BUDGETS == (8, 16, 32, 64)
    assert bench.shares([found, found], [good, bad]) == [0.5, 0.5, 0.5, 0.5]
    assert bench.shares([found], [good]) == [1, 1, 1, 0]


@pytest.mark.slow
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
