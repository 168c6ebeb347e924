"""A trial in a lane is the plain engine's, whatever its neighbours do; what cannot be stacked falls back.

Tolerances are those of `trials.py`. Between lanes and lanes it is bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.train.config import ModelConfig, TrainingConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import planning, stack
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.lane_state import initial_model
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.planning import LanePlan, plan_lanes
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.engines.stack import TrialStack, stack_key
from hpo.train.engines.stack_probe import check_stackable
from hpo.train.engines.stacked_network import NotStackable, StackedNetwork
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from hpo.train.optim import build_optimizer, update_rule, with_eps
from tests.rows import slow_except
from tests.train.engines.trials import (
    ARTICLE,
    BATCH_NORM,
    CPU,
    DROPOUT,
    EPOCHS,
    EPS,
    EVERY_NETWORK_EVERY_WAY,
    QUICK_SETTINGS,
    SETTINGS,
    UNUSUAL,
    WITH_RULE,
    assert_close,
    assert_equal,
    timeless,
    train,
    train_among,
    trial,
)

# The same trial


@pytest.mark.parametrize(
    "settings", slow_except(SETTINGS, *QUICK_SETTINGS), ids=lambda given: given.get("schedule", given["optimizer"])
)
def test_every_optimizer_and_schedule_is_the_plain_engines(settings: dict[str, Any]) -> None:
    config = trial(**settings, weight_decay=1e-2, gradient_clip=1.0, label_smoothing=0.1)
    plain = train(PlainEngine(device="cpu"), config)
    among = {lanes: train_among(config, lanes=lanes) for lanes in (1, 4)}
    for checkpoint in among.values():
        assert_close(checkpoint, plain)
        assert_equal(checkpoint, among[1])


@pytest.mark.parametrize(("model", "convolution"), EVERY_NETWORK_EVERY_WAY)
def test_every_kind_of_network_is_the_plain_engines(
    model: ModelConfig, convolution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(planning, "CONVOLUTIONS", (convolution,))
    config = trial(model=model, optimizer="sgd", momentum=0.9)
    plain = train(PlainEngine(device="cpu"), config)
    among = {lanes: train_among(config, lanes=lanes) for lanes in (1, 4, 8)}
    for checkpoint in among.values():
        assert_close(checkpoint, plain)
        if convolution == "grouped" and model is not UNUSUAL:  # for depthwise ones the kernel is chosen by the lanes
            assert_equal(checkpoint, among[1])


@pytest.mark.parametrize(("model", "convolution"), EVERY_NETWORK_EVERY_WAY)
def test_networks_stack_in_mixed_precision(model: ModelConfig, convolution: str) -> None:
    """As on a GPU, here with the CPU's autocast: the probe finds the results that the network has alone."""
    config = trial(model=model)
    data = DatasetCache(device=CPU).get(config.data)
    one, other = (initial_model(replace(config, seed=seed), data=data, device=CPU) for seed in range(2))
    images, _ = next(data.train.batches(64))
    network = StackedNetwork(one, device=CPU, convolution=convolution)
    check_stackable(network, other, images, amp_dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", slow_except([ARTICLE, BATCH_NORM, DROPOUT], BATCH_NORM), ids=["article", "batch_norm", "dropout"]
)
def test_a_diverging_neighbour_changes_nothing(model: ModelConfig) -> None:
    config = trial(model=model, optimizer="sgd", momentum=0.9, gradient_clip=None)
    healthy = train_among(config, lanes=4, neighbour={"lr": 1e-3})
    beside_nan = train_among(config, lanes=4, neighbour={"lr": 1e30, "weight_decay": 1.0})
    assert_equal(beside_nan, healthy)
    engine = LaneEngine(device="cpu", lanes=2)
    lanes = [engine.admit(config), engine.admit(replace(config, training=replace(config.training, lr=1e30)))]
    assert {result.lane: result.diverged for result in engine.run_epoch()} == {
        lanes[0]: None,
        lanes[1]: "non-finite loss",
    }


