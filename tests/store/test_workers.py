"""Workers that are gone: their slots are freed, and their crashes counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.store import schema
from hpo.store.ledger import MAX_TRIAL_CRASHES, MAX_TRIAL_KILLS
from hpo.store.store import Store
from hpo.system import processes as liveness
from tests.store.helpers import (
    LONG_AGO,
    Change,
    MakeSpec,
    begin,
    claim,
    end_worker_process,
    expire,
    move_elsewhere,
    only_postgres,
    optuna_trials,
    report,
    trial,
    url_of,
)


def test_the_slot_of_a_dead_process_of_this_machine_is_freed_at_once(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    lost = claim(store, study, worker)
    kept = claim(store, study, store.workers.add(study.study_id, device="cpu"))
    assert store.workers.reap(study) == 0
    end_worker_process(store, worker, change)
    assert [row.alive for row in store.workers.get_all(study)] == [False, True]
    assert store.workers.reap(study) == 1
    assert [row.worker_id for row in store.workers.get_all(study)] == [kept.worker_id]
    assert [(t.number, t.state) for t in store.trials.get_all(study)] == [
        (lost.number, "waiting"),
        (kept.number, "running"),
    ]


def test_the_slot_of_a_worker_elsewhere_is_freed_when_its_lease_runs_out(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    move_elsewhere(store, worker, change)
    end_worker_process(store, worker, change)  # a pid of another machine says nothing here
    assert store.workers.reap(study) == 0
    change(store, schema.workers_table.update().values(seen_at=LONG_AGO))
    report(store, held, 0.5)  # it reports, so its lease is fresh whatever its heartbeat does
    assert store.workers.reap(study) == 0
    expire(store, held, change)
    assert store.workers.reap(study) == 1
    assert [row.alive for row in store.workers.get_all(study)] == [False]


def test_a_worker_elsewhere_that_was_given_up_works_on_when_it_comes_back(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1))
    lost = claim(store, study, worker)
    move_elsewhere(store, worker, change)
    expire(store, lost, change)
    change(store, schema.workers_table.update().values(seen_at=LONG_AGO))
    assert store.workers.reap(study) == 1
    again = claim(store, study, worker)
    assert store.workers.reap(study) == 0
    store.workers.renew([again], worker)
    assert store.workers.reap(study) == 0
    assert [row.alive for row in store.workers.get_all(study)] == [True]


def test_a_worker_that_left_without_its_slot_does_not_keep_it(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1))
    claim(store, study, worker)
    store.workers.remove(worker)
    assert store.workers.reap(study) == 1


def test_a_trial_that_keeps_killing_its_workers_fails(store: Store, make_spec: MakeSpec, change: Change) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    for attempt in range(1, MAX_TRIAL_CRASHES + 1):
        lost = claim(store, study, worker)
        assert (lost.number, lost.attempt) == (0, attempt)
        expire(store, lost, change)
        assert store.workers.reap(study, dead={(liveness.machine_id(), os.getpid()): "crashed"}) == 1
    ended = trial(store, study)
    assert (ended.state, ended.reason) == ("failed", f"its worker died {MAX_TRIAL_CRASHES} times")
    assert optuna_trials(store)[0].state is TrialState.FAIL
    assert claim(store, study, worker).number == 1


def test_a_supervised_worker_is_left_to_its_supervisor(store: Store, make_spec: MakeSpec, change: Change) -> None:
    """Looked up a moment before its supervisor tells, it would have crashed for nothing."""
    study = store.studies.create(make_spec(0.1), metadata={})
    for _ in range(MAX_TRIAL_CRASHES):
        worker = store.workers.add(study.study_id, device="cpu")
        claim(store, study, worker)
        end_worker_process(store, worker, change)
        (process,) = store.workers.in_training(study)
        assert store.workers.reap(study, supervised={process}) == 0
        assert store.workers.reap(study, dead={process: "crashed"}, supervised={process}) == 1
    ended = trial(store, study)
    assert (ended.state, ended.attempt) == ("failed", MAX_TRIAL_CRASHES)


def test_deaths_that_no_supervisor_saw_do_not_count(store: Store, make_spec: MakeSpec, change: Change) -> None:
    """Power cuts, and kills of everything at once, are no fault of the trial."""
    study, worker = begin(store, make_spec(0.1))
    for _ in range(2 * MAX_TRIAL_CRASHES):
        expire(store, claim(store, study, worker), change)
        assert store.workers.reap(study, dead={(liveness.machine_id(), os.getpid() + 1): "crashed"}) == 1
    assert trial(store, study).state == "waiting"


def test_three_trials_that_kill_their_workers_stop_the_study(store: Store, make_spec: MakeSpec, change: Change) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.3, 0.4))
    for _ in range(3 * MAX_TRIAL_CRASHES):
        expire(store, claim(store, study, worker), change)
        store.workers.reap(study, dead={(liveness.machine_id(), os.getpid()): "crashed"})
    stopped = store.studies.get("s")
    assert stopped.stop == "failure"
    assert "3 trials failed the same way" in str(stopped.stop_reason)
    assert store.trials.claim(study, worker) is None


def test_a_process_is_told_from_a_later_one_of_the_same_pid_whatever_the_clock_does() -> None:
    started = liveness.process_start_s()
    assert liveness.is_running(os.getpid(), started=started)
    assert not liveness.is_running(os.getpid(), started=started - 60)
    # Counted from the boot of the machine: a clock that is set would shift every time of day.
    uptime_s = float(Path("/proc/uptime").read_text().split()[0]) if Path("/proc/uptime").exists() else started
    assert 0 <= started <= uptime_s


@only_postgres
def test_a_slot_that_is_being_reported_on_is_not_freed(store: Store, make_spec: MakeSpec, change: Change) -> None:
    """Its lease may have run out while the worker waited for the database."""
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    expire(store, held, change)
    with store.storage.engine.begin() as reporting:
        reporting.execute(schema.slots_table.update().values(last_epoch=1))
        assert Store(url_of(store)).workers.reap(study) == 0
    assert store.workers.reap(study) == 1


def test_failures_of_devices_are_counted_by_machine_and_device_until_the_study_is_started_again(
    store: Store, make_spec: MakeSpec
) -> None:
    study, _ = begin(store, make_spec(0.1))
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        counted = store.workers.count_device_failure(study, device=device, host="box", reason=f"of {device}\0")
    assert str(counted) == "cuda:0 of box failed 2 times: of cuda:0\\0"
    found = store.workers.device_failures(study)
    assert {key: one.count for key, one in found.items()} == {
        (liveness.machine_id(), "cuda:0"): 2,
        (liveness.machine_id(), "cuda:1"): 1,
    }
    store.studies.start(study)
    assert store.workers.device_failures(study) == {}
    assert store.workers.count_device_failure(study, device="cuda:1", host="box", reason="").count == 1
    assert store.workers.device_failures(study).keys() == {(liveness.machine_id(), "cuda:1")}
    assert store.studies.shared_values(study) == {}  # these are values that workers agree on


@pytest.mark.parametrize("sign_of_life", ["renewal", "claim"])
def test_a_living_worker_that_was_taken_for_dead_is_healed_by_its_next_sign_of_life(
    store: Store, make_spec: MakeSpec, change: Change, sign_of_life: str
) -> None:
    study, worker = begin(store, make_spec(0.1))
    change(store, schema.workers_table.update().values(ended_at=LONG_AGO))
    assert store.workers.get_all(study) == []
    if sign_of_life == "renewal":
        store.workers.renew([], worker)
        assert [row.alive for row in store.workers.get_all(study)] == [True]
    held = claim(store, study, worker)
    assert store.workers.reap(study) == 0
    report(store, held, 0.5)
    store.trials.finish(held, "complete", reason="")


def test_the_slot_of_a_worker_whose_row_is_gone_is_freed_when_its_lease_runs_out(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    with store.storage.engine.begin() as connection:
        connection.execute(schema.workers_table.delete())
    assert store.workers.reap(study) == 0
    expire(store, held, change)
    assert store.workers.reap(study) == 1


def test_a_trial_whose_worker_is_told_to_leave_by_nobody_fails_in_the_end(store: Store, make_spec: MakeSpec) -> None:
    """Its own code may send the signal; an operator who does may do so ten times, or between two epochs."""
    study, worker = begin(store, make_spec(0.1, 0.2))
    for _ in range(MAX_TRIAL_KILLS - 1):
        held = claim(store, study, worker)
        store.trials.release(held, was_killed=True)
        store.trials.release(claim(store, study, worker))  # because its supervisor says so: does not count
    held = claim(store, study, worker)
    report(store, held, 0.5)  # another epoch
    store.trials.release(held, was_killed=True)
    assert trial(store, study).state == "waiting"
    for _ in range(MAX_TRIAL_KILLS - 1):
        held = claim(store, study, worker)
        report(store, held, 0.5)  # the same one again
        store.trials.release(held, was_killed=True)
    ended = trial(store, study)
    assert (ended.state, ended.reason) == (
        "failed",
        f"a signal ended its worker {MAX_TRIAL_KILLS} times; the training code may send it",
    )
    assert [attempt.outcome for attempt in ended.attempts][-2:] == ["released", "failed"]
