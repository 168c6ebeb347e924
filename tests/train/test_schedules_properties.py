"""Schedules with random settings: each is torch's scheduler of the same name, and all keep a factor's invariants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from hpo.train.config import TrainingConfig
from hpo.train.schedules import SCHEDULES, lr_factor

repeatable = settings(max_examples=75, derandomize=True, deadline=None)

Scheduler = lr_scheduler.LRScheduler
fractions = st.floats(0.0, 1.0)
gammas = st.floats(0.05, 1.0)
lengths = st.integers(1, 12)  # epochs
steps = st.integers(1, 9)  # of an epoch
# Losses close to each other too: lower by less than 1e-4 of the best does not count as lower.
losses = st.lists(
    st.one_of(st.floats(0.0, 10.0), st.floats(0.9985, 1.0), st.just(math.nan), st.just(math.inf)), max_size=40
)


@dataclass(frozen=True)
class Counterpart:
    """Random settings of one of our schedules, and torch's scheduler with the same settings."""

    training: TrainingConfig
    steps_per_epoch: int
    make: Callable[[torch.optim.Optimizer], Scheduler]
    each_epoch: bool = False  # torch's scheduler is stepped after each epoch, not after each step

    @property
    def num_steps(self) -> int:
        return self.training.epochs * self.steps_per_epoch


def step_decay(draw: st.DrawFn) -> Counterpart:
    epochs, length, gamma = draw(lengths), draw(lengths), draw(gammas)
    training = TrainingConfig(schedule="step", epochs=epochs, step_epochs=length, gamma=gamma)
    return Counterpart(training, draw(steps), lambda o: lr_scheduler.StepLR(o, length, gamma), each_epoch=True)


def multistep(draw: st.DrawFn) -> Counterpart:
    epochs, gamma, milestones = draw(lengths), draw(gammas), sorted(draw(st.sets(lengths, max_size=5)))
    training = TrainingConfig(schedule="multistep", epochs=epochs, milestones=tuple(milestones), gamma=gamma)
    return Counterpart(training, draw(steps), lambda o: lr_scheduler.MultiStepLR(o, milestones, gamma), each_epoch=True)


def exponential(draw: st.DrawFn) -> Counterpart:
    epochs, gamma = draw(lengths), draw(gammas)
    training = TrainingConfig(schedule="exponential", epochs=epochs, gamma=gamma)
    return Counterpart(training, draw(steps), lambda o: lr_scheduler.ExponentialLR(o, gamma), each_epoch=True)


def constant(draw: st.DrawFn) -> Counterpart:
    training = TrainingConfig(schedule="constant", epochs=draw(lengths))
    return Counterpart(training, draw(steps), lambda o: lr_scheduler.ConstantLR(o, factor=1.0))


def cosine(draw: st.DrawFn) -> Counterpart:
    epochs, num, final = draw(lengths), draw(steps), draw(fractions)
    training = TrainingConfig(schedule="cosine", epochs=epochs, final_lr_fraction=final)
    return Counterpart(training, num, lambda o: lr_scheduler.CosineAnnealingLR(o, epochs * num, eta_min=final))


def cosine_restarts(draw: st.DrawFn) -> Counterpart:
    """Have cycles of whole epochs, because torch's cycles are whole steps long."""
    cycle_epochs, restarts, num, final = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(steps), draw(fractions)
    training = TrainingConfig(
        schedule="cosine_restarts", epochs=cycle_epochs * restarts, restarts=restarts, final_lr_fraction=final
    )
    cycle_steps = cycle_epochs * num
    return Counterpart(training, num, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, cycle_steps, eta_min=final))


def one_cycle(draw: st.DrawFn) -> Counterpart:
    """Have a step on each side of the peak, because torch would divide by zero where it is the first or the last."""
    epochs, num = draw(st.integers(2, 12)), draw(st.integers(2, 9))
    num_steps = epochs * num
    peak = draw(st.floats(1.5 / num_steps, 1 - 0.5 / num_steps))
    initial = draw(st.floats(0.01, 1.0))
    training = TrainingConfig(schedule="one_cycle", epochs=epochs, peak_fraction=peak, initial_lr_fraction=initial)
    return Counterpart(
        training,
        num,
        lambda o: lr_scheduler.OneCycleLR(
            o, 1.0, num_steps, pct_start=peak, div_factor=1 / initial, cycle_momentum=False
        ),
    )


def polynomial(draw: st.DrawFn) -> Counterpart:
    epochs, num, power = draw(lengths), draw(steps), draw(st.floats(0.2, 5.0))
    training = TrainingConfig(schedule="polynomial", epochs=epochs, power=power)
    return Counterpart(training, num, lambda o: lr_scheduler.PolynomialLR(o, epochs * num, power))


