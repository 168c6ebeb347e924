"""Activation checkpointing changes no digit of a trial, and networks for which it would are refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.errors import UserError
from hpo.train.config import ModelConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.recomputation_proof import check_recomputation
from tests.train.engines.trials import CPU, DROPOUT, NETWORKS_OF_EVERY_KIND, assert_equal, train, trial

DOUBTFUL = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return images * self.calls

class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, images):
        return self.layer(images.mul_(1.5))

class Bypassed(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, num_classes))

    def forward(self, images):
        for layer in self.layers:
            images = layer(images)
        return images

def network(*, channels, num_classes, kind):
    if kind == "bypassed":
        return Bypassed(num_classes)
    if kind == "switch":
        found = nn.Sequential(nn.Flatten(), nn.Linear(1024, num_classes))
        found.set_grad_checkpointing = lambda enable: 1 / 0
        return found
    first = [nn.Flatten(), nn.Linear(1024, 64), {"scaled": Scaled, "in_place": InPlace}[kind]()]
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*first, *layers, nn.Linear(64, num_classes))
"""


@pytest.mark.parametrize("name", NETWORKS_OF_EVERY_KIND)
def test_a_trial_has_the_same_digits(name: str) -> None:
    """Batch norm, dropout and layers that change their input in place among them."""
    model = NETWORKS_OF_EVERY_KIND[name]
    recomputed = trial(model=model, activation_checkpointing=True)
    assert_equal(train(PlainEngine(device="cpu"), recomputed), train(PlainEngine(device="cpu"), trial(model=model)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("scaled", "which gets other gradients when it computes its activations again"),
        ("in_place", "which gets other gradients when it computes its activations again"),
        ("bypassed", "has no effect on model.name = 'own_doubtful:network', which keeps as many activations"),
        ("switch", "its set_grad_checkpointing raised ZeroDivisionError"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(kind: str, reason: str, own_code: Path) -> None:
    (own_code / "own_doubtful.py").write_text(DOUBTFUL)
    config = trial(model=ModelConfig(name="own_doubtful:network", options={"kind": kind}))
    data = DatasetCache(device=CPU).get(config.data)
    batch = next(data.train.batches(8))
    with pytest.raises(UserError, match=rf"training\.activation_checkpointing .*{reason}"):
        check_recomputation(config, data=data, batch=batch)


def test_the_proof_accepts_dropout_and_frozen_modules() -> None:
    config = trial(model=DROPOUT, freeze=("3",))
    data = DatasetCache(device=CPU).get(config.data)
    check_recomputation(config, data=data, batch=next(data.train.batches(8)))
