"""Trials, networks and comparisons for the tests of engines that train many trials.

Tolerances: losses agree to 1e-4 and parameters to 1e-3 of the largest (and 1e-6), over 2 epochs in float32. That is
rounding, which training amplifies: products are added in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.train.checkpoint import Checkpoint
from hpo.train.config import DataConfig, EpochResult, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.protocol import Engine
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from hpo.train.optim import OPTIMIZERS
from hpo.train.schedules import SCHEDULES

EPOCHS = 2
CPU = torch.device("cpu")
WITH_RULE = [name for name, entry in OPTIMIZERS.items() if entry.update]  # those that train in lanes
MOMENTUM = {"sgd": 0.9, "rmsprop": 0.5}
# With the usual eps of 1e-8, rounding in place of a gradient that is zero would make whole steps of Adam's; the rules
# themselves are held to torch's with it, and without, below.
EPS = 1e-4
# At 1e-2 one of the images of this trial comes to lie on the kink of a ReLU, and rounding decides what it moves.
LR = {"adamax": 1e-3}
SETTINGS = [
    {"optimizer": name, "momentum": MOMENTUM.get(name, 0.0), "eps": EPS, "lr": LR.get(name, 1e-2)} for name in WITH_RULE
] + [
    {"optimizer": "sgd", "momentum": 0.9, "schedule": name, "warmup_epochs": 0.5, "step_epochs": 1, "milestones": (1,)}
    for name in SCHEDULES
]
QUICK_SETTINGS = [given for given in SETTINGS if given["optimizer"] == "adam" or given.get("schedule") == "one_cycle"]

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

def small(*, channels, num_classes):
    body = [nn.AvgPool2d(4), nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(128, num_classes))

def wide(*, channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024 * channels, 64), nn.ReLU(), nn.Linear(64, num_classes))

class Viewing(nn.Module):
    def __init__(self, channels, num_classes, how):
        super().__init__()
        self.body, self.head, self.how = nn.Conv2d(channels, 4, 3, stride=4), nn.Linear(256, num_classes), how

    def forward(self, images):
        maps = self.body(images)
        return self.head(maps.view(len(maps), -1) if self.how == "view" else maps.flatten(1))

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
    if kind == "torchscript":
        return nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(1024, 10)))
    return nn.Sequential(nn.Flatten(), State(1024, 10)) if kind == "state" else Doubtful(kind)
"""


ARTICLE = ModelConfig(options={"width": 0.05})
BATCH_NORM = ModelConfig(name="own_lane_networks:batch_norm")
DROPOUT = ModelConfig(name="own_lane_networks:dropout")
UNUSUAL = ModelConfig(name="own_lane_networks:unusual")
NETWORKS_OF_EVERY_KIND = {"article": ARTICLE, "batch_norm": BATCH_NORM, "dropout": DROPOUT, "unusual": UNUSUAL}
EVERY_NETWORK_EVERY_WAY = [
    pytest.param(
        model,
        convolution,
        id=f"{name}-{convolution}",
        marks=[] if (name, convolution) == ("article", "grouped") else [pytest.mark.slow],
    )
    for name, model in NETWORKS_OF_EVERY_KIND.items()
    for convolution in CONVOLUTIONS
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
        # An image that lies on the border between two classes may fall to either side.
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
