"""On a CPU the number of lanes follows from the study, never from a clock, and no trial's digits depend on it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from hpo.train.config import ModelConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import planning, stack_rule
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.planning import LanePlan, plan_lanes
from tests.train.engines.trials import CPU, EPOCHS, UNUSUAL, assert_equal, train_among, trial

SMALL = trial(model=ModelConfig(name="own_lane_networks:small"), batch_size=32)


def plan(config: TrialConfig, **options: Any) -> LanePlan:
    data = DatasetCache(device=CPU).get(config.data)
    return plan_lanes(config, data=data, captured=CapturedLanes(device=CPU), device=CPU, **options)


def test_no_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a loaded machine would have measured, each of these studies has one plan."""
    rates = itertools.cycle([1.0, 1000.0, 3.0, 1.0])
    monkeypatch.setattr(planning, "_fastest_rate", lambda *_, **__: next(rates))
    for config in (SMALL, trial()):
        assert plan(config) == plan(config)


def test_trials_of_small_networks_train_at_once_where_they_are_many() -> None:
    found = plan(SMALL)
    assert (found.lanes, found.convolution, found.is_passing) == (stack_rule.MAX_STACKED, "grouped", False)
    assert found.reason.startswith("16 trials at once on the CPU: a batch takes 0.")
    assert plan(SMALL, max_lanes=9).lanes == 9
    few = plan(SMALL, max_lanes=7, num_interleaved=3)
    assert (few.lanes, few.convolution) == (3, None)
    assert few.reason == "3 trials in turns on the CPU: fewer than 8 trials gain nothing at once"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (trial(), "one trial at a time on the CPU: a batch takes 2"),
        (
            replace(
                SMALL, training=replace(SMALL.training, batch_size=2), model=ModelConfig(name="own_lane_networks:wide")
            ),
            "one trial at a time on the CPU: a batch takes 0.",
        ),
    ],
    ids=["operations", "parameters"],
)
def test_trials_of_larger_networks_train_one_after_another(config: TrialConfig, reason: str) -> None:
    found = plan(config)
    assert (found.lanes, found.convolution) == (1, None)
    assert found.reason.startswith(reason)
    assert found.reason.endswith("and trials at once gain up to 4 MFLOP and 50,000 parameters")


def test_networks_whose_digits_depend_on_the_number_of_lanes_train_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels of depthwise convolutions are chosen by the number of groups, which are channels times lanes."""
    monkeypatch.setattr(stack_rule, "MAX_FLOPS", 10**9)
    found = plan(trial(model=UNUSUAL))
    assert (found.lanes, found.convolution) == (1, None)
    assert found.reason.endswith("its last digits in a stack depend on the number of lanes")


def test_a_suspect_has_the_digits_that_it_has_beside_others() -> None:
    config = trial()
    engine = LaneEngine(device="cpu", lanes=4)
    engine.evict(engine.admit(config))
    lane = engine.admit(config, may_share=False)
    other = engine.admit(replace(config, seed=8))
    assert engine.next_lanes == [lane]
    for _ in range(EPOCHS):
        engine.run_epoch()
        engine.run_epoch()
    assert other != lane
    assert_equal(engine.checkpoint(lane), train_among(config, lanes=4))
