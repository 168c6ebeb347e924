"""An optimizer of a user's own is refused in one sentence where it cannot train, or could not be resumed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import UserError
from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import load_data
from hpo.train.engines.optimizer_proof import check_optimizer_resumes

OWN = """
import random
import torch
from torch.optim import Optimizer

class Signs(Optimizer):
    def __init__(self, params, lr, *, scale=1.0, **more):
        super().__init__(params, {"lr": lr, "scale": scale})
        self.calls, self.draws = 0, random.Random(0)

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign() * group["lr"] * group["scale"] * self.factor())

    def factor(self):
        return 1.0

class Counts(Signs):
    def factor(self):
        return 1 / self.calls

class Draws(Signs):
    def factor(self):
        self.draws.random()
        return 1.0

class Whole(Counts):
    def state_dict(self):
        return super().state_dict() | {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = self.state_dict()["calls"]
        super().load_state_dict(state)

class Kept(Signs):
    def __init__(self, params, lr, scale=1.0):
        super().__init__(params, lr, scale=scale)
        del self.calls, self.draws
        self.param_groups[0]["calls"] = 0

    def step(self, closure=None):
        self.calls = 0
        super().step()
        del self.calls
        self.param_groups[0]["calls"] += 1

    def factor(self):
        return 1 / (1 + self.param_groups[0]["calls"])

class Fails(Signs):
    def factor(self):
        raise ArithmeticError("no factor")

class Asks(Signs):
    def step(self, closure):
        return closure()

def nothing(params, lr):
    return None
"""
CANNOT = {
    "Counts": "cannot be resumed: its state_dict() lacks calls",
    "Draws": "cannot be resumed: its state_dict() lacks",
    "Whole": "cannot be resumed",
    "Fails": "cannot train model.name = 'article_cnn': ArithmeticError: no factor",
    "Asks": "cannot be used: it calls the network several times a step, through a closure",
    "nothing": "must make a torch.optim.Optimizer, got NoneType",
    "missing": "must be one of",
}


def check(name: str, folder: Path, **training: Any) -> None:
    (folder / "own_optimizers.py").write_text(OWN)
    config = TrialConfig(
        model=ModelConfig(options={"width": 0.05}),
        data=DataConfig(train_samples=40),
        training=TrainingConfig(optimizer=f"own_optimizers:{name}", **{"lr": 1e-3} | training),
        seed=1,
    )
    data = load_data(config.data, device="cpu")
    check_optimizer_resumes(config, data=data, batch=next(data.train.batches(8)))


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_trained_or_resumed_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"own_optimizers:{name}'.*{re.escape(CANNOT[name])}") as caught:
        check(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lr", [1e-3, 1e30])
def test_one_that_keeps_all_in_its_state_is_taken(lr: float, tmp_path: Path) -> None:
    check("Kept", tmp_path, lr=lr, optimizer_options={"scale": 2.0})


def test_options_and_keys_are_held_to_its_signature(tmp_path: Path) -> None:
    match = r"options.scal is not an option of optimizer own_optimizers:Kept \(did you mean 'scale'\?\), which"
    with pytest.raises(UserError, match=match):
        check("Kept", tmp_path, optimizer_options={"scal": 2.0})
    with pytest.raises(UserError, match=r"training.weight_decay does not apply to optimizer own_optimizers:Kept"):
        check("Kept", tmp_path, weight_decay=0.1)
    with pytest.raises(UserError, match=r"optimizer_options.lr has a place of its own: training.lr or search.space.lr"):
        check("Signs", tmp_path, optimizer_options={"lr": 2.0})


@pytest.mark.parametrize(
    ("name", "message"), [("lion", ""), ("lino", r"one of timm:lion, .* \(\d+ in all\); .*did you mean 'timm:lion'")]
)
def test_timms_optimizers_go_by_their_names(name: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    config = TrialConfig(
        model=ModelConfig(options={"width": 0.05}),
        data=DataConfig(train_samples=40),
        training=TrainingConfig(optimizer=f"timm:{name}", lr=1e-3, optimizer_options={"betas": [0.5, 0.9]}),
        seed=1,
    )
    data = load_data(config.data, device="cpu")
    batch = next(data.train.batches(8))
    if not message:
        check_optimizer_resumes(config, data=data, batch=batch)
        return
    with pytest.raises(UserError, match=message):
        check_optimizer_resumes(config, data=data, batch=batch)
