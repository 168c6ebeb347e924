"""Outages: waited for as long as the caller wants, with nothing lost."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import sqlalchemy as sa

from hpo.store import database
from hpo.store.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, RetryPolicy, StoreFailed, outlast
from hpo.store.store import Store
from hpo.study.records import Claim
from tests.rows import slow_except

if TYPE_CHECKING:
    from tests.conftest import Postgres
from tests.store.helpers import ANY_SPEC, MakeSpec, begin, claim, only_postgres, only_sqlite, report, trial, url_of


@pytest.mark.parametrize("url", ["stoppable_postgres"], indirect=True)
def test_a_restarted_server_is_waited_for_and_nothing_is_lost(
    store: Store, make_spec: MakeSpec, stoppable_postgres: Postgres
) -> None:
    study, worker = begin(store, make_spec(0.1))
    patient = Store(url_of(store)).retrying(for_s=600)
    held = claim(patient, study, worker)
    stoppable_postgres.stop()
    try:
        with pytest.raises(StoreFailed):
            store.trials.report(held, ANY_SPEC, epoch=1, metrics={}, value=0.5)
        with pytest.raises(database.Unreachable, match="cannot be opened"):
            Store(url_of(store))
        reporting = threading.Thread(target=lambda: report(patient, held, 0.5, 0.6))
        reporting.start()
        reporting.join(timeout=0.5)
        assert reporting.is_alive()
    finally:
        stoppable_postgres.start()
    reporting.join(timeout=500)
    assert not reporting.is_alive()
    store.trials.finish(held, "complete", reason="")  # the store that was refused is of use again
    assert (trial(store, study).epochs, trial(store, study).value) == ([1, 2], 0.6)


@only_sqlite
def test_a_lock_that_outlasts_the_timeout_is_waited_for(url: str, make_spec: MakeSpec) -> None:
    study, worker = begin(Store(url, create=True), make_spec(0.1))
    patient, impatient = Store(f"{url}?timeout=0.1").retrying(for_s=600), Store(f"{url}?timeout=0.1")
    held = claim(patient, study, worker)
    writer = sqlite3.connect(patient.url.database or "")
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreFailed, match="locked"):
        impatient.trials.report(held, ANY_SPEC, epoch=1, metrics={}, value=0.5)
    reporting = threading.Thread(target=lambda: report(patient, held, 0.5))
    reporting.start()
    reporting.join(timeout=0.5)
    assert reporting.is_alive()
    writer.close()
    reporting.join(timeout=500)
    assert not reporting.is_alive()
    assert trial(impatient, study).epochs == [1]


def test_a_worker_that_is_told_to_leave_waits_no_longer(url: str, make_spec: MakeSpec) -> None:
    study, worker = begin(Store(url, create=True), make_spec(0.1))
    told = threading.Event()
    patient = Store(url).retrying(for_s=600, until=told.is_set)
    held = claim(patient, study, worker)
    broken = sa.exc.OperationalError("SELECT", {}, Exception("the server went away"))
    calls = []

    def fails(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            told.set()
        raise broken

    sa.event.listen(patient.storage.engine, "before_cursor_execute", fails)
    with pytest.raises(StoreFailed):
        report(patient, held, 0.5)
    assert len(calls) >= 3


def test_workers_that_lost_a_database_together_do_not_come_back_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("hpo.store.retry.time.sleep", slept.append)

    def pauses() -> list[float]:
        slept.clear()

        def call() -> list[float]:
            if len(slept) < 10:
                raise ConnectionError
            return list(slept)

        return outlast(call, RetryPolicy(for_s=600), errors=ConnectionError)

    of_workers = [pauses() for _ in range(8)]
    for index, drawn in enumerate(zip(*of_workers, strict=True)):
        mean = min(FIRST_PAUSE_S * 2**index, LONGEST_PAUSE_S)
        assert len(set(drawn)) == 8
        assert all(0.5 * mean <= pause <= 1.5 * mean for pause in drawn)


def test_a_request_that_is_wrong_is_not_tried_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Store(url, create=True).retrying(for_s=600)
    with patient.storage.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE hpo_attempts")
        connection.exec_driver_sql("DROP TABLE hpo_slots")
    monkeypatch.setattr("hpo.store.retry.time.sleep", lambda _: pytest.fail("it is tried again"))
    with pytest.raises(StoreFailed):
        patient.trials.counts(1)


@only_postgres
@pytest.mark.parametrize("action", slow_except(["claim", "suggest", "report", "finish"], "report"))
def test_a_connection_that_is_cut_at_any_statement_is_replaced_and_the_call_succeeds(
    store: Store, make_spec: MakeSpec, postgres: Any, action: str
) -> None:
    study, worker = begin(store, make_spec(search={"trials": 60, "sampler": "tpe"}, pruner={"name": "median"}))
    patient = Store(url_of(store)).retrying(for_s=600)
    cut = postgres.execute
    engine = patient.storage.engine

    def prepared() -> Claim | None:
        if action == "claim":
            return None
        held = patient.trials.claim(study, worker)
        assert held is not None
        if action in ("report", "finish"):
            patient.trials.suggest(held, study.spec, attributes=lambda _: {})
        if action == "finish":
            report(patient, held, 0.5)
        return held

    actions: dict[str, Callable[[Any], Any]] = {
        "claim": lambda _: patient.trials.claim(study, worker),
        "suggest": lambda held: patient.trials.suggest(held, study.spec, attributes=lambda _: {"seed": 1}),
        "report": lambda held: patient.trials.report(held, study.spec, epoch=1, metrics={}, value=0.5),
        "finish": lambda held: patient.trials.finish(held, "complete", reason=""),
    }
    for at in (0, 1, 2, *range(3, 60, 3)):
        held = prepared()
        count = 0

        def before(connection: Any, *_: Any, at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at + 1:
                pid = connection.connection.dbapi_connection.info.backend_pid
                cut(f"SELECT pg_terminate_backend({pid}, 1000)")

        sa.event.listen(engine, "before_cursor_execute", before)
        actions[action](held)
        sa.event.remove(engine, "before_cursor_execute", before)
        if count <= at:
            break
    assert at >= 2
    assert store.problems(study) == []


def test_an_error_of_the_database_is_never_the_trials(
    store: Store, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)

    def breaks(*_: Any, **__: Any) -> None:
        raise optuna.exceptions.StorageInternalError("x")

    monkeypatch.setattr(type(store.storage), "get_trial", breaks)
    with pytest.raises(StoreFailed):
        store.trials.last_report(held)