def linear(draw: st.DrawFn) -> Counterpart:
    """Draw a polynomial of power 1, too, which ends above zero where torch's does not."""
    epochs, num, final, name = (
        draw(lengths),
        draw(steps),
        draw(fractions),
        draw(st.sampled_from(["linear", "polynomial"])),
    )
    training = TrainingConfig(schedule=name, epochs=epochs, final_lr_fraction=final)
    return Counterpart(training, num, lambda o: lr_scheduler.LinearLR(o, 1.0, final, epochs * num))


def wsd(draw: st.DrawFn) -> Counterpart:
    """Decay in whole steps, as torch does."""
    epochs, num, final = draw(lengths), draw(steps), draw(fractions)
    num_decay = draw(st.integers(1, epochs * num))
    training = TrainingConfig(
        schedule="wsd", epochs=epochs, decay_fraction=num_decay / (epochs * num), final_lr_fraction=final
    )

    def make(optimizer: torch.optim.Optimizer) -> Scheduler:
        decay = lr_scheduler.LinearLR(optimizer, 1.0, final, num_decay)
        if num_decay == epochs * num:
            return decay
        stable = lr_scheduler.ConstantLR(optimizer, 1.0)
        return lr_scheduler.SequentialLR(optimizer, [stable, decay], milestones=[epochs * num - num_decay])

    return Counterpart(training, num, make)


def inverse_sqrt(draw: st.DrawFn) -> Counterpart:
    epochs, num, scale = draw(lengths), draw(steps), draw(st.floats(0.1, 20.0))
    training = TrainingConfig(schedule="inverse_sqrt", epochs=epochs, timescale_epochs=scale)
    return Counterpart(training, num, lambda o: lr_scheduler.LambdaLR(o, lambda step: (1 + step / num / scale) ** -0.5))


COUNTERPARTS = [
    constant,
    step_decay,
    multistep,
    exponential,
    cosine,
    cosine_restarts,
    one_cycle,
    polynomial,
    linear,
    wsd,
    inverse_sqrt,
]


