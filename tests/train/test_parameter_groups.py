"""Parameter groups: what a pattern names, what it multiplies, what is frozen, and that trials resume to the digit."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpo.errors import UserError
from hpo.train.checkpoint import CheckpointFolder
from hpo.train.config import TrainingConfig
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.plain import PlainEngine
from hpo.train.modules import RepeatChannels
from hpo.train.optim import OPTIMIZERS
from hpo.train.parameter_groups import has_groups, layers_of, multipliers_of, set_trained
from tests.rows import slow_except
from tests.train.engines.trials import BATCH_NORM, NETWORKS, assert_close, assert_equal, trial

CLASSES = 10


class Network(nn.Module):
    """A stem, two stages of blocks and a classifier, each with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.5))
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, CLASSES))


def factors(model: nn.Module, **training: Any) -> dict[str, tuple[float, float]]:
    """Return the multipliers of each parameter that are not 1."""
    multipliers = multipliers_of(model, TrainingConfig(lr=1.0, **training), num_classes=CLASSES)
    names = [name for name, _ in model.named_parameters()]
    pairs = {name: (one.lr, one.weight_decay) for name, one in zip(names, multipliers, strict=True)}
    return {name: pair for name, pair in pairs.items() if pair != (1.0, 1.0)}


HEAD = ["classifier.1.weight", "classifier.1.bias"]
STAGE1 = [f"layer1.{block}.{part}.{name}" for block in (0, 1) for part in (0, 1) for name in ("weight", "bias")]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("head", HEAD),
        ("classifier", HEAD),
        ("classifier.1", HEAD),
        ("layer1", STAGE1),
        ("layer1.1.?.bias", ["layer1.1.0.bias", "layer1.1.1.bias"]),
        ("norm", ["norm.weight", "norm.bias"]),
        ("layer[2]*", ["layer2.0.weight", "layer2.0.bias"]),
        ("stem.weight", ["stem.weight"]),
    ],
)
def test_a_pattern_names_modules_and_parameters_with_all_inside_of_them(pattern: str, named: list[str]) -> None:
    assert factors(Network(), groups={pattern: {"lr": 10.0}}) == dict.fromkeys(named, (10.0, 1.0))


def test_body_is_all_but_the_head_and_multipliers_of_several_patterns_are_multiplied() -> None:
    found = factors(Network(), groups={"body": {"lr": 0.1, "weight_decay": 0.0}, "layer1": {"lr": 0.5}})
    assert found.keys() == {name for name, _ in Network().named_parameters()} - set(HEAD)
    assert found["stem.weight"] == (0.1, 0.0)
    assert found["layer1.0.0.weight"] == (0.05, 0.0)
    assert factors(RepeatChannels(Network()), groups={"stem": {"lr": 2.0}}) == {
        "model.stem.weight": (2.0, 1.0),
        "model.stem.bias": (2.0, 1.0),
    }


def test_layers_are_the_blocks_of_containers_and_what_stands_beside_them() -> None:
    layers = layers_of(Network())
    assert {name.rpartition(".")[0]: layer for name, layer in layers.items()} == {
        "stem": 0,
        "norm": 0,
        "layer1.0.0": 1,
        "layer1.0.1": 1,
        "layer1.1.0": 2,
        "layer1.1.1": 2,
        "layer2.0": 3,
        "classifier.1": 4,
    }
    assert factors(Network(), layer_decay=0.5)["norm.bias"] == (0.5**4, 1.0)
    from torchvision import models

    with torch.device("meta"):
        depths = {name: max(layers_of(models.get_model(name)).values()) for name in ("resnet18", "vit_b_32")}
        transformer = layers_of(models.get_model("vit_b_32"))
    assert depths == {"resnet18": 9, "vit_b_32": 13}
    assert (transformer["class_token"], transformer["encoder.pos_embedding"], transformer["conv_proj.bias"]) == (
        0,
        0,
        0,
    )


def test_no_decay_spares_biases_and_norms() -> None:
    found = factors(Network(), no_decay="auto")
    assert found.keys() == {name for name, parameter in Network().named_parameters() if parameter.dim() == 1}
    assert set(found.values()) == {(1.0, 0.0)}


def test_what_is_frozen_is_a_fixed_function_until_it_trains() -> None:
    network = Network()

    def trained(epoch: int, **training: Any) -> tuple[set[str], set[str]]:
        set_trained(network, TrainingConfig(**training), epoch=epoch, num_classes=CLASSES)
        names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        return names, {name for name, module in network.named_modules() if module.training}

    whole = trained(0)
    frozen: dict[str, Any] = {"freeze": ["stem", "norm", "layer2"], "freeze_epochs": 2}
    for epoch in (0, 1):
        names, modules = trained(epoch, **frozen)
        assert names == {*STAGE1, *HEAD}
        assert whole[1] - modules == {"stem", "norm", "layer2", "layer2.0", "layer2.1"}
    assert trained(2, **frozen) == whole
    names, modules = trained(0, freeze=["body"])
    assert names == set(HEAD)
    assert modules == {"", "classifier", "classifier.0", "classifier.1"}


