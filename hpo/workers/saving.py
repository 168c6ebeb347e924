"""When a trial in training is saved: after every so many epochs, or as often as costs little of its training."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

MAX_SAVING_SHARE = 0.05  # of a trial's training: how long saving it may take
NUM_TIMES = 5  # of the last snapshots and files: their medians count, because a stopped process makes one of them slow


class SavingCost:
    """How long a worker takes to save a trial; one thread takes the snapshots, another one writes the files."""

    def __init__(self) -> None:
        self._snapshots_s: deque[float] = deque(maxlen=NUM_TIMES)
        self._files_s: deque[float] = deque(maxlen=NUM_TIMES)

    def seconds(self) -> float:
        """Return how long a snapshot and its file take; of either, 0 before there was one.

        Writing counts in full, though training goes on meanwhile: it takes cores from it, and where files are written
        more slowly than snapshots are taken, training waits.
        """
        return sum(statistics.median(list(times_s)) for times_s in (self._snapshots_s, self._files_s) if times_s)

    @contextmanager
    def timing_snapshot(self) -> Iterator[None]:
        """Add the time that the block takes, unless it raises."""
        start_s = time.perf_counter()
        yield
        self._snapshots_s.append(time.perf_counter() - start_s)

    @contextmanager
    def timing_file(self) -> Iterator[None]:
        """Add the time that the block takes, unless it raises."""
        start_s = time.perf_counter()
        yield
        self._files_s.append(time.perf_counter() - start_s)


class SavingSchedule:
    """After which epochs one trial in training is saved.

    With "auto" saving takes at most MAX_SAVING_SHARE of the training between two checkpoints; besides, the trial is
    saved at each rung. What a kill costs is therefore less training than `cost_s` / MAX_SAVING_SHARE, and an epoch.
    """

    def __init__(
        self, every: int | Literal["auto"], *, cost: SavingCost, epoch: int, is_rung: Callable[[int], bool]
    ) -> None:
        """Make the schedule of a trial that is as it was saved, or untrained.

        Args:
            every: training.checkpoint_epochs.
            cost: What saving takes, as far as it is known.
            epoch: How many epochs the trial has finished.
            is_rung: Whether an epoch is a rung of the pruner.
        """
        self._every, self._cost, self._is_rung = every, cost, is_rung
        self._epoch = self._saved_epoch = epoch
        self._unsaved_s = 0.0

    @property
    def has_unsaved(self) -> bool:
        """Return whether the trial has finished epochs since it was last saved."""
        return self._epoch > self._saved_epoch

    def add_epoch(self, epoch: int, *, seconds: float) -> None:
        """Note that an epoch is finished, and the trial's share of the device's time that it took."""
        self._epoch = epoch
        self._unsaved_s += seconds

    def is_due(self) -> bool:
        """Return whether the trial is to be saved after the epoch that was added last."""
        if self._every != "auto":
            return self._epoch % self._every == 0
        return self._is_rung(self._epoch) or self._cost.seconds() <= MAX_SAVING_SHARE * self._unsaved_s

    def note_saved(self) -> None:
        """Note that a snapshot was taken after the epoch that was added last."""
        self._saved_epoch, self._unsaved_s = self._epoch, 0.0
