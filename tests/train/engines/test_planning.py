"""On a CPU a rule decides how many lanes there are. Elsewhere they are as many as are fastest, in the fastest way.

An error while many are measured means that they do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpo.errors import UserError
from hpo.train.config import ModelConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import captured, lane_state, plain, planning, stack
from hpo.train.engines.captured import CapturedLane
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.planning import CapturedWay, LanePlan, StackedWay, plan_lanes
from tests.train.engines.trials import CPU, trial


def plan(config: TrialConfig, **options: Any) -> LanePlan:
    data = DatasetCache(device=CPU).get(config.data)
    return plan_lanes(config, data=data, captured=CapturedLanes(device=CPU), device=CPU, **options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lanes measured, as on a GPU."""
    monkeypatch.setattr(planning, "_is_by_rule", lambda device: False)


def chosen(monkeypatch: pytest.MonkeyPatch, rates: Mapping[int, float], **options: Any) -> LanePlan:
    """Return the plan where so many trials at once train so many images a second."""
    monkeypatch.setattr(planning, "_is_by_rule", lambda device: False)
    monkeypatch.setattr(planning, "_plain_rate", lambda *_, **__: rates[1])
    monkeypatch.setattr(planning, "_rate", lambda way, lanes, **_: rates[lanes])
    return plan(trial(), **options)


def test_as_many_lanes_as_are_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, {1: 100, 2: 150, 4: 250, 8: 400, 16: 410, 32: 500})
    assert (found.lanes, found.convolution) == (16, "grouped")  # 16 gained too little on 8 for 32 to be tried
    assert found.reason.startswith("16 trials at once on the CPU: ")
    assert found.reason.endswith(": 2 at once 1.5, 4 at once 2.5, 8 at once 4.0, 16 at once 4.1")


def test_one_after_another_where_lanes_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    for rates in ({1: 100, 2: 40, 4: 20, 8: 10}, {1: 100, 2: 105, 4: 107}):
        found = chosen(monkeypatch, rates)
        assert (found.lanes, found.convolution) == (1, None)
        assert found.reason.startswith("one trial at a time on the CPU: ")


def test_trials_that_are_trained_alone_take_turns_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {1: 100.0, 2: 40, 4: 20}
    found = chosen(monkeypatch, slower, num_interleaved=8)
    assert (found.lanes, found.convolution) == (8, None)
    assert (
        found.reason == "8 trials in turns on the CPU: times as fast as one after another: 2 at once 0.4, 4 at once 0.2"
    )
    assert chosen(monkeypatch, slower, num_interleaved=8, lanes=1).lanes == 1
    alone = trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "branch"}))
    assert [plan(alone, lanes=lanes, num_interleaved=8).lanes for lanes in (None, 2, 16)] == [8, 2, 8]
    faster = {1: 100.0, 2: 200, 4: 210, 8: 0}
    assert chosen(monkeypatch, faster, num_interleaved=8).convolution == "grouped"


def test_no_more_lanes_than_trials_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 100.0, 2: 190, 4: 350, 8: 0.0}  # no memory for 8
    assert chosen(monkeypatch, rates).lanes == 4
    assert chosen(monkeypatch, rates, max_lanes=3).lanes == 2


def test_trials_of_several_kinds_share_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, {}, is_one_kind=False)
    assert (found.lanes, found.is_at_once, found.is_passing) == (1, False, True)


def test_with_a_number_of_lanes_trials_of_each_kind_have_a_stack_of_their_own() -> None:
    found = plan(trial(), lanes=2, is_one_kind=False)
    assert (found.lanes, found.convolution, found.is_passing) == (2, "grouped", False)


# What goes wrong while lanes are measured


class TooMany:
    """Raises as a GPU does that lacks memory for so many lanes."""

    def __init__(self, way: Any, *, most: int, error: Exception) -> None:
        self._way, self._most, self._error = way, most, error
        self.name, self.convolution, self.is_captured = way.name, way.convolution, way.is_captured

    def fill(self, lanes: int) -> None:
        if lanes > self._most:
            raise self._error
        self._way.fill(lanes)

    def step(self) -> int:
        return int(self._way.step())

    def clear(self) -> None:
        self._way.clear()


OUT_OF_MEMORY = [
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
    torch.OutOfMemoryError("CUDA out of memory"),
    ValueError("whatever a library says"),
]


