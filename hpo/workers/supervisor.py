"""Supervise worker processes, wherever they run: start them, restart those that die, end them with their study."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from hpo.errors import StudyStopped
from hpo.store.ledger import MAX_TRIAL_KILLS
from hpo.store.retry import STORE_ERRORS
from hpo.store.store import Store
from hpo.store.workers import MAX_DEVICE_FAILURES
from hpo.study.processes import Process
from hpo.study.records import ENDED, StudyRecord
from hpo.workers.worker_handle import DRAIN_S, EXIT_NO_DEVICE, EXIT_RESTART, cause_of_death

logger = logging.getLogger(__name__)

TICK_S = 0.2
CHECK_S = 5.0  # between looks for workers that died elsewhere, for the end of the study and for room for more workers
KILL_S = DRAIN_S + 10.0  # a worker that is still there so long after it was asked to leave is killed
UNKILLABLE_S = 20.0  # a worker that is still there so long after that is left to itself: it hangs in its driver
LEAVING = f"saving after this epoch, for {DRAIN_S:g} s at most; Ctrl-C again ends the workers at once"
ROOM_S = 30.0  # how long workers that wait for room are waited for when all others have lost their devices
# For each worker: processes that died one after the other without an epoch in between. Of those that had a trial, so
# many that it fails before the study stops.
MAX_CRASHES, MAX_CRASHES_WITH_TRIAL = 5, MAX_TRIAL_KILLS + 1

# Called several times a second while workers run, to show progress. The store that it is given waits for an outage to
# pass until the run is interrupted.
OnTick = Callable[[Store], None]


class WorkerSlot(Protocol):
    """A place where one worker process after the other runs. Called from one thread."""

    @property
    def exit_code(self) -> int | None:
        """The exit code of the last process, once it has ended; None where nobody saw it end."""

    @property
    def process(self) -> Process | None:
        """The process that runs here, or that ran here last, once that is known."""

    def start(self) -> None:
        """Start a process, or have one started when there is room; do nothing where it was asked to leave for good."""

    def is_running(self) -> bool:
        """Return whether there is a process, or one will start when there is room."""

    def ask_to_leave(self) -> None:
        """Have the process save and release its trials and end; it may be asked again."""

    def kill(self) -> None:
        """Kill the process."""

    def describe_end(self) -> str:
        """Return how the last process ended, with the end of what it wrote."""


class WorkerPool(Protocol):
    """The workers of a study."""

    @property
    def workers(self) -> Sequence[WorkerSlot]:
        """The workers as they are now; `adjust` may change them."""

    def adjust(self, store: Store, study: StudyRecord) -> None:
        """Add and remove workers as it sees fit; called before the first start, and every CHECK_S seconds."""


def supervise(
    store: Store, study: StudyRecord, pool: WorkerPool, *, interrupted: Sequence[int], on_tick: OnTick
) -> None:
    """Run the workers of a pool until no trial of the study is left, or it is stopped or interrupted.

    No worker is left when it returns or raises, except for one that hangs in its driver and cannot be killed.

    Args:
        store: The store of the study.
        study: The study.
        pool: The workers.
        interrupted: The signals that were received meanwhile. The first asks the workers to leave, the second kills
            those that are leaving.
        on_tick: Called several times a second.

    Raises:
        StudyStopped: Workers died again and again, or none has a device left that it can use.
    """
    waiting = store.retrying(until=lambda: bool(interrupted))  # an outage is waited out, unless somebody interrupts
    leaving = store.retrying(until=lambda: True)
    try:
        pool.adjust(waiting, study)
        for worker in pool.workers:
            if not worker.is_running():
                worker.start()
        _watch_over(waiting, study, pool, interrupted, on_tick)
    finally:
        _drain(pool.workers, interrupted, partial(on_tick, leaving))
        with suppress(*STORE_ERRORS):  # whoever resumes the study does it too
            ended = [worker.process for worker in pool.workers if worker.process is not None]
            leaving.workers.reap(study, dead=dict.fromkeys(ended, "gone"))
    on_tick(store)


def _watch_over(
    store: Store, study: StudyRecord, pool: WorkerPool, interrupted: Sequence[int], on_tick: OnTick
) -> None:
    """Restart workers that die, until the study is over or is interrupted."""
    crashes, progress, next_check_s = 0, _progress(store, study), time.monotonic() + CHECK_S
    lost_devices = LostDevices()
    while not interrupted:
        running = [worker for worker in pool.workers if worker.is_running()]
        ended = [worker for worker in pool.workers if worker not in running and not has_lost_device(worker)]
        is_check_due = time.monotonic() > next_check_s or bool(ended) or not running
        if is_check_due and store.trials.num_left(study) == 0:
            return  # the workers that are still here are idle, or hang
        is_stopping = is_check_due and store.studies.is_stopping(study.study_id)
        if is_stopping and all(worker.process is None for worker in running):
            return  # nobody trains, though a worker may wait for room
        if ended and not is_stopping:
            dead = {worker.process: cause_of_death(worker.exit_code) for worker in ended if worker.process is not None}
            had_trials = store.workers.reap(study, dead=dead, supervised=_processes(pool)) > 0
            max_crashes = MAX_CRASHES_WITH_TRIAL if had_trials else MAX_CRASHES
            for worker in ended:
                previous, progress = progress, _progress(store, study)
                was_sent_away = worker.exit_code == EXIT_RESTART or worker.process is None
                crashes = 0 if was_sent_away or progress > previous else crashes + 1
                if crashes >= max_crashes * len(pool.workers):
                    raise StudyStopped(
                        f"workers died {crashes} times without finishing another epoch, the last one "
                        f"{worker.describe_end()}",
                        can_resume=True,
                    )
                worker.start()
        lost_devices.check(store, study, pool.workers)
        if time.monotonic() > next_check_s:
            store.workers.reap(study, supervised=_processes(pool))
            if not is_stopping:
                pool.adjust(store, study)
            next_check_s = time.monotonic() + CHECK_S
        on_tick(store)
        time.sleep(TICK_S)


def has_lost_device(worker: WorkerSlot) -> bool:
    """Return whether the last process ended because its device is given up: none should be started here again."""
    return worker.exit_code == EXIT_NO_DEVICE


class LostDevices:
    """Sees when no worker of a pool has a device left that it can use."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    def check(self, store: Store, study: StudyRecord, workers: Sequence[WorkerSlot]) -> None:
        """Raise StudyStopped where every worker has lost its device, and none that waits for room gets any."""
        lost = [worker for worker in workers if has_lost_device(worker)]
        others = [worker for worker in workers if not has_lost_device(worker)]
        if not lost or any(worker.process is not None for worker in others):
            self._since_s = None
            return
        if self._since_s is None:
            self._since_s = time.monotonic()
        if others and time.monotonic() - self._since_s < ROOM_S:
            return
        machines = {worker.process[0] for worker in lost if worker.process is not None}
        given_up = [
            str(failures)
            for failures in store.workers.device_failures(study).values()
            if failures.machine in machines and failures.count >= MAX_DEVICE_FAILURES
        ]
        reasons = given_up or [lost[-1].describe_end()]
        raise StudyStopped(f"no worker has a usable device left: {'; '.join(reasons)}", can_resume=True)