def factors(training: TrainingConfig, *, steps_per_epoch: int, val_losses: Sequence[float] = ()) -> list[float]:
    """Return our factor at every step of the training."""
    return [
        lr_factor(
            training,
            epoch=step / steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            val_losses=val_losses[: step // steps_per_epoch],
        )
        for step in range(training.epochs * steps_per_epoch)
    ]


def torch_factors(counterpart: Counterpart) -> list[float]:
    """Return the factor of torch's scheduler at every step of the training."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = counterpart.make(optimizer)
    result = []
    for step in range(counterpart.num_steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        is_last = step + 1 == counterpart.num_steps  # which OneCycleLR would refuse to go past
        if not is_last and (not counterpart.each_epoch or (step + 1) % counterpart.steps_per_epoch == 0):
            scheduler.step()
    return result


@pytest.mark.parametrize("draw_counterpart", COUNTERPARTS, ids=lambda function: function.__name__)
@given(data=st.data())
@repeatable
def test_every_schedule_is_torchs(draw_counterpart: Callable[[st.DrawFn], Counterpart], data: st.DataObject) -> None:
    counterpart = data.draw(st.composite(draw_counterpart)())
    ours = factors(counterpart.training, steps_per_epoch=counterpart.steps_per_epoch)
    # Torch multiplies the rate from step to step, and so rounds more than a formula does.
    assert ours == pytest.approx(torch_factors(counterpart), rel=1e-6, abs=1e-9)


@given(val_losses=losses, plateau_epochs=st.integers(0, 5), gamma=gammas)
@repeatable
def test_plateau_is_torchs(val_losses: list[float], plateau_epochs: int, gamma: float) -> None:
    training = TrainingConfig(
        schedule="plateau", epochs=len(val_losses) + 1, plateau_epochs=plateau_epochs, gamma=gamma
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=gamma, patience=plateau_epochs, eps=0.0)
    ours = factors(training, steps_per_epoch=1, val_losses=val_losses)
    for factor, loss in zip(ours, [*val_losses, 0.0], strict=True):
        assert factor == optimizer.param_groups[0]["lr"]
        scheduler.step(loss)


@st.composite
def trainings(draw: st.DrawFn, *, schedules: Sequence[str] = tuple(SCHEDULES)) -> TrainingConfig:
    """Draw any settings that a study file may have, without a warm-up."""
    return TrainingConfig(
        schedule=draw(st.sampled_from(schedules)),
        epochs=draw(lengths),
        step_epochs=draw(lengths),
        milestones=tuple(sorted(draw(st.sets(lengths, max_size=5)))),
        gamma=draw(gammas),
        restarts=draw(st.integers(1, 5)),
        power=draw(st.floats(0.1, 5.0)),
        final_lr_fraction=draw(fractions),
        peak_fraction=draw(st.floats(0.01, 0.99)),
        initial_lr_fraction=draw(st.floats(0.01, 1.0)),
        plateau_epochs=draw(st.integers(0, 5)),
        decay_fraction=draw(st.floats(0.01, 1.0)),
        timescale_epochs=draw(st.floats(0.1, 20.0)),
    )


@given(training=trainings(), warmup_epochs=st.floats(0.0, 15.0), num=steps, val_losses=losses)
@repeatable
def test_a_factor_is_between_0_and_1_and_the_first_step_moves(
    training: TrainingConfig, warmup_epochs: float, num: int, val_losses: list[float]
) -> None:
    training = replace(training, warmup_epochs=warmup_epochs)
    all_factors = factors(training, steps_per_epoch=num, val_losses=val_losses)
    assert all(0 <= factor <= 1 for factor in all_factors)
    assert all_factors[0] > 0


@given(training=trainings(), warmup_epochs=lengths, num=steps, val_losses=losses)
@repeatable
def test_after_its_warmup_a_schedule_is_one_without_over_the_epochs_that_remain(
    training: TrainingConfig, warmup_epochs: int, num: int, val_losses: list[float]
) -> None:
    longer = replace(training, epochs=training.epochs + warmup_epochs, warmup_epochs=float(warmup_epochs))
    losses_of_warmup = [1.0] * warmup_epochs
    with_warmup = factors(longer, steps_per_epoch=num, val_losses=losses_of_warmup + val_losses)
    warmup_steps = warmup_epochs * num
    assert with_warmup[warmup_steps:] == pytest.approx(factors(training, steps_per_epoch=num, val_losses=val_losses))
    rising = [(step + 1) / warmup_steps for step in range(warmup_steps)]
    assert with_warmup[:warmup_steps] == pytest.approx(rising)


FALLING = (
    "constant",
    "step",
    "multistep",
    "exponential",
    "cosine",
    "polynomial",
    "linear",
    "wsd",
    "inverse_sqrt",
    "plateau",
)


@given(training=trainings(schedules=FALLING), num=steps, val_losses=losses)
@repeatable
def test_without_restarts_or_a_cycle_a_factor_never_rises(
    training: TrainingConfig, num: int, val_losses: list[float]
) -> None:
    all_factors = factors(training, steps_per_epoch=num, val_losses=val_losses)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(all_factors))


@given(
    training=trainings(schedules=("cosine", "cosine_restarts", "polynomial", "one_cycle", "linear", "wsd")), num=steps
)
@repeatable
def test_smooth_schedules_jump_nowhere_but_at_restarts(training: TrainingConfig, num: int) -> None:
    training = replace(training, power=max(1.0, training.power))  # below 1 the end is as steep as one likes
    num_steps = training.epochs * num
    shortest = {  # the steps of half a cosine, or of the polynomial over its power
        "cosine": num_steps,
        "cosine_restarts": num_steps / training.restarts,
        "polynomial": num_steps / training.power,
        "linear": num_steps,
        "wsd": training.decay_fraction * num_steps,
        "one_cycle": min(training.peak_fraction * num_steps - 1, (1 - training.peak_fraction) * num_steps),
    }[training.schedule]
    all_factors = factors(training, steps_per_epoch=num)
    most = math.inf if shortest <= 0 else math.pi / 2 / shortest + 1e-9
    jumps = [step for step in range(1, num_steps) if abs(all_factors[step] - all_factors[step - 1]) > most]
    restarts = {math.ceil(num_steps * cycle / training.restarts - 1e-9) for cycle in range(1, training.restarts)}
    assert set(jumps) <= (restarts if training.schedule == "cosine_restarts" else set())


@given(training=trainings(), num=steps, val_losses=losses)
@repeatable
def test_a_factor_depends_on_nothing_but_the_settings_that_its_schedule_names(
    training: TrainingConfig, num: int, val_losses: list[float]
) -> None:
    keys = SCHEDULES[training.schedule].keys
    own: dict[str, Any] = {key: getattr(training, key) for key in keys}
    bare = TrainingConfig(schedule=training.schedule, epochs=training.epochs, **own)
    ours = factors(training, steps_per_epoch=num, val_losses=val_losses)
    assert ours == factors(bare, steps_per_epoch=num, val_losses=val_losses)


def test_every_schedule_has_a_counterpart_here() -> None:
    drawn = {"step" if name.startswith("step") else name for name in (function.__name__ for function in COUNTERPARTS)}
    assert drawn | {"plateau"} == set(SCHEDULES)
