"""What an epoch of a trial came to, how the trial ends with it, and the thread that reports it to the store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hpo.analysis.text import plural
from hpo.study.records import Claim, EpochReport
from hpo.train.config import EpochResult, TrialConfig

if TYPE_CHECKING:
    from hpo.train.snapshot import Snapshot


class TrialEnd(NamedTuple):
    """The state in which a trial ends, and the reason in words."""

    state: str
    reason: str


def diverged_end(quantity: str, epoch: int) -> TrialEnd:
    """Return the end of a trial of which a quantity, such as "train_loss = nan", was not finite in an epoch."""
    return TrialEnd("diverged", f"{quantity} in epoch {epoch}")


def complete_end(epoch: int) -> TrialEnd:
    """Return the end of a trial that has trained for all its epochs."""
    return TrialEnd("complete", f"trained for {plural(epoch, 'epoch')}")


def pruned_end(pruner: str, epoch: int) -> TrialEnd:
    """Return the end of a trial that the pruner of this name has dropped after an epoch."""
    return TrialEnd("pruned", f"{pruner} pruner after epoch {epoch}")


@dataclass(frozen=True)
class EpochOutcome:
    """An epoch of a trial, to be reported; with a snapshot of the trial where it should be saved after it."""

    claim: Claim
    config: TrialConfig
    result: EpochResult
    is_last: bool
    snapshot: Snapshot | None

    @property
    def is_final(self) -> bool:
        """Whether the trial ends with this epoch, whatever the pruner says."""
        return self.is_last or self.result.diverged is not None

    def report(self) -> EpochReport:
        """Return what the store is told of the epoch."""
        result = self.result
        may_prune = self.claim.kind == "search" and not self.is_final
        value = result.value_of(self.config.training.metric)
        return EpochReport(self.claim, result.epoch, result.metrics(), value, may_prune)


class Reporter:
    """Runs one call at a time in a thread: a report of epochs. Call all of its methods from one other thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reports")
        self._running: Future[None] | None = None

    def begin(self, call: Callable[[], None]) -> None:
        """Start a call, once the one before has ended; raise what that one raised."""
        self.check()
        self._running = self._thread.submit(call)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait at most `timeout_s` for the call and return whether it has ended; never raise what it raised."""
        return self._running is None or self._running in wait([self._running], timeout_s).done

    def check(self) -> None:
        """Wait for the call, and raise what it raised."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Wait for the call and end the thread."""
        self._thread.shutdown()
