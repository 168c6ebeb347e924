"""Opening a database, and what others see of a transaction."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import UserError
from hpo.store import database, schema
from hpo.store.ledger import LEASE_S
from hpo.store.retry import StoreFailed, is_outage
from hpo.store.store import Store
from tests.store.helpers import MakeSpec, begin, claim, only_postgres, only_sqlite, report, slow_on_postgres, url_of


def test_a_store_has_all_that_optunas_storage_sets_up(tmp_path: Path) -> None:
    """It makes an engine of its own, and looks for the versions of tables by itself."""
    ours = Store(f"sqlite:///{tmp_path}/ours.db", create=True).storage
    theirs = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/theirs.db")
    assert vars(theirs).keys() <= vars(ours).keys()
    for name in set(vars(theirs)) - {"url", "engine", "engine_kwargs", "scoped_session", "_version_manager"}:
        assert getattr(ours, name) == getattr(theirs, name) or name == "skip_compatibility_check"
    assert ours.get_current_version() == theirs.get_head_version()


def test_tables_of_optuna_are_checked_for_their_version_without_its_migrations(store: Store) -> None:
    engine = store.storage.engine
    assert schema.has_newest_optuna_tables(engine)
    for change in (
        "UPDATE alembic_version SET version_num = 'v3.0.0.a'",
        "DELETE FROM alembic_version",
        "DROP TABLE alembic_version",
    ):
        with engine.begin() as connection:
            connection.exec_driver_sql(change)
        assert not schema.has_newest_optuna_tables(engine), change


def test_a_store_of_another_version_of_optuna_is_refused(store: Store) -> None:
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v3.0.0.a'")
    with pytest.raises(UserError, match="was written by another version of Optuna"):
        Store(url_of(store))


@pytest.mark.slow
@slow_on_postgres
def test_optuna_reads_the_file_while_workers_write(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 30, "sampler": "tpe"}, pruner={"name": "median"}))

    def work() -> None:
        writer = Store(url_of(store))
        while (claimed := writer.trials.claim(study, worker)) is not None:
            value = writer.trials.suggest(claimed, study.spec, attributes=lambda _: {})["lr"]
            report(writer, claimed, value / 2, value)
            writer.trials.finish(claimed, "complete", reason="")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        theirs = optuna.load_study(study_name="s", storage=url_of(store))
        for t in theirs.get_trials(states=(TrialState.COMPLETE,)):
            assert t.value == t.params["lr"] == t.intermediate_values[2]
        numbers = [t.number for t in theirs.trials]
        assert numbers == list(range(len(numbers)))
    theirs = optuna.load_study(study_name="s", storage=url_of(store))
    assert theirs.metric_names == ["val_accuracy"]
    assert Counter(t.state for t in theirs.trials) == {TrialState.COMPLETE: 30}


FORKS = """
import os, sys
from hpo.store.store import Store

store = Store(sys.argv[1])
study = store.studies.get("s")
worker = store.workers.add(study.study_id, device="cpu")

def work():
    while (claim := store.trials.claim(study, worker)) is not None:
        store.trials.suggest(claim, study.spec, attributes=lambda _: {})
        store.trials.report(claim, study.spec, epoch=1, metrics={}, value=0.5)
        store.trials.finish(claim, "complete", reason="")

children = []
for _ in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        work()
        os._exit(0)
