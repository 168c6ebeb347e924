"""The trials that a worker holds: claimed under leases, which are renewed, until they end or are released."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from hpo.store.ledger import ClaimLost, Verdict
from hpo.store.retry import StoreFailed
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord
from hpo.system import provenance
from hpo.train.config import derive_seed
from hpo.train.failures import OUT_OF_MEMORY, failure_key, failure_text, first_line, is_out_of_memory
from hpo.workers.reporting import TrialEnd
from hpo.workers.search_limits import SearchLimits
from hpo.workers.stop_signal import StopSignal
from hpo.workers.worker_device import DeviceFailed, WorkerDevice
from hpo.workers.worker_handle import EXIT_RESTART

logger = logging.getLogger(__name__)

REASON_CHARACTERS = 500  # of an exception's first line, which is the reason of a failed trial


class CheckpointFiles(Protocol):
    """The checkpoints of a worker's trials, as far as `HeldTrials` looks after them."""

    def wait(self, number: int) -> None:
        """Return when the trial's checkpoint that is being written is on disk; raise what writing it raised."""

    def forget(self, number: int) -> None:
        """Remove what a trial that has ended no longer needs."""


class NoCheckpointFiles:
    """The checkpoints of a user's own loop, which looks after them itself."""

    def wait(self, number: int) -> None:
        """Return at once."""

    def forget(self, number: int) -> None:
        """Remove nothing."""


