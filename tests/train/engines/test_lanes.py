"""A trial in a lane is the plain engine's, whatever its neighbours do; what cannot be stacked falls back.

Tolerances: losses agree to 1e-4 and parameters to 1e-3 of the largest (and 1e-6), over 3 epochs in float32. That is
rounding, which training amplifies: products are added in another order. Between lanes and lanes it is bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.train.checkpoint import Checkpoint
from hpo.train.config import DataConfig, EpochResult, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import lanes as lanes_module
from hpo.train.engines.lane_state import initial_model
from hpo.train.engines.lanes import LaneEngine, LanePlan, plan_lanes
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.engines.stack import TrialStack, with_eps
from hpo.train.engines.stack_probe import check_stackable
from hpo.train.engines.stacked_network import StackedNetwork
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from hpo.train.optim import OPTIMIZERS, SCHEDULES, build_optimizer
from tests.rows import slow_except

EPOCHS = 3
CPU = torch.device("cpu")
MOMENTUM = {"sgd": 0.9, "rmsprop": 0.5}
# With the usual eps of 1e-8, rounding in place of a gradient that is zero would make whole steps of Adam's; the rules
# themselves are held to torch's with it, and without, below.
EPS = 1e-4
SETTINGS = [{"optimizer": name, "momentum": MOMENTUM.get(name, 0.0), "eps": EPS} for name in OPTIMIZERS] + [
    {"optimizer": "sgd", "momentum": 0.9, "schedule": name, "warmup_epochs": 0.5, "step_epochs": 1, "milestones": (1,)}
    for name in SCHEDULES
]
QUICK_SETTINGS = [
    given for given in SETTINGS if given["optimizer"] == "adam" or given.get("schedule") in ("one_cycle", "plateau")
]

# Convolutions without a bias in front of a batch norm: the gradient of that would be rounding and nothing else.
NETWORKS = """
import random
import torch
from torch import nn
from torch.nn import functional as F

def block(inputs, outputs, stride):
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

def batch_norm(*, channels, num_classes):
    head = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, num_classes)]
    return nn.Sequential(*block(channels, 8, 4), *block(8, 8, 2), *head)

def dropout(*, channels, num_classes):
    body = [nn.Conv2d(channels, 8, 3, stride=4, padding=1), nn.Dropout(0.3), nn.ReLU(inplace=True)]
    head = [nn.Conv2d(8, 8, 3, stride=2), nn.Dropout2d(0.2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)]
    return nn.Sequential(*body, *head, nn.Linear(72, num_classes))

class Named(nn.Conv2d):
    def forward(self, images):
        images = F.conv2d(input=images, weight=self.weight, bias=self.bias, padding=1)
        return F.avg_pool2d(input=F.dropout(input=images, p=0.1, training=self.training), kernel_size=1)

def unusual(*, channels, num_classes):
    # Pooling and batch norm of what is the same for all lanes, groups, dilation, padding by name, other norms,
    # a running mean that is nothing but rounding, arguments by name.
    body = [nn.AvgPool2d(2), nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 3, stride=2, bias=False), nn.GELU()]
    body += [nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, dilation=2)]
    body += [nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), Named(8, 8, 3)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, num_classes)]
    return nn.Sequential(*body, *head)

