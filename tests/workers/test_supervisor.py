"""The supervisor's judgement of workers that have lost their devices; commands that lose workers are in test_local."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped
from hpo.store.store import Store
from hpo.study.processes import Process
from hpo.study.records import StudyRecord
from hpo.system.processes import machine_id
from hpo.workers.supervisor import ROOM_S, LostDevices, supervise
from hpo.workers.worker_handle import EXIT_NO_DEVICE, EXIT_RESTART, cause_of_death

MakeSpec = Callable[..., StudySpec]
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


class Slot:
    """A worker whose processes end one after the other with these exit codes; None: the process runs on."""

    def __init__(self, *exit_codes: int | None, is_placed: bool = True) -> None:
        self.exit_code: int | None = None
        self.process: Process | None = (machine_id(), 1) if is_placed else None
        self.num_started = 0
        self._exit_codes = list(exit_codes)

    def start(self) -> None:
        self.exit_code = self._exit_codes[self.num_started]
        self.num_started += 1

    def is_running(self) -> bool:
        return self.num_started > 0 and self.exit_code is None

    def ask_to_leave(self) -> None:
        self.exit_code = 0

    def kill(self) -> None: ...

    def describe_end(self) -> str:
        return "Ray gave a worker GPU 0, where CUDA sees no device"


class Pool:
    def __init__(self, *workers: Slot) -> None:
        self.workers: Sequence[Slot] = workers

    def adjust(self, store: Store, study: StudyRecord) -> None: ...


@pytest.fixture
def study(store: Store, make_spec: MakeSpec) -> StudyRecord:
    return store.studies.create(make_spec(0.1), metadata={})


def run(store: Store, study: StudyRecord, *workers: Slot, num_ticks: int = 3) -> None:
    """Supervise these workers, and interrupt it after so many looks."""
    interrupted: list[int] = []

    def count(_: Store) -> None:
        nonlocal num_ticks
        num_ticks -= 1
        if num_ticks == 0:
            interrupted.append(2)

    supervise(store, study, Pool(*workers), interrupted=interrupted, on_tick=count)


@on_sqlite
def test_a_worker_whose_device_failed_is_started_again_until_the_device_is_given_up(
    store: Store, study: StudyRecord
) -> None:
    sick, healthy = Slot(EXIT_RESTART, EXIT_RESTART, EXIT_NO_DEVICE), Slot(None)
    run(store, study, sick, healthy, num_ticks=8)
    assert (sick.num_started, healthy.num_started) == (3, 1)


@on_sqlite
def test_an_interruption_is_answered_at_once_with_what_it_does(
    store: Store, study: StudyRecord, caplog: pytest.LogCaptureFixture
) -> None:
    run(store, study, Slot(None), num_ticks=1)
    assert caplog.messages == ["saving after this epoch, for 30 s at most; Ctrl-C again ends the workers at once"]


@on_sqlite
def test_where_no_worker_has_a_device_left_the_study_stops_and_can_be_resumed(store: Store, study: StudyRecord) -> None:
    for _ in range(3):
        store.workers.count_device_failure(study, device="cuda:0", host="box", reason="RuntimeError: no GPU")
    with pytest.raises(StudyStopped) as caught:
        run(store, study, Slot(EXIT_NO_DEVICE), Slot(EXIT_NO_DEVICE))
    expected = "no worker has a usable device left: cuda:0 of box failed 3 times: RuntimeError: no GPU"
    assert (str(caught.value), caught.value.can_resume) == (expected, True)


@on_sqlite
def test_where_nobody_could_count_the_failure_the_worker_itself_says_why(store: Store, study: StudyRecord) -> None:
    with pytest.raises(StudyStopped, match="usable device left: Ray gave a worker GPU 0, where CUDA sees no device"):
        run(store, study, Slot(EXIT_NO_DEVICE, is_placed=False))


@on_sqlite
def test_workers_that_wait_for_room_get_some_time_to_find_another_device(
    store: Store, study: StudyRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lost, waits = Slot(EXIT_NO_DEVICE), Slot(None, is_placed=False)
    lost.start()
    waits.start()
    devices = LostDevices()
    devices.check(store, study, [lost, waits])
    now += ROOM_S - 1
    devices.check(store, study, [lost, waits])
    waits.process = (machine_id(), 2)  # it is placed
    now += 2
    devices.check(store, study, [lost, waits])
    waits.process = None  # its node is gone
    devices.check(store, study, [lost, waits])
    now += ROOM_S + 1
    with pytest.raises(StudyStopped):
        devices.check(store, study, [lost, waits])


@on_sqlite
def test_a_worker_that_hangs_in_its_driver_keeps_no_command_from_ending(
    store: Store, study: StudyRecord, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unkillable(Slot):
        num_kills = 0

        def ask_to_leave(self) -> None: ...

        def kill(self) -> None:
            self.num_kills += 1

    monkeypatch.setattr("hpo.workers.supervisor.KILL_S", 0.0)
    monkeypatch.setattr("hpo.workers.supervisor.UNKILLABLE_S", 0.3)
    worker = Unkillable(None)
    run(store, study, worker, num_ticks=1)
    assert worker.num_kills > 0
    assert "workers could not be killed: 1" in caplog.text


def test_a_device_that_is_given_up_says_nothing_of_the_trials_on_it() -> None:
    assert cause_of_death(EXIT_NO_DEVICE) == "gone"
