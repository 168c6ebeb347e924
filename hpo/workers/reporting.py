"""A round, the epochs of trials trained together, how one ends, and the thread that reports it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.study.records import Claim, EpochReport
from hpo.train.config import EpochResult, TrialConfig

if TYPE_CHECKING:
    from hpo.train.checkpoint import Checkpoint

End = tuple[str, str]  # the state in which a trial ends, and the reason


def diverged_end(what: str, epoch: int) -> End:
    return "diverged", f"{what} in epoch {epoch}"


def complete_end(epoch: int) -> End:
    return "complete", f"trained for {epoch} epochs"


@dataclass(frozen=True)
class EpochOutcome:
    """An epoch of a trial that is to be reported, and the trial after it where it is to be saved."""

    claim: Claim
    config: TrialConfig
    result: EpochResult
    is_last: bool
    checkpoint: Checkpoint | None

    @property
    def ends(self) -> bool:
        """Whether this is the trial's end, whatever the pruner says."""
        return self.is_last or self.result.diverged is not None

    def report(self) -> EpochReport:
        result = self.result
        may_prune = self.claim.kind == "search" and not self.ends
        return EpochReport(self.claim, result.epoch, result.metrics(), result.val_accuracy, may_prune)


class Reporter:
    """Runs one call at a time in a thread: what the store is told of a round. All methods are for one other thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reports")
        self._running: Future[None] | None = None

    def begin(self, call: Callable[[], None]) -> None:
        self.check()
        self._running = self._thread.submit(call)

    def wait(self, timeout: float | None = None) -> bool:
        """Returns whether the call has ended, after `timeout` seconds at most; does not raise what it raised."""
        return self._running is None or self._running in wait([self._running], timeout).done

    def check(self) -> None:
        """Waits for the call, and raises what it raised."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        self._thread.shutdown()