work()
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def test_processes_that_are_forked_from_one_with_an_open_store_share_it(store: Store, make_spec: MakeSpec) -> None:
    study, _ = begin(store, make_spec(search={"trials": 24, "sampler": "tpe"}))
    command = [sys.executable, "-c", FORKS, url_of(store)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert store.trials.counts(study.study_id) == {"complete": 24}
    assert store.problems(study) == []


@pytest.mark.parametrize("name", ["hpo.db", "a b.db", "{x} #é.db"])
def test_any_file_name_will_do(tmp_path: Path, make_spec: MakeSpec, name: str) -> None:
    store = Store(f"sqlite:///{tmp_path}/{name}", create=True)
    study, worker = begin(store, make_spec(0.1))
    claim(store, study, worker)
    assert (tmp_path / name).exists()
    assert store.folder(store.studies.get("s")).parent == tmp_path / "hpo_files"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("postgres", "must be a URL"),
        ("mysql://user:secret@host/db", "must be an SQLite or Postgres URL .*got mysql://\\*\\*\\*$"),
        ("postgresql://user:secret@host/db", r"must name the driver, as postgresql\+psycopg:.*user:\*\*\*@host/db"),
        ("postgresql+psycopg2://host/db", "must name the driver"),
        ("postgresql+psycopg://user@host", "must name a database"),
        ("postgresql+psycopg://host/db?password=secret", "must not hold a password in its query"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
    ],
)
def test_what_is_no_url_of_a_store_is_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Store(given)


@pytest.mark.parametrize("form", ["sqlite:///{}/hpo.db", "sqlite:///file:{}/hpo.db?uri=true"])
def test_a_store_that_is_absent_is_not_made_by_reading(tmp_path: Path, form: str) -> None:
    with pytest.raises(UserError, match=r"there is no store at .*hpo.db; `hpo run` makes one"):
        Store(form.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the folder {tmp_path}/absent does not exist"):
        Store(f"sqlite:///{tmp_path}/absent/hpo.db", create=True)


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a database, but long enough to be looked at" * 10, "cannot be opened.* it is not a database"),
        (None, "is no store of ours nor of Optuna's; its tables: people"),
        ("newer", "has schema version 99, and this hpo knows up to 3: upgrade hpo"),
        ("directory", "cannot be opened"),
    ],
)
def test_a_database_that_is_not_ours_is_refused_and_not_written_to(
    tmp_path: Path, create: bool, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "hpo.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "directory":
        path.mkdir()
    elif content == "newer":
        Store(f"sqlite:///{path}", create=True)
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE hpo_meta SET value = '99'")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE people (name)")
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError, match=message):
        Store(f"sqlite:///{path}", create=create)
    assert (path.read_bytes() if path.is_file() else None) == before


@only_sqlite
def test_a_store_that_another_process_has_locked_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "OPEN_TIMEOUT_S", 0.1)
    connection = sqlite3.connect(store.url.database or "")
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="cannot be opened for writing: it is locked by another process"):
        Store(url_of(store), create=True)
    assert Store(url_of(store)).studies.get_all() == []  # a writer does not keep readers out
    connection.close()


def test_times_are_the_databases(store: Store) -> None:
    with store.storage.engine.connect() as connection:
        query = "strftime('%s', 'now')" if connection.dialect.name == "sqlite" else "extract(epoch from now())"
        expected = float(connection.exec_driver_sql(f"SELECT {query}").scalar_one())
        assert store.database.now(connection) == pytest.approx(expected, abs=LEASE_S / 10)


@only_postgres
def test_a_client_that_stops_in_the_middle_of_a_transaction_blocks_nobody_for_long(
    store: Store, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    monkeypatch.setattr(database, "ABANDONED_S", 1)
    stopped = Store(url_of(store))
    transaction = stopped.database.transaction()
    connection = transaction.__enter__()
    connection.execute(sa.select(schema.studies_table).with_for_update())
    assert store.trials.claim(study, worker) is not None  # waits until the server has ended the other one
    with pytest.raises(sa.exc.DBAPIError, match="idle-in-transaction") as ended:
        connection.execute(sa.select(schema.studies_table))
    assert is_outage(ended.value)
    with pytest.raises(StoreFailed):
        transaction.__exit__(None, None, None)


def test_a_writer_waits_for_the_lock_as_long_as_its_url_says(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hpo.db'}?timeout=0.3"
    storage, other = Store(url, create=True).storage, Store(url).storage
    with other.transaction():
        began = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match="locked"), storage.transaction():
            pass
        assert time.monotonic() - began > 0.3
    with storage.transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 300
