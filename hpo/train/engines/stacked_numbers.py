"""The numbers of the steps of a stacked epoch: of the update rule, the loss and the clipping, for every lane.

A number that is the same for all parameters of each lane is (K, 1); others have a column for each parameter, (K, P).
Shapes: K lanes, P parameters of a network, G groups of parameters, S steps of an epoch, N numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.train.engines.lane_state import LaneState
from hpo.train.engines.stacked_optimizers import Update
from hpo.train.optim import with_eps
from hpo.train.parameter_groups import Multipliers


class StepNumbers:
    """The numbers of an epoch in progress by step; those of a group of parameters are repeated when they are read."""

    def __init__(
        self, trials: Sequence[LaneState], update: Update, *, num_steps: int, sizes: Sequence[int], device: torch.device
    ) -> None:
        """Compute the numbers.

        Args:
            trials: The trial of each lane.
            update: Their update rule.
            num_steps: The number of steps of the epoch.
            sizes: The number of elements of each parameter of the network.
            device: Where the trials are trained.
        """
        # A group has the parameters whose multipliers agree in every lane.
        of_parameters = list(zip(*(trial.multipliers for trial in trials), strict=True))
        groups = list(dict.fromkeys(of_parameters))
        group_of = torch.tensor([groups.index(multipliers) for multipliers in of_parameters], device=device)
        self._group_of_P = group_of.repeat_interleave(torch.tensor(sizes, device=device))
        clips = any(trial.config.training.gradient_clip is not None for trial in trials)
        rows = [
            [_numbers(trial, update, group[row], num_steps=num_steps, clips=clips) for group in groups]
            for row, trial in enumerate(trials)
        ]
        names = list(rows[0][0][0])
        numbers = [[[[step[name] for name in names] for step in group] for group in row] for row in rows]
        numbers_KGSN = torch.tensor(numbers, dtype=torch.float64).float()
        named = {}
        for name, number_KGS in zip(names, numbers_KGSN.unbind(-1), strict=True):
            is_same = torch.equal(number_KGS, number_KGS[:, :1].expand_as(number_KGS))
            named[name] = (number_KGS[:, :1] if is_same else number_KGS).to(device).unbind(-1)
        self._steps = [dict(zip(names, of_step, strict=True)) for of_step in zip(*named.values(), strict=True)]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Return the numbers of a step, counted from 0 in the epoch."""
        of_step = self._steps[step].items()
        return {name: one if one.shape[1] == 1 else one[:, self._group_of_P] for name, one in of_step}


def _numbers(
    trial: LaneState, update: Update, multipliers: Multipliers, *, num_steps: int, clips: bool
) -> list[dict[str, float]]:
    """Return the numbers of each step for the parameters of a trial that have these multipliers."""
    training = with_eps(multipliers.scaled(trial.config.training))
    fixed = {"label_smoothing": training.label_smoothing}
    if clips:
        fixed["largest_norm"] = torch.inf if training.gradient_clip is None else training.gradient_clip
    first = trial.epoch * num_steps + 1
    return [
        update.factors(training, trial.lr_at(step, num_steps=num_steps) * multipliers.lr, first + step) | fixed
        for step in range(num_steps)
    ]
