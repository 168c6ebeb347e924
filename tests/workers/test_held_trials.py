"""What a worker holds: leases that are renewed, trials that are lost, released or tried again."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.config.study_spec import StudySpec
from hpo.store import database, schema
from hpo.store import ledger as ledger_module
from hpo.store.store import Store
from hpo.workers import worker as worker_module
from hpo.workers.held_trials import HeldTrials
from hpo.workers.stop_signal import StopSignal
from hpo.workers.worker_device import WorkerDevice
from tests.workers.training import HELD, engine_study, work, working

MakeSpec = Callable[..., StudySpec]
WriteLoop = Callable[[str], None]


def lease(store: Store) -> float:
    with store.storage.engine.connect() as connection:
        return float(connection.execute(sa.select(schema.slots_table.c.lease_until)).scalars().first() or 0)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_lease_is_renewed_during_a_long_epoch_also_after_database_errors(
    store: Store,
    make_spec: MakeSpec,
    loop: WriteLoop,
    tmp_path: Path,
    wait_for: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in (ledger_module, worker_module):
        monkeypatch.setattr(module, "LEASE_S", 0.4)
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    loop(HELD)
    study = store.studies.create(make_spec(0.1), metadata={})
    impatient = Store(store.url.render_as_string(hide_password=False))
    with working(impatient, study):
        wait_for(lambda: store.trials.get_all(study)[0].epochs)
        first = lease(store)
        wait_for(lambda: lease(store) > first)
        writer = sqlite3.connect(store.url.database or "")
        writer.execute("BEGIN IMMEDIATE")
        wait_for(lambda: "the leases could not be renewed" in caplog.text)
        writer.close()
        blocked = lease(store)
        wait_for(lambda: lease(store) > blocked)
        (tmp_path / "go").touch()
    (trial,) = store.trials.get_all(study)
    assert (trial.state, trial.attempt) == ("complete", 1)


SWALLOWS_EXCEPTIONS = """
for epoch in range(1, trial.epochs + 1):
    try:
        trial.report(epoch, val_accuracy=epoch)
    except Exception:
        pass
    while epoch == 1 and not pathlib.Path(__file__).with_name("go").exists():
        time.sleep(0.01)
"""


@pytest.mark.parametrize("code", [HELD, SWALLOWS_EXCEPTIONS], ids=["plain", "swallows exceptions"])
def test_a_trial_that_was_given_to_another_worker_is_dropped_without_a_trace(
    store: Store,
    make_spec: MakeSpec,
    loop: WriteLoop,
    tmp_path: Path,
    wait_for: Callable[..., Any],
    change: Callable[..., None],
    code: str,
) -> None:
    loop(code)
    study = store.studies.create(make_spec(0.1), metadata={})
    other = store.workers.add(study.study_id, device="cpu")
    with working(store, study):
        wait_for(lambda: store.trials.get_all(study)[0].epochs)
        change(store, schema.slots_table.update().values(lease_until=0))
        store.workers.reap(study)
        taken = store.trials.claim(study, other)
        assert taken is not None
        (tmp_path / "go").touch()
        wait_for(lambda: len(store.workers.get_all(study)) == 2)
        store.trials.report(taken, study.spec, epoch=1, metrics={"val_accuracy": 0.9}, value=0.9)
        store.trials.finish(taken, "complete", reason="by the other")
    (trial,) = store.trials.get_all(study)
    assert (trial.state, trial.attempt, trial.value, trial.epochs) == ("complete", 2, 0.9, [1])


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_claim_that_is_lost_before_training_begins_does_not_end_the_worker(store: Store) -> None:
    study = engine_study(store, 1e-3, 1e-4)
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER another_is_faster AFTER UPDATE OF state ON hpo_slots "
            "WHEN new.number = 0 AND new.attempt = 1 "
            "BEGIN UPDATE hpo_slots SET attempt = 2, worker_id = 'another' WHERE number = 0; END"
        )
    trials = work(store, study, should_stop=lambda: store.trials.get_all(study)[1].state == "complete")
    assert [(trial.state, trial.worker_id == "another") for trial in trials] == [("running", True), ("complete", False)]


NUMBER_OF_ITS_ATTEMPTS = """
if trial.attempt == 1:
    raise ValueError("this time")
trial.report(1, val_accuracy=trial.attempt)
"""


def test_a_trial_that_an_exception_ended_is_tried_again(store: Store, make_spec: MakeSpec, loop: WriteLoop) -> None:
    loop(NUMBER_OF_ITS_ATTEMPTS)
    (trial,) = work(store, store.studies.create(make_spec(0.1), metadata={}))
    assert (trial.state, trial.value, trial.error) == ("complete", 2.0, None)
    assert [attempt.outcome for attempt in trial.attempts] == ["ValueError: this time", "complete"]
    assert "raise ValueError" in str(trial.attempts[0].error)


def test_what_ran_out_of_memory_is_tried_again_alone_and_last(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
if trial.attempt == 1 and trial.number == 0:
    raise MemoryError
trial.report(1, val_accuracy=time.time())
""")
    trials = work(store, store.studies.create(make_spec(0.1, 0.2, 0.3, search={"retries": 0}), metadata={}))
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert [attempt.outcome for attempt in trials[0].attempts] == ["out of memory", "complete"]
    assert (trials[0].value or 0) > max(trial.value or 0 for trial in trials[1:])


def test_an_exception_is_charged_to_the_trial_that_raises_it_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.train.engines.plain import PlainEngine
    from hpo.train.engines.stack import TrialStack

    def is_bad(config: Any) -> bool:
        return bool(config.training.lr == 3e-4)

    group_step, plain_step = TrialStack.step, PlainEngine.step

    def in_a_group(self: Any, *batch: Any, **mixed: Any) -> Any:
        if any(is_bad(trial.config) for trial in self._trials()):
            raise RuntimeError("a bad trial")
        return group_step(self, *batch, **mixed)

    def in_a_plain_engine(self: Any, lane: Any, *batch: Any, **mixed: Any) -> Any:
        if is_bad(lane.config):
            raise RuntimeError("a bad trial")
        return plain_step(self, lane, *batch, **mixed)

    monkeypatch.setattr(TrialStack, "step", in_a_group)
    monkeypatch.setattr(PlainEngine, "step", in_a_plain_engine)
    study = engine_study(store, 1e-4, 3e-4, 1e-3, 3e-3, lanes=4)
    trials = work(store, study)
    assert [trial.state for trial in trials] == ["complete", "failed", "complete", "complete"]
    assert store.studies.get("digits").stop is None
    outcomes = [[attempt.outcome for attempt in trial.attempts] for trial in trials]
    assert outcomes[0] == ["alongside others: RuntimeError: a bad trial", "complete"]
    assert outcomes[1] == ["alongside others: RuntimeError: a bad trial", "RuntimeError: a bad trial", "failed"]


def test_a_worker_that_has_left_is_not_signed_on_again_by_a_late_renewal(store: Store, make_spec: MakeSpec) -> None:
    study = store.studies.create(make_spec(0.1), metadata={})
    device = WorkerDevice("cpu", torch_device="cpu", precisions=())
    held = HeldTrials(store, study, device=device, host="here", stop=StopSignal(lambda: False))
    held.register()
    held.renew()
    assert len(store.workers.get_all(study)) == 1
    held.leave()
    held.renew()
    assert store.workers.get_all(study) == []
