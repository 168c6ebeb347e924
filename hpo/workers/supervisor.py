"""Worker processes, wherever they are: started, started again when they die, and ended when their study is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from hpo.errors import StudyStopped
from hpo.store.retry import STORE_ERRORS
from hpo.store.store import Store
from hpo.study.processes import Process
from hpo.study.records import ENDED, StudyRecord
from hpo.workers.worker_handle import DRAIN_S, EXIT_RESTART, cause_of_death

TICK_S = 0.2
REAP_S = 5.0  # between looks for workers that died elsewhere, and for room for more
KILL_S = DRAIN_S + 10.0  # after being asked to leave, a worker that is still there is killed
MAX_CRASHES = 5  # for each worker: processes that died one after the other without an epoch in between

# Called several times a second while workers run, to show progress. The store that it is given waits for an outage to
# pass until the run is interrupted.
Watch = Callable[[Store], None]


class WorkerSlot(Protocol):
    """Where one worker process after the other runs. Called from one thread."""

    @property
    def exit_code(self) -> int | None:
        """Of the process that ran here last, once that has ended; None where nobody saw it end."""

    @property
    def process(self) -> Process | None:
        """The process that runs here, or ran here last, once that is known."""

    def start(self) -> None:
        """Starts a process, or has one started when there is room; not where it was asked to leave for good."""

    def is_running(self) -> bool:
        """Whether there is a process, or one is to come when there is room."""

    def ask_to_leave(self) -> None:
        """Has the process save and give back its trials and end; may be asked again."""

    def kill(self) -> None: ...

    def last_words(self) -> str:
        """How its last process ended, and the end of what it wrote."""


class WorkerPool(Protocol):
    """The places of a study's workers."""

    @property
    def places(self) -> Sequence[WorkerSlot]: ...

    def adjust(self, store: Store, study: StudyRecord) -> None:
        """Adds and removes places as it sees fit; called before the first start, and every REAP_S seconds."""


def supervise(store: Store, study: StudyRecord, crew: WorkerPool, *, interrupted: Sequence[int], watch: Watch) -> None:
    """Runs the crew's workers until no slot of the study is left, it is stopped, or `interrupted` is no longer empty.

    A second interruption while workers leave kills them. No worker is left when it returns or raises. Raises
    StudyStopped where workers die again and again.
    """
    waiting = store.retrying(until=lambda: bool(interrupted))  # an outage is waited out, unless somebody interrupts
    leaving = store.retrying(until=lambda: True)
    try:
        crew.adjust(waiting, study)
        for place in crew.places:
            if not place.is_running():
                place.start()
        _look_after(waiting, study, crew, interrupted, watch)
    finally:
        _drain(crew.places, interrupted, partial(watch, leaving))
        with suppress(*STORE_ERRORS):  # who goes on with the study does it too
            ended = [place.process for place in crew.places if place.process is not None]
            leaving.workers.reap(study, dead=dict.fromkeys(ended, "gone"))
    watch(store)


def _look_after(store: Store, study: StudyRecord, crew: WorkerPool, interrupted: Sequence[int], watch: Watch) -> None:
    crashes, before, next_look = 0, _progress(store, study), time.monotonic() + REAP_S
    while not interrupted:
        running = [place for place in crew.places if place.is_running()]
        look = time.monotonic() > next_look or len(running) < len(crew.places)
        if look and store.trials.num_left(study) == 0:
            return  # who is still here is idle, or hangs
        over = look and store.studies.is_stopping(study.study_id)
        if over and all(place.process is None for place in running):
            return  # nobody trains, though somebody may wait for room
        empty = [] if over else [place for place in crew.places if place not in running]
        if empty:  # while there is work left
            dead = {place.process: cause_of_death(place.exit_code) for place in empty if place.process is not None}
            store.workers.reap(study, dead=dead)
        for place in empty:
            progress = _progress(store, study)
            is_asked = place.exit_code == EXIT_RESTART or place.process is None
            crashes = 0 if is_asked or progress > before else crashes + 1
            before = progress
            if crashes >= MAX_CRASHES * len(crew.places):
                raise StudyStopped(
                    f"workers died {crashes} times without coming an epoch further, the last one {place.last_words()}",
                    can_resume=True,
                )
            place.start()
        if time.monotonic() > next_look:
            store.workers.reap(study)
            if not over:
                crew.adjust(store, study)
            next_look = time.monotonic() + REAP_S
        watch(store)
        time.sleep(TICK_S)


def _drain(places: Sequence[WorkerSlot], interrupted: Sequence[int], watch: Callable[[], None]) -> None:
    """Asks every worker to leave and waits; kills those that are still there after KILL_S or a second interruption."""
    for place in places:
        place.ask_to_leave()
    deadline = time.monotonic() + KILL_S
    while running := [place for place in places if place.is_running()]:
        if time.monotonic() > deadline or len(interrupted) > 1:
            for place in running:
                place.kill()
        with suppress(*STORE_ERRORS):  # showing progress must not keep the workers from being ended
            watch()
        time.sleep(TICK_S)


def _progress(store: Store, study: StudyRecord) -> int:
    """Grows with every epoch that a trial comes further, and with every trial that ends."""
    return store.trials.num_epochs(study) + sum(
        count for state, count in store.trials.counts(study.study_id).items() if state in ENDED
    )