def test_neighbours_may_differ_in_all_but_their_kind() -> None:
    """Each of these equals its plain self, though they are trained together."""
    configs = [
        trial(seed=1, lr=3e-2, momentum=0.9, nesterov=True, optimizer="sgd", schedule="cosine", epochs=4),
        trial(seed=2, lr=1e-3, optimizer="sgd", gradient_clip=0.5, weight_decay=0.1),
        trial(seed=3, lr=1e-2, optimizer="sgd", momentum=0.5, label_smoothing=0.2, warmup_epochs=1),
    ]
    engine = LaneEngine(device="cpu", lanes=3)
    lanes = [engine.admit(config) for config in configs]
    for _ in range(EPOCHS):
        engine.run_epoch()
    plain = PlainEngine(device="cpu")
    for lane, config in zip(lanes, configs, strict=True):
        there = plain.admit(config)
        for _ in range(EPOCHS):
            plain.run_epoch()
        assert_close(engine.checkpoint(lane), plain.checkpoint(there))
        plain.evict(there)


def test_trials_of_several_kinds_share_an_engine() -> None:
    configs = [trial(batch_size=64), trial(batch_size=32), trial(model=BATCH_NORM), trial(optimizer="sgd")]
    engine = LaneEngine(device="cpu", lanes=4)
    lanes = [engine.admit(config) for config in configs]
    for _ in range(EPOCHS):
        assert [result.lane for _ in lanes for result in engine.run_epoch()] == lanes  # one kind after the other
    for lane, config in zip(lanes, configs, strict=True):
        result, expected = engine.checkpoint(lane).results[-1], train(PlainEngine(device="cpu"), config).results[-1]
        assert result.val_loss == pytest.approx(expected.val_loss, rel=1e-4)


@pytest.mark.parametrize("optimizer", WITH_RULE)
def test_update_rules_are_those_of_torch(optimizer: str) -> None:
    """Twelve steps of three lanes with settings of their own, some of them past RAdam's start."""
    settings: list[dict[str, Any]] = [
        {"lr": 1e-1, "weight_decay": 0.0},
        {"lr": 1e-3, "weight_decay": 0.1, "beta1": 0.5, "beta2": 0.9, "momentum": 0.9, "eps": 1e-3},
        {"lr": 1e-2, "weight_decay": 0.01, "momentum": 0.5, "nesterov": optimizer == "sgd"},
    ]
    trainings = [TrainingConfig(**{"optimizer": optimizer} | given) for given in settings]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 50, generator=generator)
    parameters = [torch.nn.Parameter(row.clone()) for row in rows]
    optimizers = [
        build_optimizer([parameter], training, device_type="cpu")
        for parameter, training in zip(parameters, trainings, strict=True)
    ]
    update = update_rule(trainings[0])
    moments = {name: torch.zeros_like(rows) for name in update.moments}
    for step in range(1, 13):
        gradients = torch.randn(3, 50, generator=generator) * 10.0 ** torch.randint(-3, 2, (3, 1), generator=generator)
        for parameter, own, gradient in zip(parameters, optimizers, gradients.clone(), strict=True):
            parameter.grad = gradient
            own.step()
        numbers = [update.factors(with_eps(training), training.lr or 0.0, step) for training in trainings]
        factors = {name: torch.tensor([[number[name]] for number in numbers]) for name in numbers[0]}
        update.apply(rows, gradients, moments, factors)
        torch.testing.assert_close(
            rows, torch.stack([parameter.detach() for parameter in parameters]), rtol=1e-5, atol=1e-6
        )


def test_a_metric_of_all_outputs_is_the_plain_engines() -> None:
    config = trial(metric="auroc", eps=EPS)
    plain = train(PlainEngine(device="cpu"), config)
    stacked = train(LaneEngine(device="cpu", lanes=2), config)
    assert_close(stacked, plain)
    for one, other in zip(stacked.results, plain.results, strict=True):
        assert one.measured == pytest.approx(other.measured, rel=1e-4)
        assert other.measured.keys() == {"auroc"}


# The contract


