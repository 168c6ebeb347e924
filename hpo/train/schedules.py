"""Learning-rate schedules: the table of those with a name, and functions of users' own.

A schedule is a pure function of explicit state: the position in the training, and the validation losses so far. A
resumed trial therefore needs no scheduler object restored. Tests hold each schedule to its counterpart in
torch.optim.lr_scheduler. Reading a study file needs the table, so this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hpo.errors import UserError, unknown_name
from hpo.train.config import TrainingConfig
from hpo.train.imports import as_finite, describe_error, import_object, is_import_path

CHECKED_POINTS = 101  # of a training, at which a user's own schedule is tried


@dataclass(frozen=True, kw_only=True)
class SchedulePosition:
    """The position in a schedule, counted from the end of the warm-up: all that the schedule's factor may depend on."""

    epoch: float  # steps done / steps per epoch
    epochs: float  # length of the schedule
    steps_per_epoch: int
    val_losses: Sequence[float]  # of the finished epochs

    @property
    def share(self) -> float:
        """Return the position as a share of the schedule, 0 to 1."""
        return self.epoch / self.epochs

    @property
    def finished_epochs(self) -> int:
        """Return the number of whole epochs behind the position."""
        return _robust_floor(self.epoch)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """An entry of SCHEDULES; `factor` multiplies `lr`, `keys` are the keys of [training] that it reads."""

    factor: Callable[[TrainingConfig, SchedulePosition], float]
    keys: frozenset[str] = frozenset()
    about: str = ""  # in the reference


def find_schedule(name: str) -> Schedule:
    """Return the schedule that training.schedule names; `package.module:function` is imported.

    Such a function is given the progress after the warm-up, from 0 to 1 at the end of the training, and returns the
    factor. Raises UserError where there is no such schedule.
    """
    if is_import_path(name):
        return Schedule(factor=partial(_own_factor, import_object(name, setting="training.schedule"), name))
    if name not in SCHEDULES:
        raise unknown_name("training.schedule", name, SCHEDULES)
    return SCHEDULES[name]


def check_own_schedule(name: str) -> None:
    """Refuse a user's own schedule that gives no factor somewhere, or another one when it is asked again."""
    function = import_object(name, setting="training.schedule")
    shares = [point / (CHECKED_POINTS - 1) for point in range(CHECKED_POINTS)]
    first, second = ([_call_own(function, name, share) for share in shares] for _ in range(2))
    for share, one, other in zip(shares, first, second, strict=True):
        if one != other:
            raise UserError(
                f"training.schedule = {name!r} must depend on the progress alone; at progress {share:g} it returned "
                f"{one:g}, and then {other:g}"
            )


