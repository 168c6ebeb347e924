"""Schedules do what torch's own do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from hpo.errors import UserError
from hpo.train.config import TrainingConfig
from hpo.train.schedules import SCHEDULES, check_own_schedule, lr_factor

EPOCHS, STEPS_PER_EPOCH = 12, 7
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH


def factors(training: TrainingConfig) -> list[float]:
    """Return our factor at every step of the training."""
    return [
        lr_factor(training, epoch=step / STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, val_losses=())
        for step in range(NUM_STEPS)
    ]


def torch_factors(make: Any, *, each_epoch: bool = False) -> list[float]:
    """Return the factor at every step of a torch scheduler that is stepped after each step or each epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    result = []
    for step in range(NUM_STEPS):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not each_epoch or (step + 1) % STEPS_PER_EPOCH == 0:
            scheduler.step()
    return result


COUNTERPARTS: list[tuple[dict[str, Any], Any, bool]] = [
    ({"schedule": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0), False),
    ({"schedule": "step", "step_epochs": 4, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 4, 0.5), True),
    ({"schedule": "multistep", "milestones": (3, 5, 9)}, lambda o: lr_scheduler.MultiStepLR(o, [3, 5, 9]), True),
    ({"schedule": "exponential", "gamma": 0.7}, lambda o: lr_scheduler.ExponentialLR(o, 0.7), True),
    (
        {"schedule": "cosine", "final_lr_fraction": 0.1},
        lambda o: lr_scheduler.CosineAnnealingLR(o, NUM_STEPS, eta_min=0.1),
        False,
    ),
    (
        {"schedule": "cosine_restarts", "restarts": 3, "final_lr_fraction": 0.1},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, NUM_STEPS // 3, eta_min=0.1),
        False,
    ),
    (
        {"schedule": "one_cycle", "peak_fraction": 0.25, "initial_lr_fraction": 0.1},
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, NUM_STEPS, pct_start=0.25, div_factor=10, cycle_momentum=False),
        False,
    ),
    ({"schedule": "polynomial", "power": 2.0}, lambda o: lr_scheduler.PolynomialLR(o, NUM_STEPS, 2.0), False),
    (
        {"schedule": "polynomial", "final_lr_fraction": 0.2},
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, NUM_STEPS),
        False,
    ),
    ({"schedule": "linear", "final_lr_fraction": 0.2}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, NUM_STEPS), False),
    (
        {"schedule": "wsd", "decay_fraction": 0.25, "final_lr_fraction": 0.1},
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.1, NUM_STEPS // 4)],
            milestones=[NUM_STEPS * 3 // 4],
        ),
        False,
    ),
    (
        {"schedule": "inverse_sqrt", "timescale_epochs": 2.0},
        lambda o: lr_scheduler.LambdaLR(o, lambda step: (1 + step / STEPS_PER_EPOCH / 2) ** -0.5),
        False,
    ),
]


@pytest.mark.parametrize(
    ("keys", "make", "each_epoch"), COUNTERPARTS, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_schedule_is_torchs(keys: dict[str, Any], make: Any, each_epoch: bool) -> None:
    assert factors(TrainingConfig(epochs=EPOCHS, **keys)) == pytest.approx(torch_factors(make, each_epoch=each_epoch))


def test_every_schedule_has_a_counterpart() -> None:
    assert {keys["schedule"] for keys, _, _ in COUNTERPARTS} | {"plateau"} == set(SCHEDULES)


@pytest.mark.parametrize("plateau_epochs", [0, 1, 3])
def test_plateau_is_torchs(plateau_epochs: int) -> None:
    val_losses = [2.0, 1.5, 1.5, 1.49999, 1.6, 1.4, float("nan"), 1.41, 1.42, 1.43, 1.39, 1.5, 1.5, 1.5, 1.5, 1.5]
    training = TrainingConfig(schedule="plateau", plateau_epochs=plateau_epochs, gamma=0.5, epochs=len(val_losses))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=plateau_epochs)
    for epoch, loss in enumerate(val_losses):
        ours = lr_factor(training, epoch=epoch, steps_per_epoch=5, val_losses=val_losses[:epoch])
        assert ours == optimizer.param_groups[0]["lr"]
        scheduler.step(loss)