def test_lanes_are_taken_freed_and_taken_again() -> None:
    engine = LaneEngine(device="cpu", lanes=3)
    assert engine.free_lanes == 1  # until there is a trial to choose by
    lanes = [engine.admit(trial(seed=seed)) for seed in range(3)]
    assert (len(set(lanes)), engine.free_lanes) == (3, 0)
    assert {result.lane for result in engine.run_epoch()} == set(lanes)
    engine.evict(lanes[1])
    assert engine.free_lanes == 1
    assert engine.admit(trial(seed=9)) == lanes[1]
    assert {result.lane: result.epoch for result in engine.run_epoch()} == {lanes[0]: 2, lanes[1]: 1, lanes[2]: 2}


def test_a_trial_that_cannot_be_admitted_disturbs_nobody() -> None:
    from hpo.errors import UserError

    engine = LaneEngine(device="cpu", lanes=3)
    lane = engine.admit(trial())
    for wrong in (trial(lr=None), trial(optimizer="adm"), trial(model=ModelConfig(name="none"))):
        with pytest.raises(UserError):
            engine.admit(wrong)
        assert engine.free_lanes == 2
    assert [result.lane for result in engine.run_epoch()] == [lane]


def test_stops_before_the_next_step_and_forgets_what_was_begun() -> None:
    calls = iter([False, False, True])
    engine = LaneEngine(device="cpu", lanes=2, should_stop=lambda: next(calls, False))
    lanes = [engine.admit(trial()), engine.admit(trial(seed=4))]
    with pytest.raises(Stopped):
        engine.run_epoch()
    with pytest.raises(AssertionError, match=r"in the middle of an epoch"):
        engine.checkpoint(lanes[0])
    for lane in lanes:
        engine.evict(lane)
    assert train(engine, trial()).epoch == EPOCHS


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        *[
            pytest.param(ARTICLE, given, marks=[] if given in QUICK_SETTINGS else [pytest.mark.slow])
            for given in SETTINGS[: len(WITH_RULE)]
        ],
        pytest.param(BATCH_NORM, SETTINGS[0], marks=pytest.mark.slow),
        (DROPOUT, SETTINGS[0]),
    ],
    ids=lambda given: given.name if isinstance(given, ModelConfig) else given["optimizer"],
)
def test_checkpoints_go_on_in_either_engine(model: ModelConfig, settings: dict[str, Any]) -> None:
    """In lanes bit for bit, between lanes and the plain engine up to rounding."""
    config = trial(model=model, **settings)
    whole = {
        "lanes": train(LaneEngine(device="cpu", lanes=4), config),
        "plain": train(PlainEngine(device="cpu"), config),
    }
    makers: dict[str, Callable[[], Engine]] = {
        "lanes": lambda: LaneEngine(device="cpu", lanes=4),
        "plain": lambda: PlainEngine(device="cpu"),
    }
    for before, make in makers.items():
        engine = make()
        lane = engine.admit(config)
        engine.run_epoch()
        checkpoint = engine.checkpoint(lane)
        for after, make_other in makers.items():
            other = make_other()
            if after == "lanes":
                other.admit(replace(config, seed=1))  # not alone
            lane = other.admit(config, checkpoint)
            for _ in range(1, EPOCHS):
                other.run_epoch()
            last = other.checkpoint(lane)
            if before == after:
                assert_equal(last, whole[after])
            else:
                assert_close(last, whole[after])


