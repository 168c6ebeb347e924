"""A loop that trains on from where an earlier trial ended is found, wherever it keeps the weights; no other one is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpo.errors import UserError
from hpo.workers.carried_weights import CarriedWeights


def step(network: nn.Module, *, lr: float = 0.1, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()


SHARED = nn.Linear(3, 2)
SAVED: dict[str, Any] = {}


def shared() -> None:
    step(SHARED)


def saved() -> None:
    network = nn.Linear(3, 2)
    network.load_state_dict(SAVED.get("last", network.state_dict()))
    step(network)
    SAVED["last"] = copy.deepcopy(network.state_dict())


def shared_body() -> None:
    step(nn.Sequential(SHARED, nn.Linear(2, 2)))


def fresh() -> None:
    step(nn.Linear(3, 2))


def same_start() -> None:
    torch.manual_seed(0)
    step(nn.Linear(3, 2))


def drawn_anew() -> None:
    SHARED.reset_parameters()
    step(SHARED)


def without_a_step() -> None:
    step(SHARED, lr=0.0)


def zeros() -> None:
    network = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(network.weight)
    step(network)


def several_optimizers() -> None:
    network = nn.Linear(3, 2)
    for _ in range(3):
        step(network)


@pytest.fixture(autouse=True)
def _start() -> None:
    SHARED.reset_parameters()
    SAVED.clear()


@pytest.mark.parametrize("loop", [shared, saved, shared_body])
def test_a_trial_that_goes_on_with_weights_of_another_is_refused(loop: Callable[[], None]) -> None:
    carried = CarriedWeights()
    with carried.watching(4):
        loop()
    for number in (5, 6):
        with pytest.raises(UserError, match="weights that trial 4 ended with"), carried.watching(number):
            loop()
    with carried.watching(4):  # resumed, as from its own checkpoint
        loop()


@pytest.mark.parametrize("loop", [fresh, same_start, drawn_anew, without_a_step, zeros, several_optimizers])
def test_trials_that_start_anew_are_not(loop: Callable[[], None]) -> None:
    carried = CarriedWeights()
    for number in range(3):
        with carried.watching(number):
            loop()
