"""Optimizers do what torch's own do, and the table can be read without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpo.errors import UserError
from hpo.train.config import TrainingConfig
from hpo.train.optim import OPTIMIZERS, build_optimizer

ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01}
BY_HAND: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, ADAM),
    "adamw": (torch.optim.AdamW, ADAM),
    "nadam": (torch.optim.NAdam, ADAM),
    "radam": (torch.optim.RAdam, ADAM),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "eps": 1e-6, "weight_decay": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-6, "weight_decay": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"eps": 1e-6, "weight_decay": 0.01}),
}


def train(network: torch.nn.Module, optimizer: torch.optim.Optimizer, *, num_steps: int = 3) -> torch.Tensor:
    for step in range(num_steps):
        optimizer.zero_grad()
        network(torch.linspace(-1, 1, 4) + step).square().sum().backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_is_torchs(name: str) -> None:
    torch_class, arguments = BY_HAND[name]
    training = TrainingConfig(
        optimizer=name, lr=0.01, momentum=0.9, nesterov=True, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.01
    )
    ours, theirs = network(), network()
    after = train(ours, build_optimizer(ours.parameters(), training, device_type="cpu"))
    assert torch.equal(after, train(theirs, torch_class(theirs.parameters(), lr=0.01, **arguments)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keys_are_those_that_change_the_training(name: str) -> None:
    """A key outside the entry's `keys` has no effect; each key inside has one."""
    plain = TrainingConfig(optimizer=name, lr=0.01, momentum=0.5 if name == "sgd" else 0.0)

    def after(training: TrainingConfig) -> torch.Tensor:
        ours = network()
        # RAdam reads eps and beta2 from the sixth step on.
        return train(ours, build_optimizer(ours.parameters(), training, device_type="cpu"), num_steps=8)

    changed: dict[str, Any] = {
        "momentum": 0.9,
        "nesterov": True,
        "beta1": 0.5,
        "beta2": 0.5,
        "eps": 0.1,
        "weight_decay": 0.1,
    }
    for key, value in changed.items():
        has_effect = not torch.equal(after(plain), after(replace(plain, **{key: value})))
        assert has_effect == (key in OPTIMIZERS[name].keys), key


def test_eps_none_is_torchs_default() -> None:
    optimizer = build_optimizer(network().parameters(), TrainingConfig(optimizer="adagrad", lr=1), device_type="cpu")
    assert optimizer.defaults["eps"] == 1e-10


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (TrainingConfig(optimizer="adm", lr=1e-3), "training.optimizer must be one of ada.*got 'adm'.*'adam'"),
        (TrainingConfig(optimizer="adam"), "training.lr must be given"),
        (TrainingConfig(optimizer="sgd", lr=1e-3, nesterov=True), "training.optimizer = 'sgd' refuses.*momentum"),
    ],
)
def test_wrong_optimizer(training: TrainingConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(network().parameters(), training, device_type="cpu")


def test_tables_load_without_torch() -> None:
    code = "import sys, hpo.train.optim, hpo.train.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