def _processes(pool: WorkerPool) -> set[Process]:
    """Return the processes of a pool as far as they are known, without those that were the last of their worker."""
    return {worker.process for worker in pool.workers if worker.process is not None and not has_lost_device(worker)}


def _drain(workers: Sequence[WorkerSlot], interrupted: Sequence[int], on_tick: Callable[[], None]) -> None:
    """Ask every worker to leave, and wait; kill those still there after KILL_S or a second interruption.

    A process that hangs in its driver does not end before that lets go of it. It trains nothing and dies then, so it is
    not waited for.
    """
    for worker in workers:
        worker.ask_to_leave()
    if interrupted:
        logger.warning("%s", LEAVING)
    deadline = time.monotonic() + KILL_S
    while running := [worker for worker in workers if worker.is_running()]:
        if time.monotonic() > deadline + UNKILLABLE_S:
            logger.warning("workers could not be killed: %d", len(running))
            break
        if time.monotonic() > deadline or len(interrupted) > 1:
            deadline = min(deadline, time.monotonic())
            for worker in running:
                worker.kill()
        with suppress(StudyStopped, *STORE_ERRORS):  # whatever is shown must not keep the workers from being ended
            on_tick()
        time.sleep(TICK_S)


def _progress(store: Store, study: StudyRecord) -> int:
    """Return a number that grows with every epoch that a trial advances, and with every trial that ends."""
    counts = store.trials.counts(study.study_id)
    return store.trials.num_epochs(study) + sum(count for state, count in counts.items() if state in ENDED)
