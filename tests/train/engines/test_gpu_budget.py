"""What a step of the plain engine and of a captured lane would cost a GPU, seen on a CPU.

A step that waits for the device, or launches more kernels than there is work for, is slow there whatever its kernels
do. A captured step has to be the same calls each time, because its graph repeats the first one. The budgets are what
was counted; they may only fall.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hpo.train.config import TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import plain
from hpo.train.engines.captured import CapturedLane
from hpo.train.engines.plain import PlainEngine, PlainLaneState, build_lane
from hpo.train.optim import build_optimizer
from tests.train.engines.dispatch import Calls
from tests.train.engines.trials import CPU, WITH_RULE, trial

# Operations that launch kernels in a step of the article's network with clipped gradients, flips and crops.
PLAIN_LAUNCHES = {
    "sgd": 69,
    "adam": 69,
    "adamw": 69,
    "nadam": 78,
    "radam": 79,
    "rmsprop": 75,
    "adamax": 76,
    "adagrad": 75,
    "adadelta": 81,
}
CAPTURED_LAUNCHES = {
    "sgd": 80,
    "adam": 81,
    "adamw": 81,
    "nadam": 92,
    "radam": 91,
    "rmsprop": 88,
    "adamax": 88,
    "adagrad": 86,
    "adadelta": 92,
}


@pytest.fixture(autouse=True)
def optimizers_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build optimizers as on a GPU: fused where torch can, and else one operation for all parameters."""

    def build(parameters: Iterator[torch.nn.Parameter], training: TrainingConfig, *, device_type: str) -> object:
        optimizer = build_optimizer(parameters, training, device_type="cuda")
        for group in optimizer.param_groups:
            group["foreach"] = not group.get("fused")
        return optimizer

    monkeypatch.setattr(plain, "build_optimizer", build)


def config_of(optimizer: str) -> TrialConfig:
    return trial(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0, schedule="cosine", gradient_clip=1.0)


def numbers_on_the_host(lane: PlainLaneState) -> list[Tensor]:
    """Return the counters of an optimizer that is not fused, which torch keeps on the host."""
    states = lane.optimizer.state.values()
    return [state[name] for state in states for name in ("step", "mu_product") if name in state]


def plain_steps(optimizer: str) -> list[Calls]:
    """Return the calls of the steps of an epoch after the first one, each with its batch."""
    config = config_of(optimizer)
    data = DatasetCache(device=CPU).get(config.data)
    engine, lane = PlainEngine(device="cpu"), build_lane(config, data=data, device=CPU)
    batches = data.train.batches(50, seed=0, epoch=0)
    engine.step(lane, *next(batches))
    steps: list[Calls] = []
    while True:
        with Calls(on_host=numbers_on_the_host(lane)) as calls:
            batch = next(batches, None)
            if batch is None:
                return steps
            engine.step(lane, *batch)
        steps.append(calls)


def begun_lane(optimizer: str) -> CapturedLane:
    """Return a captured lane whose trial has begun an epoch."""
    config = config_of(optimizer)
    data = DatasetCache(device=CPU).get(config.data)
    lane = CapturedLane(config, data=data, device=CPU)
    lane.load(build_lane(config, data=data, device=CPU))
    lane.begin_epoch()
    return lane


def captured_steps(optimizer: str) -> list[Calls]:
    """Return the calls of two full steps of an epoch."""
    lane = begun_lane(optimizer)
    steps = []
    for _ in range(2):
        with Calls() as calls:
            lane.step()
        steps.append(calls)
    return steps


@pytest.mark.parametrize("optimizer", WITH_RULE)
def test_plain_steps_never_wait(optimizer: str) -> None:
    for calls in plain_steps(optimizer):
        assert calls.waiting == []
        assert len(calls.launches) <= PLAIN_LAUNCHES[optimizer]


@pytest.mark.parametrize("optimizer", WITH_RULE)
def test_captured_steps_never_wait_and_are_the_same_calls_each_time(optimizer: str) -> None:
    one, other = captured_steps(optimizer)
    assert one.waiting == []
    assert one.seen == other.seen
    assert len(one.launches) <= CAPTURED_LAUNCHES[optimizer]


def test_the_evaluation_of_a_captured_lane_never_waits() -> None:
    lane = begun_lane("adam")
    runs = []
    for _ in range(2):
        with Calls() as calls:
            lane.evaluate()
        runs.append(calls)
    assert runs[0].waiting == []
    assert runs[0].seen == runs[1].seen


@pytest.mark.parametrize("is_same_lr", [True, False])
def test_a_plain_step_could_not_be_captured(is_same_lr: bool) -> None:
    """The control: its learning rate is a number of the host's, which a graph would repeat."""
    config = config_of("sgd")
    data = DatasetCache(device=CPU).get(config.data)
    engine, lane = PlainEngine(device="cpu"), build_lane(config, data=data, device=CPU)
    batch = next(data.train.batches(50))
    engine.step(lane, *batch)
    steps = []
    for lr in (1e-2, 1e-2 if is_same_lr else 9e-3):
        lane.optimizer.param_groups[0]["lr"] = lr
        with Calls() as calls:
            engine.step(lane, *batch)
        steps.append(calls.seen)
    assert (steps[0] == steps[1]) is is_same_lr