class HeldTrials:
    """The trials that a worker holds, from their claim until they end, are released or turn out to be lost.

    Three threads use it: the worker's own, the one that reports epochs, and the heartbeat, which calls `renew`. `leave`
    may be called from a fourth. Claims are added to the set and discarded from it in single steps, and it is copied
    before anything loops over it, so it needs no lock.
    """

    def __init__(self, store: Store, study: StudyRecord, *, device: WorkerDevice, host: str, stop: StopSignal) -> None:
        self._store = store
        self._study = study
        self._spec = study.spec
        self._device = device
        self._host = host
        self._stop = stop
        self._worker_id = ""
        self._has_left = False
        self._pid = os.getpid()
        self._claims: set[Claim] = set()
        self._suspects: set[Claim] = set()  # claims that have the device to themselves for an epoch
        self._waiting: set[Claim] = set()  # claims to be released, because their trials wait for others of their race
        self._checkpoints: CheckpointFiles = NoCheckpointFiles()
        self._limits = SearchLimits(store, study)

    # The worker

    def register(self) -> None:
        """Add the worker to the study."""
        self._worker_id = self._store.workers.add(self._study.study_id, device=self._device.name, host=self._host)

    def renew(self) -> None:
        """Renew the leases of all trials held, until the worker leaves: a renewal would sign it on again."""
        if self._has_left:
            return
        self._store.workers.renew(list(self._claims), self._worker_id)

    def leave(self) -> None:
        """Release what is held and remove the worker from the study; from any thread."""
        self._has_left = True
        for claim in list(self._claims):
            self.release(claim)
        self._store.workers.remove(self._worker_id)

    def follow(self, study: StudyRecord) -> None:
        """Go on with the study as it is now that a range was widened; nothing is held at that moment."""
        self._study, self._spec = study, study.spec
        self._limits = SearchLimits(self._store, study)

    def look_after(self, checkpoints: CheckpointFiles) -> None:
        """From now on, finish writing a trial's checkpoint before giving it up, and remove it when the trial ends."""
        self._checkpoints = checkpoints

    def is_in_fork(self) -> bool:
        """Return whether this process is not the worker's, but one that the user's code forked from it."""
        return os.getpid() != self._pid

    # What is held

    def __contains__(self, claim: Claim) -> bool:
        return claim in self._claims

    def is_suspect(self, claim: Claim) -> bool:
        """Return whether a trial is suspected of killing its worker, and has yet to train an epoch alone."""
        return claim in self._suspects

    def has_suspect(self) -> bool:
        """Return whether one of the trials held is a suspect."""
        return bool(self._suspects & self._claims)

    def is_waiting(self, claim: Claim) -> bool:
        """Return whether a trial that is held should be saved and released, to wait for others of its race."""
        return claim in self._waiting and claim in self._claims

    # A trial's way from its claim to its end

    def claim(self, *, num_held: int = 0) -> Claim | None:
        """Claim a trial of the study; None where none waits for this worker, or the worker should leave.

        Before that, end the search or let its range grow where that is due.
        """
        if self._stop.is_set():
            return None
        may_begin_last = self._limits.check()
        claim = self._store.trials.claim(self._study, self._worker_id, num_held=num_held, may_begin_last=may_begin_last)
        if claim is not None:
            self._claims.add(claim)
            if claim.is_suspect:
                self._suspects.add(claim)
        return claim

    def suggest(self, claim: Claim) -> tuple[dict[str, Any], int]:
        """Return the trial's values and its seed.

        The seed is the searched value if there is one, or else derived from training.seed: for each trial its own,
        except that replicate n of every confirmed learning rate has the same.
        """

        def seed(values: Mapping[str, Any]) -> int:
            stream = ("trial", claim.number) if claim.replicate is None else ("confirm", claim.replicate)
            return int(values.get("seed", derive_seed(self._spec.training.seed, *stream)))

        values = self._store.trials.suggest(
            claim,
            self._spec,
            attributes=lambda values: provenance.trial_metadata(
                device=self._device.name, host=self._host, seed=seed(values)
            ),
        )
        logger.info("%s, on %s: %s", self._name(claim), self._device.name, dict(values))
        return values, seed(values)

    def note_verdict(self, claim: Claim, verdict: Verdict) -> None:
        """Take note of the store's answer to an epoch's report: the study may be stopping, or the trial should wait.

        Once a suspect has reported an epoch, it no longer needs the device to itself.
        """
        if verdict == "stop":
            self._stop.study_is_stopping()
        if verdict == "wait":
            self._waiting.add(claim)
        self._suspects.discard(claim)

    def finish(self, claim: Claim, end: TrialEnd) -> None:
        """End a trial for good, other than by a failure."""
        self._store.trials.finish(claim, end.state, reason=end.reason)
        logger.info("%s: %s, %s", self._name(claim), end.state, end.reason)
        self._claims.discard(claim)
        self._checkpoints.forget(claim.number)

    def release(self, claim: Claim) -> None:
        """Give a trial back, to be claimed again and resumed from its checkpoint."""
        self._end_writing(claim)
        self._claims.discard(claim)
        with suppress(ClaimLost):
            self._store.trials.release(claim, was_killed=self._stop.was_killed())

    @contextmanager
    def dropping_lost_claims(self, claim: Claim) -> Iterator[None]:
        """Drop the trial without a trace where it turns out to be another worker's by now."""
        try:
            yield
        except ClaimLost:
            logger.warning("another worker has trial %d now; dropped", claim.number)
            self._claims.discard(claim)

    @contextmanager
    def failing_trials_on_error(self, claims: Sequence[Claim]) -> Iterator[None]:
        """Record an exception in training as the failure of its trial, with the traceback, and go on.

        Where several trials were trained together it fails none of them. Each is tried again alone, which shows whose
        exception it was, if it is raised again at all. Where the device is to blame, it raises DeviceFailed and leaves
        the trials as they are: the worker gives them back when it leaves.
        """
        try:
            yield
        except (ClaimLost, StoreFailed, DeviceFailed):
            raise  # the trial is another's, or the store or the device is at fault: not the trial's failure
        except BaseException as error:  # a user's loop that calls sys.exit() ends its trial, not the worker
            if self.is_in_fork():
                os._exit(1)  # the user's code has returned to us in a process that it forked: nothing to do for it here
            if isinstance(error, KeyboardInterrupt) and self._stop.is_set():
                raise  # Ctrl-C, insisted on, where the worker is the command itself
            if (failure := self._device.failure_behind(error)) is not None:
                self._note_device_failure(claims, failure)
                raise failure from error
            self._fail(claims, error)
            if self._device.is_lost_to_process(error):
                raise SystemExit(EXIT_RESTART) from error

    def _fail(self, claims: Sequence[Claim], error: BaseException) -> None:
        reason = first_line(error)[:REASON_CHARACTERS]
        if is_out_of_memory(error):
            reason = OUT_OF_MEMORY
        text = failure_text(error)
        for claim in claims:
            self._end_writing(claim)
            with self.dropping_lost_claims(claim):
                is_final = self._store.trials.fail(
                    claim,
                    self._spec,
                    reason=reason,
                    error=text,
                    failure_key=failure_key(error),
                    alongside_others=len(claims) > 1,
                )
                self._claims.discard(claim)
                if is_final:
                    self._checkpoints.forget(claim.number)

    def _note_device_failure(self, claims: Sequence[Claim], failure: DeviceFailed) -> None:
        for claim in claims:
            with self.dropping_lost_claims(claim):
                self._store.trials.note(claim, f"given back: {failure}")

    def _end_writing(self, claim: Claim) -> None:
        """Wait for the checkpoint that is being written, so that whoever resumes the trial finds it."""
        with suppress(Exception):  # the trial is then resumed from the checkpoint before
            self._checkpoints.wait(claim.number)

    def _name(self, claim: Claim) -> str:
        return f"study {self._study.name}, trial {claim.number}, attempt {claim.attempt}"