# What cannot be stacked


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("branch", "data-dependent control flow"),
        ("python_random", "draws random numbers on the host"),
        ("torch_random", "random"),
        ("unused", "does not depend on"),
        ("constant", "gives other results than alone"),
        ("counter", "change their own attributes"),
        ("frozen", "not trained"),
        ("state", "get_extra_state"),
        ("torchscript", "TorchScript"),
    ],
)
def test_other_networks_fall_back_and_say_why(kind: str, reason: str) -> None:
    config = trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": kind}))
    engine = LaneEngine(device="cpu", lanes=4)
    checkpoint = train(engine, config)
    assert engine.plan is not None
    assert (engine.plan.lanes, engine.plan.convolution) == (1, None)
    assert reason in engine.plan.reason
    assert_equal(checkpoint, train(PlainEngine(device="cpu"), config))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"data": {"placement": "stream"}}, "images are not on the device"),
        ({"compile": True}, "training.compile"),
        ({"optimizer": "asgd"}, "cannot be stacked, optimizer 'asgd' has no update rule for several trials at once"),
        ({"loss": "bce"}, "a stack has no loss but the cross-entropy without class weights"),
        ({"class_weights": "balanced"}, "a stack has no loss but the cross-entropy without class weights"),
        ({"optimizer_options": {"amsgrad": True}}, "know no training.optimizer_options"),
        ({"mixup": 0.2}, "training.mixup and training.cutmix mix the images of each batch"),
        ({"ema": 0.9}, "training.ema averages the weights"),
        ({"gradient_accumulation": 2}, "training.gradient_accumulation trains a single network"),
        ({"activation_checkpointing": True}, "training.activation_checkpointing computes parts of a single network"),
    ],
)
def test_settings_that_need_a_network_to_themselves_fall_back(changed: dict[str, Any], reason: str) -> None:
    config = trial(**changed)
    data = DatasetCache(device=CPU).get(config.data)
    choice = plan_lanes(config, data=data, captured=CapturedLanes(device=CPU), device=CPU, lanes=4)
    assert choice.lanes == 1
    assert reason in choice.reason


def test_trials_in_fp16_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "mixed_precision", lambda training, *, device: torch.float16)
    data = DatasetCache(device=CPU).get(trial().data)
    with pytest.raises(NotStackable, match="in fp16 each trial skips steps of its own"):
        TrialStack(trial(), data=data, device=CPU, convolution="grouped")


def test_augmented_trials_share_a_stack() -> None:
    config = trial(data={"augment": ["RandAugment", "RandomErasing"]})
    assert_close(train_among(config, lanes=3), train(PlainEngine(device="cpu"), config))
    assert stack_key(config) != stack_key(trial(mixup=0.2))


def test_what_the_probe_could_not_see_ends_the_stack_and_not_the_kind() -> None:
    config = trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "last_batch"}))
    engine = LaneEngine(device="cpu", lanes=3)
    lanes = [engine.admit(config), engine.admit(replace(config, seed=8))]
    with pytest.raises(IndexError):
        engine.run_epoch()
    for lane in lanes:
        engine.evict(lane)
    assert_equal(train(engine, config), train(PlainEngine(device="cpu"), config))


def test_memory_that_runs_out_at_the_door_leaves_those_inside_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = trial()
    expected = train_among(config, lanes=2, neighbour={"lr": 1e-3})
    cat, countdown = torch.cat, [0]

    def short_of_memory(*args: Any, **rest: Any) -> Tensor:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return cat(*args, **rest)

    engine = LaneEngine(device="cpu", lanes=4)
    lane = engine.admit(config)
    engine.admit(replace(config, seed=10))
    monkeypatch.setattr(torch, "cat", short_of_memory)
    for nth in (1, 3, 5):
        countdown[0] = nth
        with pytest.raises(torch.OutOfMemoryError):
            engine.admit(replace(config, seed=11))
        assert engine.free_lanes == 2
    countdown[0] = 0
    for _ in range(EPOCHS):
        assert len(engine.run_epoch()) == 2
    assert_equal(engine.checkpoint(lane), expected)


