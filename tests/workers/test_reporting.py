"""Reports and checkpoints that are made while the next epoch trains, whatever happens meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from hpo.config.study_spec import StudySpec
from hpo.store import ledger, schema
from hpo.store.retry import StoreFailed
from hpo.store.store import Store
from hpo.store.trials import Trials
from hpo.study.records import StudyRecord
from hpo.train.checkpoint import Checkpoint, CheckpointFolder
from hpo.train.engines.plain import PlainEngine
from hpo.workers import worker
from hpo.workers.reporting import Reporter
from tests.workers.training import engine_study, work


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/hpo.db", create=True)


@pytest.fixture
def slow_reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what happened, in order, with a store that answers only once training has begun its next epoch.

    Or once the worker waits for the answer, so that training cannot begin.
    """
    events: list[str] = []
    run_epoch, report_all, wait, check = PlainEngine.run_epoch, Trials.report_all, Reporter.wait, Reporter.check
    changed, is_waiting = threading.Condition(), threading.Event()

    def noting_training(self: Any) -> Any:
        with changed:
            events.append(f"training {self._lane.epoch + 1}")
            changed.notify()
        return run_epoch(self)

    @contextmanager
    def waiting() -> Iterator[None]:
        with changed:
            is_waiting.set()
            changed.notify()
        yield
        is_waiting.clear()

    def noting_wait(self: Reporter, timeout_s: float | None = None) -> bool:
        with waiting() if timeout_s is None else nullcontext():
            return wait(self, timeout_s)

    def noting_check(self: Reporter) -> None:
        with waiting():
            check(self)

    def slow_report(self: Trials, reports: Any, spec: StudySpec) -> Any:
        verdicts = report_all(self, reports, spec)
        with changed:
            changed.wait_for(lambda: f"training {reports[0].epoch + 1}" in events or is_waiting.is_set())
            events.append(f"reported {reports[0].epoch}")
        return verdicts

    monkeypatch.setattr(PlainEngine, "run_epoch", noting_training)
    monkeypatch.setattr(Reporter, "wait", noting_wait)
    monkeypatch.setattr(Reporter, "check", noting_check)
    monkeypatch.setattr(Trials, "report_all", slow_report)
    return events


def test_a_slow_store_keeps_training_waiting_only_for_what_may_end_a_trial(
    store: Store, slow_reports: list[str]
) -> None:
    study = engine_study(store, 1e-3, epochs=4, pruner={"name": "asha", "min_epochs": 2, "reduction_factor": 8})
    (trial,) = work(store, study)
    assert (trial.state, trial.epochs) == ("complete", [1, 2, 3, 4])
    assert slow_reports == [
        "training 1",
        "training 2",
        "reported 1",
        "reported 2",
        "training 3",  # epoch 2 is a rung
        "training 4",
        "reported 3",
        "reported 4",
    ]


def test_a_worker_that_is_told_to_leave_while_an_epoch_is_reported_keeps_it(
    store: Store, slow_reports: list[str]
) -> None:
    study = engine_study(store, 1e-3, epochs=4)
    (left,) = work(store, study, should_stop=lambda: "reported 1" in slow_reports)
    assert slow_reports == ["training 1", "training 2", "reported 1", "reported 2"]
    assert (left.state, left.epochs) == ("waiting", [1, 2])
    (trial,) = work(store, study)
    assert [attempt.resumed_from for attempt in trial.attempts] == [0, 2]
    assert (trial.state, trial.epochs) == ("complete", [1, 2, 3, 4])


