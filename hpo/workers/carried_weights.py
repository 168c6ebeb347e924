"""Weights that a user's own loop carries from trial to trial: no trial may go on from where another one ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Checksum = tuple[tuple[int, ...], float, float]  # of a tensor: its shape, its sum, its norm


class CarriedWeights:
    """Knows the weights that the trials of this process ended with, and refuses a trial whose training begins with any.

    It compares values, so that it does not matter where a loop keeps them: in its module, in a cache or in a file. It
    sees what optimizers of torch's train, if torch was imported before the trial.
    """

    def __init__(self) -> None:
        self._ends: dict[Checksum, int] = {}  # the number of the trial

    @contextmanager
    def watching(self, number: int) -> Iterator[None]:
        """Watch the training of a trial; its optimizer's first step raises UserError where it trains on another's."""
        if "torch" not in sys.modules:
            yield
            return
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        optimizers: dict[int, Optimizer] = {}
        begun: dict[int, tuple[Tensor, Checksum]] = {}

        def check(optimizer: Optimizer, *_: Any) -> None:
            if id(optimizer) in optimizers:
                return
            optimizers[id(optimizer)] = optimizer
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                checksum = _checksum(parameter)
                if self._ends.get(checksum, number) != number:
                    raise UserError(
                        f"this trial continues with weights that trial {self._ends[checksum]} ended with; each one "
                        "must start anew: build the network in the function, or draw its weights there"
                    )
                begun.setdefault(id(parameter), (parameter, checksum))

        handle = register_optimizer_step_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()
            for parameter, checksum in begun.values():
                shape, total, norm = ended = _checksum(parameter)
                if ended != checksum and math.isfinite(total) and 0 < norm < math.inf:  # zeros may be anybody's
                    self._ends.setdefault((shape, total, norm), number)


def _checksum(parameter: Tensor) -> Checksum:
    values = parameter.detach().float()
    return tuple(values.shape), float(values.sum()), float(values.norm())