@pytest.mark.parametrize("kind", ["branch", "torchscript"])
def test_one_that_cannot_be_stacked_trains_beside_those_that_are(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    alone = trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": kind}))
    engine = LaneEngine(device="cpu", lanes=3)
    lanes = [engine.admit(trial()), engine.admit(alone), engine.admit(trial(seed=5))]
    assert engine.next_lanes == [lanes[0], lanes[2]]
    assert [result.lane for result in engine.run_epoch()] == [lanes[0], lanes[2]]
    assert engine.next_lanes == [lanes[1]]
    assert [result.lane for result in engine.run_epoch()] == [lanes[1]]
    assert "trains alone" in caplog.text
    plain = PlainEngine(device="cpu")
    plain.admit(alone)
    assert timeless(plain.run_epoch()) == timeless(list(engine.checkpoint(lanes[1]).results))


# Turns and plans


def test_no_trial_has_two_turns_before_every_other_has_one() -> None:
    configs = [trial(seed=seed) for seed in range(3)]
    turns = LanePlan(device="the CPU", lanes=3, convolution=None, reason="agreed")
    engine = LaneEngine(device="cpu", get_or_set_plan=lambda device, measure: turns)
    first, second = engine.admit(configs[0]), engine.admit(configs[1])
    order = [engine.run_epoch()[0].lane]
    third = engine.admit(configs[2])  # joins at the end
    order += [engine.run_epoch()[0].lane for _ in range(3)]
    engine.evict(second)
    order += [engine.run_epoch()[0].lane for _ in range(2)]
    assert order == [first, second, first, third, first, third]
    plain = PlainEngine(device="cpu")
    plain.admit(configs[2])
    assert timeless([*plain.run_epoch(), *plain.run_epoch()]) == timeless(list(engine.checkpoint(third).results))


def test_every_engine_does_what_was_agreed_on() -> None:
    agreed = LanePlan(device="the CPU", lanes=3, convolution="products", reason="first come")
    engine = LaneEngine(device="cpu", lanes=2, get_or_set_plan=lambda device, measure: {"the CPU": agreed}[device])
    engine.admit(trial())
    assert (engine.plan, engine.free_lanes) == (agreed, 2)


def test_measuring_leaves_no_trace_in_a_trial() -> None:
    config = trial(model=DROPOUT)
    engine = LaneEngine(device="cpu")
    measured = train(engine, config)
    assert engine.plan is not None
    alone = engine.plan.convolution is None
    assert_equal(measured, train(PlainEngine(device="cpu") if alone else LaneEngine(device="cpu", lanes=2), config))


def num_captured(engine: LaneEngine) -> int:
    """Return how many captured lanes hold memory: those with a trial and those that wait for one."""
    return len(engine._captured) + len(engine._captured._idle)


CAPTURED_PLAN = LanePlan(device="the CPU", lanes=4, convolution=None, reason="agreed", is_captured=True)


def test_fewer_lanes_take_less_memory_whenever_their_trials_leave() -> None:
    engine = LaneEngine(device="cpu", get_or_set_plan=lambda device, measure: CAPTURED_PLAN)
    lanes = [engine.admit(trial(seed=seed)) for seed in range(4)]
    engine.evict(lanes.pop())
    assert num_captured(engine) == 4  # the next trial needs no new one
    engine.limit_lanes(2)
    assert num_captured(engine) == 3
    for lane in lanes:
        engine.evict(lane)
    assert num_captured(engine) == 2


def test_a_suspect_has_the_memory_of_the_device_to_itself() -> None:
    engine = LaneEngine(device="cpu", get_or_set_plan=lambda device, measure: CAPTURED_PLAN)
    engine.evict(engine.admit(trial()))
    assert num_captured(engine) == 1
    engine.admit(trial(), may_share=False)
    assert num_captured(engine) == 0


def test_lanes_that_were_measured_for_a_plan_that_does_not_hold_are_freed() -> None:
    agreed = LanePlan(device="the CPU", lanes=1, convolution=None, reason="first come")

    def lose_the_race(device: str, measure: object) -> LanePlan:
        engine._captured.fill(trial(), 4)
        engine._captured.clear()
        return agreed

    engine = LaneEngine(device="cpu", get_or_set_plan=lose_the_race)
    engine.admit(trial())
    assert num_captured(engine) == 0


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_the_same_on_a_gpu(convolution: str) -> None:
    config = trial(model=BATCH_NORM, optimizer="sgd", momentum=0.9, precision="fp32")
    plain = train(PlainEngine(device="cuda"), config)
    device = torch.device("cuda")
    group = TrialStack(
        config, data=DatasetCache(device=device).get(config.data), device=device, convolution=convolution
    )
    group.admit(replace(config, seed=1))
    last = train(group, config)
    for result, expected in zip(last.results, plain.results, strict=True):
        assert result.val_loss == pytest.approx(expected.val_loss, rel=1e-2)