def test_an_epoch_that_fails_while_the_one_before_is_reported_takes_nothing_from_it(
    store: Store, slow_reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_epoch = PlainEngine.run_epoch

    def failing_second(self: Any) -> Any:
        results = run_epoch(self)
        if results[0].epoch == 2:
            raise ValueError("in the second epoch")
        return results

    monkeypatch.setattr(PlainEngine, "run_epoch", failing_second)
    (trial,) = work(store, engine_study(store, 1e-3, epochs=3))
    assert slow_reports[:3] == ["training 1", "training 2", "reported 1"]
    assert (trial.state, trial.epochs) == ("failed", [1])
    assert [attempt.resumed_from for attempt in trial.attempts] == [0, 1]


def test_what_goes_wrong_with_a_report_ends_the_worker_and_not_the_trial(
    store: Store, slow_reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Trials.report_all

    def failing(self: Trials, reports: Any, spec: StudySpec) -> Any:
        slow(self, reports, spec)
        raise StoreFailed("no answer")

    monkeypatch.setattr(Trials, "report_all", failing)
    study = engine_study(store, 1e-3, epochs=3)
    with pytest.raises(StoreFailed, match="no answer"):
        work(store, study)
    assert slow_reports == ["training 1", "training 2", "reported 1"]
    assert [(trial.state, trial.epochs) for trial in store.trials.get_all(study)] == [("waiting", [1])]


@pytest.fixture
def slow_saves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make writing the checkpoint of an epoch take half a second, and fail with `error` after that."""
    save = CheckpointFolder.save

    def slow(epoch: int, error: OSError | None = None) -> None:
        def slow_save(self: CheckpointFolder, checkpoint: Checkpoint) -> None:
            if checkpoint.epoch == epoch:
                time.sleep(0.5)
                if error:
                    raise error
            save(self, checkpoint)

        monkeypatch.setattr(CheckpointFolder, "save", slow_save)

    return slow


def fail_once(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    run_epoch, left = PlainEngine.run_epoch, ["once"]

    def failing(self: Any) -> Any:
        results = run_epoch(self)
        if results[0].epoch == after and left:
            raise ValueError(left.pop())
        return results

    monkeypatch.setattr(PlainEngine, "run_epoch", failing)


def take_away(store: Store, study: StudyRecord) -> None:
    """Let another worker claim trial 0, as after its lease ran out."""
    other = store.workers.add(study.study_id, device="elsewhere")
    with store.storage.engine.begin() as connection:
        connection.execute(schema.slots_table.update().where(schema.slots_table.c.number == 0).values(lease_until=0))
    store.workers.reap(study)
    assert store.trials.claim(study, other) is not None


def test_an_attempt_that_fails_while_its_checkpoint_is_written_is_gone_on_from_there(
    store: Store, slow_saves: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_saves(1)
    fail_once(monkeypatch, after=2)
    (trial,) = work(store, engine_study(store, 1e-3, epochs=3))
    assert [attempt.resumed_from for attempt in trial.attempts] == [0, 1]
    assert [attempt.note for attempt in trial.attempts] == [None, None]


def test_a_checkpoint_that_failed_for_an_earlier_attempt_is_not_held_against_the_next(
    store: Store, slow_saves: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_saves(1, OSError(28, "No space left on device"))
    fail_once(monkeypatch, after=2)
    (trial,) = work(store, engine_study(store, 1e-3, epochs=3))
    assert [attempt.outcome for attempt in trial.attempts] == ["ValueError: once", "complete"]


def test_a_worker_that_learns_late_that_it_lost_a_trial_writes_no_checkpoint(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, lost, written = engine_study(store, 1e-3, epochs=9, checkpoint_epochs=3), threading.Event(), []
    report_all = Trials.report_all

    def slow_report(self: Trials, reports: Any, spec: StudySpec) -> Any:
        if reports[0].epoch == 2:
            take_away(store, study)
            lost.set()
            time.sleep(0.5)
        return report_all(self, reports, spec)

    monkeypatch.setattr(Trials, "report_all", slow_report)
    monkeypatch.setattr(CheckpointFolder, "save", lambda self, checkpoint: written.append(checkpoint.epoch))
    (trial,) = work(store, study, should_stop=lost.is_set)
    assert [attempt.outcome for attempt in trial.attempts] == ["lost", None]
    assert written == []


def test_a_lease_is_renewed_until_the_last_checkpoint_of_a_trial_that_is_given_back_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]
) -> None:
    from hpo.train.engines.stack import TrialStack

    def lease(number: int) -> float:
        with store.storage.engine.connect() as connection:
            rows = connection.execute(
                sa.select(schema.slots_table.c.lease_until).where(schema.slots_table.c.number == number)
            )
            return float(rows.scalar() or 0)

    study = engine_study(store, 1e-4, 1e-3, epochs=3, lanes=2)
    save = CheckpointFolder.save

    def slow_save(self: CheckpointFolder, checkpoint: Checkpoint) -> None:
        if checkpoint.epoch == 1:
            number = int(self.url.rpartition("/")[2])
            before = lease(number)
            wait_for(lambda: lease(number) > before)
        save(self, checkpoint)

    monkeypatch.setattr("hpo.train.engines.planning._rate", lambda *_, **__: 1.0)
    for module in (ledger, worker):
        monkeypatch.setattr(module, "LEASE_S", 2.0)  # renewed four times as often
    monkeypatch.setattr(CheckpointFolder, "save", slow_save)
    run_epoch, left = TrialStack.run_epoch, [torch.OutOfMemoryError("out of memory")]

    def in_little_memory(self: Any) -> Any:
        if left and self._lanes[0].epoch == 1:
            raise left.pop()
        return run_epoch(self)

    monkeypatch.setattr(TrialStack, "run_epoch", in_little_memory)
    trials = work(store, study)
    assert not left
    outcomes = {attempt.outcome for trial in trials for attempt in trial.attempts}
    assert outcomes == {"released", "complete"}


def test_a_process_that_users_code_forks_and_that_comes_back_ends(
    store: Store, slow_reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fork while a report is under way; in the new process nobody makes it."""
    run_epoch, ends = PlainEngine.run_epoch, []

    def forking(self: Any) -> Any:
        if self._lane.epoch == 1:
            child = os.fork()
            if child == 0:
                raise ValueError("the child's")
            deadline = time.monotonic() + 500
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.05)
            ends.append(os.waitstatus_to_exitcode(ended[1]) if ended[0] else "never")
        return run_epoch(self)

    monkeypatch.setattr(PlainEngine, "run_epoch", forking)
    (trial,) = work(store, engine_study(store, 1e-3, epochs=3))
    assert ends == [1]
    assert trial.state == "complete"