def test_warmup_is_torchs_in_front_of_a_schedule() -> None:
    warmup_steps = 2 * STEPS_PER_EPOCH

    def make(optimizer: torch.optim.Optimizer) -> Any:
        warmup = lr_scheduler.LinearLR(optimizer, 1 / warmup_steps, total_iters=warmup_steps - 1)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS - warmup_steps)
        return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])

    ours = factors(TrainingConfig(epochs=EPOCHS, schedule="cosine", warmup_epochs=2))
    assert ours == pytest.approx(torch_factors(make))
    assert ours[0] == pytest.approx(1 / warmup_steps)
    assert ours[warmup_steps - 1] == ours[warmup_steps] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.1, 1.5, 3.0, 4.0])
@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7])
def test_factors_stay_in_range(schedule: str, warmup_epochs: float, steps_per_epoch: int) -> None:
    """Between 0 and 1 at every step of short trainings too, with the first step doing something."""
    training = TrainingConfig(epochs=3, schedule=schedule, warmup_epochs=warmup_epochs, milestones=(1, 2))
    for step in range(3 * steps_per_epoch + 1):
        epoch = step / steps_per_epoch
        val_losses = [1.0] * int(epoch)
        factor = lr_factor(training, epoch=epoch, steps_per_epoch=steps_per_epoch, val_losses=val_losses)
        assert 0 <= factor <= 1
        assert factor > 0 or step > 0


def test_falls_at_the_epoch_where_division_rounds_down() -> None:
    training = TrainingConfig(schedule="exponential", gamma=0.5, warmup_epochs=0.1, epochs=100)
    for epochs in range(100):
        factor = lr_factor(training, epoch=epochs + 0.1, steps_per_epoch=10, val_losses=())
        assert factor == 0.5**epochs


def test_unknown_schedule() -> None:
    with pytest.raises(UserError, match=r"training.schedule must be one of .*got 'cosin' .*'cosine'"):
        lr_factor(TrainingConfig(schedule="cosin"), epoch=0, steps_per_epoch=1, val_losses=())


OWN_SCHEDULES = """
from random import random

def cosine(progress):
    from math import cos, pi
    return (1 + cos(pi * progress)) / 2

def raises(progress):
    return 1 / (1 - progress)

def negative(progress):
    return 0.5 - progress

def words(progress):
    return "half"

def draws(progress):
    return random()
"""


def test_a_schedule_of_ones_own_is_a_function_of_the_progress(own_code: Path) -> None:
    (own_code / "own_schedules.py").write_text(OWN_SCHEDULES)
    for warmup_epochs in (0, 2):
        training = TrainingConfig(epochs=EPOCHS, schedule="own_schedules:cosine", warmup_epochs=warmup_epochs)
        assert factors(training) == pytest.approx(factors(replace(training, schedule="cosine")))
    check_own_schedule("own_schedules:cosine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "failed at progress 1: ZeroDivisionError"),
        ("negative", "must return a finite number of at least 0, got -0.01"),
        ("words", "must return a finite number of at least 0, got 'half' at progress 0"),
        ("draws", "must depend on the progress alone; at progress 0 it returned"),
    ],
)
def test_what_gives_no_factor_is_refused_before_training(name: str, message: str, own_code: Path) -> None:
    (own_code / "own_schedules.py").write_text(OWN_SCHEDULES)
    with pytest.raises(UserError, match=f"training.schedule = 'own_schedules:{name}' {message}") as caught:
        check_own_schedule(f"own_schedules:{name}")
    assert "\n" not in str(caught.value)
