"""The contract of an engine: a set of lanes on one device, each of which trains one trial."""

from __future__ import annotations

from typing import Protocol

from hpo.train.checkpoint import Checkpoint
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.snapshot import Snapshot


class Stopped(Exception):
    """Training was asked to stop in the middle of an epoch; nothing of that epoch is kept."""


class Engine(Protocol):
    """A set of lanes on one device, each of which trains one trial.

    The worker's loop is the same for every engine. It admits trials while there are free lanes, runs an epoch, reports
    each result, and evicts the trials that are pruned, diverged or at their last epoch. All calls come from one thread.

    A trial's numbers do not depend on what shares the device with it. On a CPU they follow digit for digit from its
    TrialConfig and the number of threads; on a GPU they do up to the order in which its kernels add.
    """

    @property
    def free_lanes(self) -> int:
        """Return how many more trials can be admitted now."""

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        """Set a trial up, ready for its next epoch, and return the number of its lane.

        With a checkpoint, which has to be of this configuration, the trial resumes after `checkpoint.epoch` as if it
        had never stopped: on a CPU digit for digit, in any process with the same number of threads.
        Call it only while `free_lanes` > 0. Raises UserError where the trial cannot be trained as it is configured, or
        its network is no longer the checkpoint's. The lane is then still free, as after any other exception.
        """

    def run_epoch(self) -> list[EpochResult]:
        """Train the trials whose turn it is for one epoch, validate them, and return one result for each.

        No trial has its second turn before every other admitted one has had its first. Call it neither for a trial
        that diverged nor past a trial's last epoch. Raises Stopped where the engine was told to stop; the trials whose
        turn it was are then in the middle of an epoch, and only `evict` may be called for them.
        """

    def snapshot(self, lane: int) -> Snapshot:
        """Return the trial in a lane after its last epoch, as a copy that later training does not change.

        It becomes a checkpoint in whichever thread asks for that; this one need not wait for a GPU. Of a network it
        holds what state_dict() gives: parameters, persistent buffers and get_extra_state(). Raises UserError where that
        cannot be stored. Call it between epochs, not after `run_epoch` raised.
        """

    def checkpoint(self, lane: int) -> Checkpoint:
        """Return the checkpoint of the trial in a lane after its last epoch; see `snapshot`."""
        return self.snapshot(lane).checkpoint()

    def evict(self, lane: int) -> None:
        """Forget the trial in a lane and free its memory; the lane is free afterwards."""
