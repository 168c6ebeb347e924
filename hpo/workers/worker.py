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
from hpo.store.workers import MAX_DEVICE_FAILURES
from hpo.study.records import StudyRecord
from hpo.system.processes import heartbeat, machine_id
from hpo.workers.held_trials import HeldTrials
from hpo.workers.stages import add_due_trials
from hpo.workers.stop_signal import StopSignal
from hpo.workers.worker_device import DeviceFailed, WorkerDevice, precisions_to_prove

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

    `was_killed()` says whether the reason for that is a signal from outside, which counts against the trials held.

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
        was_killed: Callable[[], bool] = lambda: False,
        host: str | None = None,
    ) -> None:
        self._store = store
        self._study = study
        self._torch_device = torch_device
        precisions = precisions_to_prove(study.spec, torch_device)
        self._device = WorkerDevice(device, torch_device=torch_device, precisions=precisions)
        self._host = host or socket.gethostname()
        self._stop = StopSignal(should_stop, was_killed=was_killed)
        self._held = HeldTrials(store, study, device=self._device, host=self._host, stop=self._stop)

    def run(self) -> None:
        """Train trials until none is left or the worker should leave; then save and release what is held.

        Raises:
            DeviceFailed: The device cannot be used. The trials held were released, and the study counts the failure.
            SystemExit: This process can no longer use the device, and a new one can.
        """
        self._refuse_given_up_device()
        self._held.register()
        try:
            with heartbeat(self._held.renew, every_s=LEASE_S / 4):
                self._prove_and_train()
        except DeviceFailed as failure:
            raise self._counted(failure) from failure.__cause__
        finally:
            self.leave()

    def _prove_and_train(self) -> None:
        """Prove the device, then train until nothing is left, from anew where a range was widened meanwhile."""
        self._device.prove()
        while self._train_study():
            self._study = self._store.studies.get(self._study.name)
            self._held.follow(self._study)

    def _train_study(self) -> bool:
        """Train the study as it is, and return whether it was widened; an error may be the device's anywhere."""
        runner = self._make_runner()
        try:
            is_outdated = self._train(runner)
            runner.drain()
            return is_outdated
        except DeviceFailed:
            raise
        except Exception as error:
            if (failure := self._device.failure_behind(error)) is None:
                raise
            raise failure from error
        finally:
            runner.close()

    def _refuse_given_up_device(self) -> None:
        """Raise DeviceFailed where the device has failed so often in this study that nobody should try it again."""
        failed = self._store.workers.device_failures(self._study).get((machine_id(), self._device.name))
        if failed is not None and failed.count >= MAX_DEVICE_FAILURES:
            reason = f"it is given up after {failed.count} failures in this study, the last one {failed.reason}"
            raise DeviceFailed(self._device.name, reason, is_given_up=True)

    def _counted(self, failure: DeviceFailed) -> DeviceFailed:
        """Count a failure of the device in the study, and return it with what follows from the count."""
        failed = self._store.workers.count_device_failure(
            self._study, device=self._device.name, host=self._host, reason=failure.reason
        )
        return DeviceFailed(self._device.name, failure.reason, is_given_up=failed.count >= MAX_DEVICE_FAILURES)

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
                objective=objective,
                torch_device=self._torch_device,
            )
        from hpo.workers.lane_runner import LaneRunner

        return LaneRunner(self._store, self._study, self._held, self._stop, torch_device=self._torch_device)

    def _train(self, runner: Runner) -> bool:
        """Train until nothing is left, this worker should leave, or the study was widened; return whether it was."""
        next_reap_s, pause_s = 0.0, POLL_S
        while not self._stop.is_set():
            if runner.step():
                pause_s = POLL_S
                continue
            if not add_due_trials(self._store, self._study):
                return False
            if self._store.searches.is_outdated(self._study):
                return True
            if time.monotonic() > next_reap_s:
                self._store.workers.reap(self._study)
                next_reap_s = time.monotonic() + REAP_S
            if self._store.studies.is_stopping(self._study.study_id):
                self._stop.study_is_stopping()
            self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_POLL_S)
        return False

    def _pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while not self._stop.is_set() and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, POLL_S))