@pytest.mark.parametrize(("most", "error"), zip((0, 2, 2, 0), OUT_OF_MEMORY, strict=True))
@pytest.mark.usefixtures("measured")
def test_whatever_is_raised_with_many_lanes_means_that_they_do_not_fit(
    most: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MIN_SPEEDUP", 0.0)
    config = trial()
    way = StackedWay(config, data=DatasetCache(device=CPU).get(config.data), device=CPU, convolution="grouped")
    monkeypatch.setattr(planning, "_ways", lambda *_, **__: [lambda: TooMany(way, most=most, error=error)])
    assert plan(config).lanes == max(1, most)
    found = plan(config, lanes=4)
    assert (found.lanes, found.is_at_once) == (1, False)
    assert "they do not fit in memory" in found.reason


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__ + str(error)[:4])
def test_a_way_that_cannot_be_made_does_no_harm_to_the_others(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> planning.Way:
        raise error

    config, data = trial(), DatasetCache(device=CPU).get(trial().data)
    works = lambda: StackedWay(config, data=data, device=CPU, convolution="grouped")  # noqa: E731
    monkeypatch.setattr(planning, "_ways", lambda *_, **__: [fails, works])
    assert plan(config, lanes=2).convolution == "grouped"
    monkeypatch.setattr(planning, "_ways", lambda *_, **__: [fails])
    found = plan(config, lanes=2)
    assert (found.lanes, found.is_at_once) == (1, False)
    assert str(error)[:10] in found.reason


def test_an_error_that_makes_the_process_unusable_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is stored holds for all workers of the study, also for those on a healthy device."""

    def fails(*_: object) -> planning.Way:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(planning, "_ways", lambda *_, **__: [fails])
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    config, gpu = trial(), torch.device("cuda:0")
    data = DatasetCache(device=CPU).get(config.data)
    with pytest.raises(torch.AcceleratorError, match="unspecified launch failure"):
        plan_lanes(config, data=data, captured=CapturedLanes(device=CPU), device=gpu, lanes=2)


def test_a_users_mistake_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> planning.Way:
        raise UserError("training.precision must be another")

    monkeypatch.setattr(planning, "_ways", lambda *_, **__: [fails])
    with pytest.raises(UserError, match="must be another"):
        plan(trial(), lanes=2)


def test_measuring_draws_few_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured lanes as on a GPU, where they are the first way, and a stack: not a network for each lane measured."""
    drawn: list[int] = []
    initial_model = lane_state.initial_model

    def counting(config: TrialConfig, **options: Any) -> Any:
        drawn.append(config.seed)
        return initial_model(config, **options)

    for module in (captured, plain, stack):
        monkeypatch.setattr(module, "initial_model", counting)
    config = trial()
    data, lanes = DatasetCache(device=CPU).get(config.data), CapturedLanes(device=CPU)
    for way in (
        CapturedWay(lanes, config),
        StackedWay(config, data=data, device=CPU, convolution="grouped"),
    ):
        drawn.clear()
        for count in (2, 4, 8):
            way.fill(count)
            assert way.step() > 0
        assert len(drawn) <= 3
        way.clear()
    assert len(lanes) == 0
    made = CapturedLane(config, data=data, device=CPU)
    assert made.trial is None


@pytest.mark.usefixtures("measured")
def test_lanes_that_were_measured_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, config = CapturedLanes(device=CPU), trial()
    monkeypatch.setattr(planning, "_ways", lambda *_, **__: [lambda: CapturedWay(lanes, config)])
    monkeypatch.setattr(planning, "_plain_rate", lambda *_, **__: 100.0)
    measure, rates = planning._rate, {2: 200.0, 4: 390.0, 8: 395.0}

    def rate(way: planning.Way, count: int, **options: Any) -> float:
        assert measure(way, count, **options) > 0
        return rates[count]

    monkeypatch.setattr(planning, "_rate", rate)
    data = DatasetCache(device=CPU).get(config.data)
    found = plan_lanes(config, data=data, captured=lanes, device=CPU)
    assert (found.lanes, found.is_captured, found.is_at_once, found.convolution) == (8, True, True, None)
    monkeypatch.setattr(CapturedLane, "__init__", lambda *_, **__: pytest.fail("a lane was captured again"))
    for seed in range(8):
        lanes.admit(replace(config, seed=seed))
    assert len(lanes.run_epoch()) == 8
