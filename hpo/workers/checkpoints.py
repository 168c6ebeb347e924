"""A study's checkpoints: from which one a trial resumes, and which are removed; `hpo.train.checkpoint` writes them."""

from __future__ import annotations

import logging
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord
from hpo.train.checkpoint import Checkpoint, CheckpointFolder, list_folders
from hpo.train.config import TrialConfig
from hpo.train.snapshot import Snapshot
from hpo.workers.saving import SavingCost

logger = logging.getLogger(__name__)


class StudyCheckpoints:
    """The checkpoints of a study's trials, a folder for each trial, at checkpoints.url or else on this machine.

    No trial ends because of a checkpoint that cannot be written or read: the store takes a note, and training goes on.
    A thread writes checkpoints while the trials train their next epoch. One other thread at a time may use this, except
    that `wait` may be called at any time.
    """

    def __init__(self, store: Store, study: StudyRecord) -> None:
        self._store = store
        self._study = study
        self._url = store.checkpoints_url(study)
        self._num_kept = study.spec.checkpoints.keep_best
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: dict[int, Future[None]] = {}  # by trial
        self.cost = SavingCost()

    def resume(self, claim: Claim, config: TrialConfig) -> Checkpoint | None:
        """Return the trial's newest whole checkpoint, or None where it starts from its first epoch; tell the store.

        Where that is earlier than its last report, which a kill may cost it, the attempt's note says what is trained
        again. Where the store lacks epochs that the checkpoint has, report them now: a power cut may have cost the
        database its last transactions.
        """
        with suppress(Exception):  # what was being written for an earlier attempt at it, by this worker
            self.wait(claim.number)
        checkpoint, notes = self._load(claim, config)
        epoch = checkpoint.epoch if checkpoint else 0
        seconds = self._store.trials.epoch_seconds(claim)
        last_epoch = max(seconds, default=0)
        if checkpoint is None and claim.tested is not None:
            notes.append(f"trained again: {socket.gethostname()} finds no checkpoint of trial {claim.tested}")
        elif last_epoch > epoch:
            note = _again(epoch + 1, last_epoch, sum(seconds[number] for number in seconds if number > epoch))
            if checkpoint is None:
                note += f": {socket.gethostname()} finds no checkpoint in {self._url}"
            notes.append(note)
        for note in notes:
            logger.warning("trial %d: %s", claim.number, note)
        self._store.trials.begin(claim, resumed_from=epoch, notes=notes)
        if checkpoint is not None:
            self._report_missing(claim, checkpoint, last_epoch=last_epoch)
        return checkpoint

    def _load(self, claim: Claim, config: TrialConfig) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest whole checkpoint of the trial, or else of the one that it tests; note what was wrong."""
        try:
            checkpoint, notes = self._folder(claim.number).load(config)
            if checkpoint is None and claim.tested is not None:
                checkpoint, notes_of_tested = self._folder(claim.tested).load(config)
                notes += notes_of_tested
        except OSError as error:
            return None, [f"its checkpoints in {self._url} could not be read: {error}"]
        return checkpoint, notes

    def _report_missing(self, claim: Claim, checkpoint: Checkpoint, *, last_epoch: int) -> None:
        """Report the epochs of a checkpoint after the last one that the store knows."""
        for result in checkpoint.results:
            if result.epoch > last_epoch:
                self._store.trials.report(
                    claim,
                    self._study.spec,
                    epoch=result.epoch,
                    metrics=result.metrics(),
                    value=result.value_of(self._study.spec.training.metric),
                    may_prune=False,
                )

    def save(self, claim: Claim, snapshot: Snapshot) -> None:
        """Begin to write a trial's checkpoint. Where that fails, the checkpoint before it is still there."""
        self.wait(claim.number)
        self._writing[claim.number] = self._writer.submit(self._write, claim, snapshot)

    def wait(self, number: int) -> None:
        """Return when the checkpoint that `save` has begun to write is on disk; raise what writing it raised.

        Call it before the trial's next epoch is reported. Of the epochs that the store knows, a kill then loses none
        from before the last snapshot but one, nor the one of the last snapshot where an epoch was reported after it.
        """
        if (writing := self._writing.pop(number, None)) is not None:
            writing.result()

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._writer.shutdown()

    def _write(self, claim: Claim, snapshot: Snapshot) -> None:
        try:
            with self.cost.timing_file():
                self._folder(claim.number).save(snapshot.checkpoint())
        except OSError as error:
            logger.warning("trial %d: no checkpoint of epoch %d: %s", claim.number, snapshot.epoch, error)
            self._store.trials.note(claim, f"a checkpoint could not be written: {error.strerror or error}")

    def may_be_kept(self, number: int, value: float) -> bool:
        """Return whether a trial that completes with this value is one of the best, whose last checkpoint is kept.

        Of equal trials the one with the lower number is better, as in `Trials.best`.
        """
        best = self._store.trials.best(self._study, self._num_kept)
        sign = 1 if self._study.spec.direction == "maximize" else -1
        return len(best) < self._num_kept or any((sign * value, -number) > (sign * v, -n) for n, v in best)

    def forget(self, number: int) -> None:
        """Remove what a trial that has ended no longer needs, and the checkpoints of those that it displaced."""
        with suppress(Exception):  # what is still being written of it must not appear after this
            self.wait(number)
        kept, displaced = self._store.trials.keeping_weights(self._study, self._num_kept)
        for unneeded in {number, *displaced} - kept:
            self._remove(unneeded)

    def tidy(self) -> None:
        """Remove what workers that were killed, or that had lost their trial, have left of trials that have ended."""
        ended = self._store.trials.ended_numbers(self._study)  # read first: a trial may end meanwhile, and be the best
        unneeded = ended - self._store.trials.keeping_weights(self._study, self._num_kept)[0]
        with suppress(OSError):
            for name in list_folders(self._url):
                if name.isdecimal() and int(name) in unneeded:
                    self._remove(int(name))

    def _folder(self, number: int) -> CheckpointFolder:
        return checkpoint_folder(self._url, self._study, number)

    def _remove(self, number: int) -> None:
        try:
            self._folder(number).remove()
        except OSError as error:
            logger.warning("the checkpoints of trial %d could not be removed: %s", number, error)


def checkpoint_folder(url: str, study: StudyRecord, number: int) -> CheckpointFolder:
    """Return the folder of one trial's checkpoints below `url`, that of its study."""
    identity: dict[str, str | int] = {"study": study.origin, "trial": number}
    return CheckpointFolder(f"{url}/{number:06d}", identity=identity)


def _again(first: int, last: int, seconds: float) -> str:
    """Return the note of an attempt that trains epochs once more, which took so long before."""
    epochs = f"epoch {last} is" if first == last else f"epochs {first} to {last} are"
    return f"{epochs} trained again ({seconds:.1f} s)"