SENTENCES: list[tuple[dict[str, Any], str]] = [
    ({"groups": {"layr1": {"lr": 2.0}}}, r"training.groups.layr1: 'layr1' names no module .*did you mean 'layer1'"),
    (
        {"freeze": ["zzz"]},
        "training.freeze: 'zzz' names no module of the network; it has head, body, stem, norm, layer1, ",
    ),
    ({"freeze": ["head", "body"]}, r"training.freeze must leave something to train; got \['head', 'body'\]"),
]


@pytest.mark.parametrize(("training", "sentence"), SENTENCES)
def test_a_pattern_that_names_nothing_is_one_sentence(training: dict[str, Any], sentence: str) -> None:
    check: Any = multipliers_of if "groups" in training else partial(set_trained, epoch=0)
    with pytest.raises(UserError, match=sentence):
        check(Network(), TrainingConfig(**training), num_classes=CLASSES)


def test_a_network_without_a_layer_of_the_classes_has_no_head() -> None:
    with pytest.raises(UserError, match="'head' needs a network with a layer that has an output for each of the 11"):
        multipliers_of(Network(), TrainingConfig(groups={"head": {"lr": 2.0}}), num_classes=11)


OPTIONS: dict[str, dict[str, Any]] = {
    "groups": {"groups": {"head": {"lr": 10.0}, "0": {"lr": 0.1, "weight_decay": 0.0}}, "weight_decay": 0.1},
    "layer_decay": {"layer_decay": 0.5},
    "no_decay": {"no_decay": "auto", "weight_decay": 0.1},
    "freeze": {"freeze": ["body"]},
    "unfreeze": {"freeze": ["body"], "freeze_epochs": 1, "groups": {"head": {"lr": 2.0}}, "no_decay": "auto"},
}


@pytest.fixture
def networks(own_code: Path) -> None:
    """Let a network with batch norm be imported."""
    (own_code / "own_lane_networks.py").write_text(NETWORKS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_trial_is_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path, networks: None) -> None:
    config = trial(model=BATCH_NORM, optimizer="adamw", **OPTIONS[name])
    assert has_groups(config.training)
    engine = PlainEngine(device="cpu")
    lane = engine.admit(config)
    begun = engine.checkpoint(lane)
    for _ in range(config.training.epochs):
        engine.run_epoch()
    whole = engine.checkpoint(lane)
    if "freeze" in OPTIONS[name]:
        is_for_good = "freeze_epochs" not in OPTIONS[name]
        body = [key for key in begun.state["model"] if not key.startswith("8.")]
        same = [torch.equal(begun.state["model"][key], whole.state["model"][key]) for key in body]
        assert all(same) if is_for_good else not any(same)

    folder = CheckpointFolder(str(tmp_path), identity={"trial": 1})
    folder.save(begun)
    for _ in range(config.training.epochs):
        engine = PlainEngine(device="cpu")
        engine.admit(config, folder.load(config)[0])
        engine.run_epoch()
        folder.save(engine.checkpoint(0))
    resumed = folder.load(config)[0]
    assert resumed is not None
    assert_equal(resumed, whole)


WITH_LANES = [name for name, entry in OPTIMIZERS.items() if entry.update is not None]


@pytest.mark.parametrize("optimizer", slow_except(WITH_LANES, "adamw"))
def test_lanes_have_multipliers_of_their_own(optimizer: str) -> None:
    """Trials of one stack with other multipliers each, one of which joins late, are as the plain engine trains them."""
    momentum = {"sgd": 0.9, "rmsprop": 0.5}.get(optimizer, 0.0)
    common: dict[str, Any] = {"optimizer": optimizer, "eps": 1e-4, "momentum": momentum, "lr": 1e-3}
    configs = [
        trial(**common, **OPTIONS["groups"]),
        trial(**common, seed=4, groups={"head": {"lr": 3.0}}, layer_decay=0.8, no_decay="auto", weight_decay=0.05),
        trial(**common, seed=5),
    ]
    engine = LaneEngine(device="cpu", lanes=3)
    lanes = [engine.admit(config) for config in configs[:2]]
    results = engine.run_epoch()
    assert len(results) == 2
    lanes.append(engine.admit(configs[2]))
    for _ in range(2):
        engine.run_epoch()
    for lane, config in zip(lanes[:2], configs, strict=False):
        plain = PlainEngine(device="cpu")
        plain.admit(config)
        for _ in range(3):
            plain.run_epoch()
        assert_close(engine.checkpoint(lane), plain.checkpoint(0))


def test_a_frozen_trial_trains_alone_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    engine = LaneEngine(device="cpu", lanes=2)
    engine.admit(trial())
    with caplog.at_level(logging.WARNING):
        lane = engine.admit(trial(freeze=["body"]))
    assert "a trial of article_cnn trains alone: training.freeze leaves parameters untrained" in caplog.text
    while len(engine.checkpoint(lane).results) < 1:
        engine.run_epoch()