class Doubtful(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.unused, self.calls = kind, nn.Linear(1024, 10), None, 0
        self.constant = torch.randn(10)
        if kind == "unused":
            self.unused = nn.Parameter(torch.zeros(3))
        if kind == "frozen":
            self.layer.bias.requires_grad_(False)

    def forward(self, images):
        logits = self.layer(images.flatten(1))
        if self.kind == "branch":
            return logits if logits.mean() > 0 else 2 * logits
        if self.kind == "constant":
            return logits * self.constant
        if self.kind == "counter":
            self.calls += 1
        if self.kind == "last_batch" and len(images) == 150 % 64:
            return F.dropout(logits, 0.5, self.training)
        if self.kind == "python_random":
            return logits * random.random()
        if self.kind == "torch_random":
            return logits * torch.rand_like(logits)
        return logits

class State(nn.Linear):
    def get_extra_state(self):
        return 1
    def set_extra_state(self, state):
        pass

def doubtful(*, channels, num_classes, kind):
    return nn.Sequential(nn.Flatten(), State(1024, 10)) if kind == "state" else Doubtful(kind)
"""


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_lane_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_lane_networks", raising=False)


ARTICLE = ModelConfig(options={"width": 0.05})
BATCH_NORM = ModelConfig(name="own_lane_networks:batch_norm")
DROPOUT = ModelConfig(name="own_lane_networks:dropout")
UNUSUAL = ModelConfig(name="own_lane_networks:unusual")
NETWORKS_OF_EVERY_KIND = {"article": ARTICLE, "batch_norm": BATCH_NORM, "dropout": DROPOUT, "unusual": UNUSUAL}
EVERY_NETWORK_EVERY_WAY = [
    pytest.param(
        model, convolution, id=f"{name}-{convolution}", marks=[] if (row + column) % 2 == 0 else [pytest.mark.slow]
    )
    for row, (name, model) in enumerate(NETWORKS_OF_EVERY_KIND.items())
    for column, convolution in enumerate(CONVOLUTIONS)
]


def trial(
    *, model: ModelConfig = ARTICLE, seed: int = 3, data: dict[str, Any] | None = None, **training: Any
) -> TrialConfig:
    return TrialConfig(
        model=model,
        data=DataConfig(**{"train_samples": 150, "flip": True, "crop": 2} | (data or {})),
        training=TrainingConfig(**{"lr": 1e-2, "epochs": EPOCHS, "batch_size": 64} | training),
        seed=seed,
    )


def timeless(results: list[EpochResult]) -> list[EpochResult]:
    return [replace(result, lane=0, seconds=0.0) for result in results]


def train(engine: Engine, config: TrialConfig) -> Checkpoint:
    """Return the trial after its last epoch, trained alongside whatever else is in the engine."""
    lane = engine.admit(config)
    for _ in range(config.training.epochs):
        engine.run_epoch()
    last = engine.checkpoint(lane)
    engine.evict(lane)
    return last


def train_among(config: TrialConfig, *, lanes: int, neighbour: dict[str, Any] | None = None) -> Checkpoint:
    """Train it in an engine where others join, diverge and leave: one before the first epoch, one after each."""
    engine = LaneEngine(device="cpu", lanes=max(2, lanes))
    others = [
        replace(config, seed=10 + i, training=replace(config.training, **{"lr": 10.0 ** -(i % 5)} | (neighbour or {})))
        for i in range(lanes + EPOCHS)
    ]
    held = [engine.admit(other) for other in others[: lanes // 2]]
    lane = engine.admit(config)
    for epoch in range(EPOCHS):
        while lanes > 1 and engine.free_lanes:
            held.append(engine.admit(others[len(held) % len(others)]))
        assert {result.lane for result in engine.run_epoch()} == {lane, *held}
        if held:
            engine.evict(held.pop(epoch % len(held)))
    return engine.checkpoint(lane)


def assert_close(one: Checkpoint, other: Checkpoint) -> None:
    for result, expected in zip(one.results, other.results, strict=True):
        for name in ("train_loss", "val_loss"):
            assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
        # A picture that lies on the border between two classes may fall to either side.
        assert result.train_accuracy == pytest.approx(expected.train_accuracy, abs=1.01 / 150)
        assert (result.epoch, result.lr, result.diverged) == (expected.epoch, expected.lr, expected.diverged)
    tensors, others = (tensors_of(checkpoint) for checkpoint in (one, other))
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        largest = float(others[name].abs().max())  # or nothing but rounding, as the mean of a batch norm's output
        assert float((tensor - others[name]).abs().max()) <= 1e-3 * largest + 1e-6, name


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Parameters, buffers and everything that the optimizer keeps."""
    state = checkpoint.state["optimizer"]["state"]
    moments = {f"{index}.{name}": value for index, of_one in state.items() for name, value in of_one.items()}
    tensors = dict(checkpoint.state["model"]) | dict(sorted(moments.items()))
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    """Bit for bit."""
    assert timeless(list(one.results)) == timeless(list(other.results))
    tensors, others = (tensors_of(checkpoint) for checkpoint in (one, other))
    assert list(tensors) == list(others)
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


# The same trial


@pytest.mark.parametrize(
    "settings", slow_except(SETTINGS, *QUICK_SETTINGS), ids=lambda given: given.get("schedule", given["optimizer"])
)
def test_every_optimizer_and_schedule_is_the_plain_engines(settings: dict[str, Any]) -> None:
    config = trial(**settings, weight_decay=1e-2, gradient_clip=1.0, label_smoothing=0.1)
    plain = train(PlainEngine(device="cpu"), config)
    among = {lanes: train_among(config, lanes=lanes) for lanes in (1, 4, 16)}
    for checkpoint in among.values():
        assert_close(checkpoint, plain)
        assert_equal(checkpoint, among[1])


@pytest.mark.parametrize(("model", "convolution"), EVERY_NETWORK_EVERY_WAY)
def test_every_kind_of_network_is_the_plain_engines(
    model: ModelConfig, convolution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(lanes_module, "CONVOLUTIONS", (convolution,))
    config = trial(model=model, optimizer="sgd", momentum=0.9)
    plain = train(PlainEngine(device="cpu"), config)
    among = {lanes: train_among(config, lanes=lanes) for lanes in (1, 4, 16)}
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


@pytest.mark.parametrize("model", [ARTICLE, BATCH_NORM, DROPOUT], ids=["article", "batch_norm", "dropout"])
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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
    update = OPTIMIZERS[optimizer].update
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
            for given in SETTINGS[: len(OPTIMIZERS)]
        ],
        (BATCH_NORM, SETTINGS[0]),
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
        ("python_random", "draws from Python's"),
        ("torch_random", "random"),
        ("unused", "does not depend on"),
        ("constant", "gives other results than alone"),
        ("counter", "change their own attributes"),
        ("frozen", "not trained"),
        ("state", "get_extra_state"),
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
    [({"data": {"placement": "stream"}}, "do not lie on the device"), ({"compile": True}, "training.compile")],
)
def test_settings_that_need_a_network_to_themselves_fall_back(changed: dict[str, Any], reason: str) -> None:
    config = trial(**changed)
    choice = plan_lanes(config, data=DatasetCache(device=CPU).get(config.data), device=CPU, lanes=4)
    assert choice.lanes == 1
    assert reason in choice.reason


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


