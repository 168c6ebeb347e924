"""The worker's loop: train trials of one study on one device until there is nothing left to train.

It lives across trials, renews its leases from a thread, and leaves when no trial of the study is left, when it is told
to (SIGTERM, the death of its supervisor, `hpo stop`), or when its device is no longer usable.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Protocol

from hpo.store.ledger import LEASE_S
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.system.processes import heartbeat
from hpo.workers.held_trials import HeldTrials
from hpo.workers.stages import add_due_trials
from hpo.workers.stop_signal import StopSignal

POLL_S, LONGEST_POLL_S = 0.3, 5.0  # between looks for a trial while others hold the last ones: longer and longer
REAP_S = 5.0  # between looks for workers that died


class Runner(Protocol):
    """Trains the trials of a study that a worker claims."""

    def step(self) -> bool:
        """Claim what may be claimed and train for a while; return False where there was nothing to train."""

    def drain(self) -> None:
        """Save the trials still held, before the worker gives them back and leaves."""

    def close(self) -> None:
        """Free what is held, whatever went wrong before."""


class Worker:
    """Trains trials of one study on one device until there are none left or `should_stop()` is true.

    `device` is named as users name it, `torch_device` as torch names it in this process; `host` is recorded with the
    trials, by default the machine's name.
    """

    def __init__(
        self,
        store: Store,
        study: StudyRecord,
        *,
        device: str,
        torch_device: str,
        should_stop: Callable[[], bool],
        host: str | None = None,
    ) -> None:
        self._store = store
        self._study = study
        self._torch_device = torch_device
        self._stop = StopSignal(should_stop)
        self._held = HeldTrials(store, study, device=device, host=host or socket.gethostname(), stop=self._stop)

    def run(self) -> None:
        """Train trials until none is left or the worker should leave; then save and release what is held."""
        self._held.register()
        runner = self._make_runner()
        try:
            with heartbeat(self._held.renew, every_s=LEASE_S / 4):
                self._train(runner)
                runner.drain()
        finally:
            runner.close()
            self.leave()

    def leave(self) -> None:
        """Release what is held and sign off; from any thread, where a trial does not reach its next report."""
        self._held.leave()

    def _make_runner(self) -> Runner:
        # Imported here, because a worker that calls the user's function may do without torch.
        if (objective := self._study.spec.objective) is not None:
            from hpo.workers.function_runner import FunctionRunner

            return FunctionRunner(
                self._store,
                self._study,
                self._held,
                self._stop,
                function=objective.function,
                torch_device=self._torch_device,
            )
        from hpo.workers.lane_runner import LaneRunner

        return LaneRunner(self._store, self._study, self._held, self._stop, torch_device=self._torch_device)

    def _train(self, runner: Runner) -> None:
        next_reap_s, pause_s = 0.0, POLL_S
        while not self._stop.is_set():
            if runner.step():
                pause_s = POLL_S
                continue
            if not add_due_trials(self._store, self._study):
                return
            if time.monotonic() > next_reap_s:
                self._store.workers.reap(self._study)
                next_reap_s = time.monotonic() + REAP_S
            if self._store.studies.is_stopping(self._study.study_id):
                self._stop.study_is_stopping()
            self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_POLL_S)

    def _pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while not self._stop.is_set() and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, POLL_S))
