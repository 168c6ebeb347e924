"""A user's own training loop as a study: the `Trial` that the function is called with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError

if TYPE_CHECKING:
    from hpo.train.recipe import Recipe

# The keys of every trial in `hpo trials --json`, which no metric can have.
RESERVED_METRICS = frozenset(
    {"number", "state", "params", "value", "attempt", "epochs", "reason", "error", "seed", "device"}
)


@dataclass
class Trial:
    """One trial, as your training function gets it: values to train with, a device, a folder, and `report`.

    Attributes:
        params: The values that the search chose, by the keys of [search.space].
        device: Where to train, as torch names it: "cuda:0", "mps" or "cpu".
        epochs: How many epochs to train: `training.epochs`, or the searched value.
        seed: A seed of this trial's own.
        checkpoint_dir: A folder of this trial's own, the same when it is resumed after an interruption.
        number: The trial's number in the study.
        attempt: The number of this attempt at the trial; 1 is the first.
        metric: The metric that is optimized, `objective.metric`.
        kind: "search", or "confirm" where one of the best rates is trained again on a fresh seed.
    """

    params: Mapping[str, Any]
    device: str
    epochs: int
    seed: int
    checkpoint_dir: Path
    number: int
    attempt: int
    metric: str
    kind: str
    _on_report: Callable[[int, dict[str, float], str | None], bool] = field(repr=False)
    _make_recipe: Callable[[], Recipe] = field(repr=False)

    @cached_property
    def recipe(self) -> Recipe:
        """Return the images, the network and the optimizer that the study describes: needs `objective.recipe = true`.

        A trial that was interrupted is as its loop saved it.
        """
        return self._make_recipe()

    def report(self, epoch: int, **metrics: float | str | Callable[[], float]) -> bool:
        """Record an epoch.

        Args:
            epoch: The epoch, counted from 1.
            **metrics: What you measured, by name; among them the study's `objective.metric`. All are kept and shown.
                Where that, or one whose name ends in "loss", is not finite, the trial ends as diverged, and so it does
                with a text as `diverged`, which says in a few words why training cannot recover. A function in
                place of a number is for the test set, as in `test_accuracy=measure`: it is called in the last epoch of
                a trial that confirms, and left out in all others.

        Returns:
            True where training must end now: return from your function.

        Raises:
            UserError: `epoch` is no such number, the study's metric is missing, or a name is reserved.
        """
        try:
            number = operator.index(epoch)
        except TypeError:
            number = 0
        if not 1 <= number < 2**31:
            raise UserError(f"trial.report: epoch must be an integer of at least 1, got {epoch!r}")
        for name in metrics:
            if name in RESERVED_METRICS:
                raise UserError(f"trial.report: {name!r} names a column of every trial and cannot be a metric")
        if self.metric not in metrics:
            raise UserError(
                f"trial.report must be given {self.metric}=..., the study's objective.metric; got {', '.join(metrics)}"
            )
        reason = metrics.pop("diverged") if isinstance(metrics.get("diverged"), str) else None
        measures_test = self.kind == "confirm" and number >= self.epochs
        values = {
            name: float(value() if callable(value) else value)
            for name, value in metrics.items()
            if measures_test or not callable(value)
        }
        return self._on_report(number, values, None if reason is None else str(reason))
