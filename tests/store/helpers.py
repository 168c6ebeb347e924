"""Steps and readings of a store that its tests share."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from hpo.config.study_spec import StudySpec
from hpo.store import schema
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord, TrialRecord
from tests.rows import slow_except

MakeSpec = Callable[..., StudySpec]
Change = Callable[..., None]

only_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
only_postgres = pytest.mark.parametrize("url", ["postgres"], indirect=True)
slow_on_postgres = pytest.mark.parametrize("url", slow_except(["sqlite", "postgres"], "sqlite"), indirect=True)
LONG_AGO = 1e9  # an instant in 2001
# For calls that ask nothing of the spec.
ANY_SPEC = StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}})


def begin(store: Store, spec: StudySpec) -> tuple[StudyRecord, str]:
    study = store.studies.create(spec, metadata={})
    return study, store.workers.add(study.study_id, device="cpu")


def claim(store: Store, study: StudyRecord, worker_id: str) -> Claim:
    """Claim a trial and choose its values, as a worker does before it trains."""
    claimed = store.trials.claim(study, worker_id)
    assert claimed is not None
    store.trials.suggest(claimed, study.spec, attributes=lambda _: {})
    return claimed


def report(store: Store, claimed: Claim, *values: float, first: int = 1) -> None:
    for epoch, value in enumerate(values, start=first):
        store.trials.report(
            claimed, ANY_SPEC, epoch=epoch, metrics={"val_accuracy": value}, value=value, may_prune=False
        )


def trial(store: Store, study: StudyRecord, number: int = 0) -> TrialRecord:
    return store.trials.get_all(study)[number]


def url_of(store: Store) -> str:
    return store.url.render_as_string(hide_password=False)


def optuna_trials(store: Store, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    """As any tool of Optuna's reads them from the database."""
    return optuna.load_study(study_name=name, storage=url_of(store)).trials


def everything(store: Store) -> dict[str, list[Any]]:
    """Every row of every table."""
    with store.storage.engine.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        return {table: sorted(map(str, connection.exec_driver_sql(f"SELECT * FROM {table}"))) for table in tables}


def expire(store: Store, claimed: Claim, change: Change) -> None:
    change(
        store,
        schema.slots_table.update().where(schema.slots_table.c.number == claimed.number).values(lease_until=LONG_AGO),
    )


def end_worker_process(store: Store, worker_id: str, change: Change) -> None:
    """Leave the worker's row as a killed process does: no process has its pid any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    change(
        store,
        schema.workers_table.update().where(schema.workers_table.c.worker_id == worker_id).values(pid=process.pid),
    )


def move_elsewhere(store: Store, worker_id: str, change: Change) -> None:
    change(
        store,
        schema.workers_table.update().where(schema.workers_table.c.worker_id == worker_id).values(machine="elsewhere"),
    )


class Interruption(Exception):
    pass


@contextmanager
def meanwhile(store: Store, action: Callable[[], object], *, at: int) -> Iterator[None]:
    """Do something, as another process would, before the statement of this index that this store sends."""
    count = 0

    def before(*_: Any) -> None:
        nonlocal count
        count += 1
        if count - 1 == at:
            action()

    engine = store.storage.engine
    sa.event.listen(engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", before)


def interrupted(store: Store, *, at: int) -> AbstractContextManager[None]:
    """Raise before the statement of this index that this store sends to its database."""

    def interrupt() -> None:
        raise Interruption(f"before statement {at}")

    return meanwhile(store, interrupt, at=at)


def fail_once(store: Store, claimed: Claim, spec: StudySpec, key: str = "ValueError here") -> bool:
    return store.trials.fail(claimed, spec, reason="ValueError: no luck", error="Traceback", failure_key=key)


@contextmanager
def time_zone(name: str) -> Iterator[None]:
    """Let this process be in a time zone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", name)
        time.tzset()
        yield
    time.tzset()