def lr_factor(
    training: TrainingConfig,
    *,
    epoch: float,
    steps_per_epoch: int,
    val_losses: Sequence[float],
    schedule: Schedule | None = None,
) -> float:
    """Return the multiplier of `training.lr` for one step.

    The warm-up rises linearly over `warmup_epochs`, from one step's worth at the first step to 1 at its last. The
    schedule runs over the epochs that remain and, as in torch's SequentialLR, counts its own epochs from there.

    Args:
        training: The settings of the schedule.
        epoch: The position of the step: steps done / steps per epoch, so 0 for the first one.
        steps_per_epoch: The number of steps of an epoch.
        val_losses: The validation loss of each finished epoch.
        schedule: What `find_schedule` returns for it, to find it once for many steps.
    """
    schedule = schedule or find_schedule(training.schedule)
    warmup = training.warmup_epochs
    if epoch < warmup:
        return min(1.0, (epoch + 1 / steps_per_epoch) / warmup)
    position = SchedulePosition(
        epoch=epoch - warmup,
        epochs=max(training.epochs - warmup, 1 / steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        val_losses=val_losses[_robust_floor(warmup) :],
    )
    return schedule.factor(training, position)


def _robust_floor(position: float) -> int:
    """Return floor(), forgiving the rounding of a division: 2.9999999999 epochs are 3."""
    return math.floor(position + 1e-9)


def _cosine_from(start: float, end: float, share: float) -> float:
    """Return the point at `share` of half a cosine from `start` at share 0 to `end` at share 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _own_factor(function: Callable[..., Any], name: str, training: TrainingConfig, position: SchedulePosition) -> float:
    return _call_own(function, name, min(1.0, position.share))


def _call_own(function: Callable[..., Any], name: str, progress: float) -> float:
    """Return what a user's own schedule gives; raise UserError where that is no factor."""
    setting = f"training.schedule = {name!r}"
    try:
        returned = function(progress)
    except Exception as error:  # whatever the user's function raises
        raise UserError(f"{setting} failed at progress {progress:g}: {describe_error(error)}") from error
    factor = as_finite(returned)
    if factor is None or factor < 0:
        raise UserError(
            f"{setting} must return a finite number of at least 0, got {returned!r} at progress {progress:g}"
        )
    return factor


def _constant(training: TrainingConfig, position: SchedulePosition) -> float:
    return 1.0


def _step_decay(training: TrainingConfig, position: SchedulePosition) -> float:
    return training.gamma ** (position.finished_epochs // training.step_epochs)


def _multistep(training: TrainingConfig, position: SchedulePosition) -> float:
    return training.gamma ** sum(milestone <= position.finished_epochs for milestone in training.milestones)


def _exponential(training: TrainingConfig, position: SchedulePosition) -> float:
    return training.gamma**position.finished_epochs


def _cosine(training: TrainingConfig, position: SchedulePosition) -> float:
    return _cosine_from(1.0, training.final_lr_fraction, position.share)


def _cosine_restarts(training: TrainingConfig, position: SchedulePosition) -> float:
    cycles = position.share * training.restarts
    return _cosine_from(1.0, training.final_lr_fraction, max(0.0, cycles - _robust_floor(cycles)))


def _one_cycle(training: TrainingConfig, position: SchedulePosition) -> float:
    """Follow Smith and Topin, "Super-Convergence" (2018), in torch's two cosine phases, to 1e-4 of the start."""
    step, last_step = position.epoch * position.steps_per_epoch, position.epochs * position.steps_per_epoch - 1
    peak_step = training.peak_fraction * (last_step + 1) - 1
    if step <= peak_step:
        return _cosine_from(training.initial_lr_fraction, 1.0, step / peak_step if peak_step > 0 else 1.0)
    share = (step - peak_step) / (last_step - peak_step) if last_step > peak_step else 0.0
    return _cosine_from(1.0, training.initial_lr_fraction * 1e-4, min(1.0, share))


def _polynomial(training: TrainingConfig, position: SchedulePosition) -> float:
    final = training.final_lr_fraction
    return final + (1 - final) * math.pow(max(0.0, 1 - position.share), training.power)


def _linear_decay(training: TrainingConfig, position: SchedulePosition) -> float:
    return 1 - (1 - training.final_lr_fraction) * min(1.0, position.share)


def _wsd(training: TrainingConfig, position: SchedulePosition) -> float:
    """Stay, then fall linearly: warm-up, stable, decay (Hägele et al., arXiv 2405.18392)."""
    share = (position.share - (1 - training.decay_fraction)) / training.decay_fraction
    return 1 - (1 - training.final_lr_fraction) * min(1.0, max(0.0, share))


def _inverse_sqrt(training: TrainingConfig, position: SchedulePosition) -> float:
    """Fall as the square root of the epochs grows (Vaswani et al., arXiv 1706.03762)."""
    return math.sqrt(training.timescale_epochs / (training.timescale_epochs + position.epoch))


def _plateau(training: TrainingConfig, position: SchedulePosition) -> float:
    """Replay torch's ReduceLROnPlateau, where lower means lower by more than 1e-4 of the best so far."""
    factor, best, bad_epochs = 1.0, math.inf, 0
    for loss in position.val_losses:
        if loss < best * (1 - 1e-4):
            best, bad_epochs = loss, 0
        else:
            bad_epochs += 1
        if bad_epochs > training.plateau_epochs:
            factor, bad_epochs = factor * training.gamma, 0
    return factor


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(
        factor=_constant,
        about="stays at lr",
    ),
    "step": Schedule(
        factor=_step_decay,
        keys=frozenset({"step_epochs", "gamma"}),
        about="times gamma every step_epochs",
    ),
    "multistep": Schedule(
        factor=_multistep,
        keys=frozenset({"milestones", "gamma"}),
        about="times gamma at each of milestones",
    ),
    "exponential": Schedule(
        factor=_exponential,
        keys=frozenset({"gamma"}),
        about="times gamma every epoch",
    ),
    "cosine": Schedule(
        factor=_cosine,
        keys=frozenset({"final_lr_fraction"}),
        about="falls as half a cosine to final_lr_fraction",
    ),
    "cosine_restarts": Schedule(
        factor=_cosine_restarts,
        keys=frozenset({"restarts", "final_lr_fraction"}),
        about="the same, restarts times in a row",
    ),
    "one_cycle": Schedule(
        factor=_one_cycle,
        keys=frozenset({"peak_fraction", "initial_lr_fraction"}),
        about="rises from initial_lr_fraction to the peak at peak_fraction of the training, then falls to nearly 0",
    ),
    "polynomial": Schedule(
        factor=_polynomial,
        keys=frozenset({"power", "final_lr_fraction"}),
        about="falls to final_lr_fraction with the exponent power",
    ),
    "linear": Schedule(
        factor=_linear_decay,
        keys=frozenset({"final_lr_fraction"}),
        about="falls linearly to final_lr_fraction",
    ),
    "wsd": Schedule(
        factor=_wsd,
        keys=frozenset({"decay_fraction", "final_lr_fraction"}),
        about="stays, then falls linearly to final_lr_fraction over the last decay_fraction of the training",
    ),
    "inverse_sqrt": Schedule(
        factor=_inverse_sqrt,
        keys=frozenset({"timescale_epochs"}),
        about="falls as 1 / sqrt(1 + epochs since the warm-up / timescale_epochs), as for the Transformer",
    ),
    "plateau": Schedule(
        factor=_plateau,
        keys=frozenset({"plateau_epochs", "gamma"}),
        about="times gamma when the validation loss has not fallen for plateau_epochs",
    ),
}