def test_one_that_cannot_be_stacked_trains_beside_those_that_are(caplog: pytest.LogCaptureFixture) -> None:
    alone = trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "branch"}))
    engine = LaneEngine(device="cpu", lanes=3)
    lanes = [engine.admit(trial()), engine.admit(alone), engine.admit(trial(seed=5))]
    assert engine.next_lanes == [lanes[0], lanes[2]]
    assert [result.lane for result in engine.run_epoch()] == [lanes[0], lanes[2]]
    assert engine.next_lanes == [lanes[1]]
    assert [result.lane for result in engine.run_epoch()] == [lanes[1]]
    assert "cannot share a stack" in caplog.text
    plain = PlainEngine(device="cpu")
    plain.admit(alone)
    assert timeless(plain.run_epoch()) == timeless(list(engine.checkpoint(lanes[1]).results))


# How many


def chosen(monkeypatch: pytest.MonkeyPatch, rates: Mapping[int, float], **options: Any) -> LanePlan:
    """Return the plan where so many trials at once train so many images a second."""
    monkeypatch.setattr(lanes_module, "_plain_rate", lambda *a, **k: rates[1])
    monkeypatch.setattr(lanes_module, "_stacked_rate", lambda stack, config, lanes: rates[lanes])
    config = trial()
    return plan_lanes(config, data=DatasetCache(device=CPU).get(config.data), device=CPU, **options)


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
    assert (found := chosen(monkeypatch, slower, num_interleaved=8)).lanes == 8
    assert found.convolution is None
    assert (
        found.reason == "8 trials in turns on the CPU: times as fast as one after another: 2 at once 0.4, 4 at once 0.2"
    )
    assert chosen(monkeypatch, slower, num_interleaved=8, lanes=1).lanes == 1
    alone = trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "branch"}))
    data = DatasetCache(device=CPU).get(alone.data)
    assert [
        plan_lanes(alone, data=data, device=CPU, lanes=lanes, num_interleaved=8).lanes for lanes in (None, 2, 16)
    ] == [
        8,
        2,
        8,
    ]
    assert (
        chosen(monkeypatch, {1: 100, 2: 200, 4: 210, 8: 0}, num_interleaved=8).convolution == "grouped"
    )  # a stack is faster


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


def test_no_more_lanes_than_trials_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 100.0, 2: 190, 4: 350, 8: 0.0}  # no memory for 8
    assert chosen(monkeypatch, rates).lanes == 4
    assert chosen(monkeypatch, rates, max_lanes=3).lanes == 2


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
