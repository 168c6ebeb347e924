"""The database: opened with every check, and its transactions, which Optuna's calls join.

Optuna's `RDBStorage` commits each call by itself. Here its session belongs to the transaction that the calling thread
has open (SQLAlchemy, "Joining a Session into an External Transaction"). So a slot and its trial change together or not
at all, whatever instruction the process is killed at.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._rdb.storage import _VersionManager
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.orm import Session, scoped_session

from hpo.errors import UserError
from hpo.store import schema
from hpo.store.frozen_trials import read_frozen_trials
from hpo.store.retry import STORE_ERRORS, RetryPolicy, StoreFailed, database_message
from hpo.store.urls import POSTGRES, database_path

BUSY_TIMEOUT_S = 60.0  # how long a writer waits for SQLite's one write lock, unless the URL has `?timeout=`
LOCK_PAUSE_S = 0.005  # between two tries to take it, on average
OPEN_TIMEOUT_S = 10.0  # the same while opening, where a lock held for longer is a mistake
# For the threads that train, report, write checkpoints and renew leases: none must wait for another.
CONNECTIONS_PER_WORKER = 4
MAX_THREADS = 10  # of one process that may use a store, the dashboard's 8 included; each needs a connection
ABANDONED_S = 60  # Postgres ends a transaction that its client, stopped or cut off, has left open this long
IS_POOLED = "is_pooled"  # of a connection's info: whether a pooler stands before Postgres
# Postgres's words for a wrong request; any other reason why no connection can be made may pass.
REFUSALS = ("authentication failed", "no password supplied", "does not exist", "no pg_hba.conf entry")
ADVISORY_LOCK = 0x68706F  # "hpo": held in Postgres while tables or studies are made


class NoStore(UserError):
    """There is no store at a path."""


class Unreachable(UserError):
    """The database does not answer, but may do so later."""

    exit_code = 1


class JoinedStorage(RDBStorage):
    """Optuna's storage on an engine of ours; inside `transaction()` its calls are part of that transaction.

    The connection belongs to the thread that opened the transaction, and other threads are not affected. Transactions
    must not be nested.

    Attributes:
        cached: The same storage, which reads each finished trial from the database once.
        compared_trials: What pruners have compared so far, by study and trial.
        own_values: The last attempt at a trial that a pruner has judged, and the values that it had, by trial.
    """

    compared_trials: dict[int, Mapping[int, FrozenTrial]]
    own_values: dict[int, tuple[int, dict[int, float]]]

    def __init__(self, url: URL) -> None:
        # Not by RDBStorage's own, which looks at once for the version of its tables, with Alembic and all migrations.
        self.url = url.render_as_string(hide_password=False)
        self.engine_kwargs = _engine_options(url)
        self.skip_compatibility_check = True
        self.heartbeat_interval = self.grace_period = None
        self.heartbeat_stale_trial_callback = self.failed_trial_callback = None
        self.engine = sa.create_engine(url, **self.engine_kwargs)
        self._uids: dict[int, str] = {}
        self._of_parents: list[Any] = []
        self._begin_in_process()
        begin = weakref.WeakMethod(self._begin_in_forked_process)
        os.register_at_fork(after_in_child=lambda: (call := begin()) and call())

    @cached_property
    def _version_manager(self) -> _VersionManager:  # type: ignore[override]
        """What compares the versions of Optuna's tables, and writes them where they are new."""
        return _VersionManager(self.url, self.engine, self.scoped_session)

    def _begin_in_process(self) -> None:
        self._joined = threading.local()
        self.drop_cache()
        self.scoped_session = scoped_session(self._session)  # type: ignore[arg-type]

    def _begin_in_forked_process(self) -> None:
        """Open connections of its own from now on: to use or to close the parent's would break the parent's, too."""
        self._of_parents += [self.engine.pool, self._joined]  # a connection that nothing refers to is closed
        self.engine.dispose(close=False)
        self._begin_in_process()

    def drop_cache(self) -> None:
        """Forget the trials that were read so far."""
        self.cached = get_storage(self)
        self.compared_trials = {}
        self.own_values = {}
        self._read_as_failed: set[int] = set()

    def forget_other(self, study_id: int, uid: str) -> None:
        """Forget the trials of a deleted study of this id, which SQLite gives to the next one."""
        if self._uids.setdefault(study_id, uid) != uid:
            self._uids[study_id] = uid
            self.drop_cache()

    def _session(self) -> Session:
        connection: Connection | None = getattr(self._joined, "connection", None)
        if connection is None:
            return Session(bind=self.engine)
        return Session(bind=connection, join_transaction_mode="create_savepoint")

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial, read by one statement; raise KeyError if there is none."""
        trials = self._read_trials(schema.optuna_trials.c.trial_id == trial_id)
        if not trials:
            raise KeyError(f"Optuna's tables have no trial with the id {trial_id}")
        return trials[0]

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Return trials of a study, read by one statement: those after an id, and the earlier ones that are named.

        Add those that were read as failed before and are tried again: Optuna's cache believes that they have ended.
        """
        trials = schema.optuna_trials.c
        is_chosen = (trials.trial_id > trial_id_greater_than) | trials.trial_id.in_(included_trial_ids)
        if failed := [*self._read_as_failed]:
            is_chosen |= trials.trial_id.in_(failed) & (trials.state != TrialState.FAIL)
        found = self._read_trials((trials.study_id == study_id) & is_chosen)
        self._read_as_failed.update(trial._trial_id for trial in found if trial.state is TrialState.FAIL)
        if not found:
            self.get_study_name_from_id(study_id)  # raises KeyError if there is no such study
        return [trial for trial in found if states is None or trial.state in states]

    def _read_trials(self, condition: sa.ColumnElement[bool]) -> list[FrozenTrial]:
        connection: Connection | None = getattr(self._joined, "connection", None)
        if connection is not None:
            return read_frozen_trials(connection, condition)
        with self.engine.connect() as connection:
            return read_frozen_trials(connection, condition)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open an atomic write transaction: it commits at the end of the block, or rolls back if that raises."""
        with self.engine.connect() as connection:
            begin(connection)
            with self._joining(connection):
                yield connection
                self.scoped_session.remove()
                connection.commit()

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Open a transaction that reads everything as it is at one instant, whatever others write meanwhile."""
        with self.engine.connect() as connection:
            begin_reading(connection)
            with self._joining(connection):
                yield connection

    @contextmanager
    def _joining(self, connection: Connection) -> Iterator[None]:
        """Make this thread's calls part of the transaction that the connection is in."""
        self.scoped_session.remove()
        self._joined.connection = connection
        try:
            yield
        finally:
            self._joined.connection = None
            self.scoped_session.remove()


@dataclass(frozen=True)
class Database:
    """An open database and how calls to it are retried; any number of threads and of stores may share it."""

    url: URL
    storage: JoinedStorage
    retry: RetryPolicy

    @property
    def cached(self) -> BaseStorage:
        """Optuna's storage, which reads each finished trial from the database once."""
        return self.storage.cached

    def connect(self) -> Connection:
        """Return a connection for reading, to be closed by the caller; each statement sees what is committed then."""
        return self.storage.engine.connect()

    def snapshot(self) -> AbstractContextManager[Connection]:
        """Open a transaction for reads that must agree; Optuna's calls join it. It must not be nested."""
        return self.storage.snapshot()

    @property
    def clock(self) -> sa.ColumnElement[float]:
        """The seconds since 1970 by the database's clock, the only one that leases are measured by, in a statement."""
        return clock_of(self.storage.engine.dialect.name)

    def now(self, connection: Connection) -> float:
        """Return the seconds since 1970 by the database's clock."""
        return float(connection.execute(sa.select(self.clock)).scalar_one())

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a write transaction that Optuna's calls join; it commits at the end, or rolls back if the block raises.

        Raises StoreFailed where the database is at fault.
        """
        try:
            with self.storage.transaction() as connection:
                yield connection
        except BaseException as error:
            self.storage.drop_cache()  # it may have cached what was rolled back
            if isinstance(error, STORE_ERRORS):
                raise StoreFailed(database_message(error)) from error
            raise


def begin(connection: Connection) -> None:
    """Start a transaction that will write.

    SQLite must take its write lock now: a reader that becomes a writer after another one has committed fails at once,
    whatever the timeout.
    """
    if connection.dialect.name == "sqlite":
        _take_write_lock(connection)
    elif connection.info.get(IS_POOLED):
        connection.exec_driver_sql(_limits(of_transaction=True))


def _take_write_lock(connection: Connection) -> None:
    """Start a transaction with SQLite's write lock, tried for as long as the connection waits for a lock.

    SQLite's own waiting pauses for longer and longer, up to 0.1 s, so that whoever came last is the first to get the
    lock. Here everyone who waits has the same chance at any moment.
    """
    driver: Any = connection.connection.driver_connection
    (timeout_ms,) = driver.execute("PRAGMA busy_timeout").fetchone()
    ends = time.monotonic() + timeout_ms / 1000
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                return
            except sa.exc.OperationalError as error:
                if "locked" not in str(error.orig) or time.monotonic() >= ends:
                    raise
            time.sleep(random.uniform(0.5, 1.5) * LOCK_PAUSE_S)
    finally:
        driver.execute(f"PRAGMA busy_timeout = {timeout_ms}")


def begin_reading(connection: Connection) -> None:
    """Start a transaction in which all statements see the same instant; its first one chooses it."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def execute_together(connection: Connection, *statements: sa.Delete | sa.Insert | sa.Update) -> sa.CursorResult[Any]:
    """Execute statements that change different rows: in Postgres all in one round trip, as of one instant.

    Return the result of the last one.
    """
    *others, last = join_statements(connection.dialect.name, statements)
    for other in others:
        connection.execute(other)
    return connection.execute(last)


def join_statements(dialect_name: str, statements: Sequence[Any]) -> list[Any]:
    """Return statements that change different rows as one, or, for SQLite, as they are."""
    *others, last = statements
    if dialect_name == "sqlite" or not others:
        return [*statements]
    return [last.add_cte(*(other.cte(f"part_{index}") for index, other in enumerate(others)))]


def clock_of(dialect_name: str) -> sa.ColumnElement[float]:
    """Return the seconds since 1970 by the clock of a database of this kind, in a statement."""
    is_sqlite = dialect_name == "sqlite"
    clock = "(julianday('now') - 2440587.5) * 86400.0" if is_sqlite else "extract(epoch from clock_timestamp())"
    return sa.literal_column(clock, sa.Float)


def upsert(dialect_name: str, table: sa.Table, row: Mapping[str, Any], key: Sequence[str]) -> sa.Insert:
    """Return a statement that inserts a row in place of the one with its `key`."""
    insert = sqlite.insert if dialect_name == "sqlite" else postgresql.insert
    statement = insert(table).values(dict(row))
    return statement.on_conflict_do_update(
        index_elements=key, set_={name: statement.excluded[name] for name in row if name not in key}
    )


def exclude_others(connection: Connection) -> None:
    """Let no other transaction pass this point until the caller's has ended; SQLite's write lock does so already."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")


def open_storage(url: URL, *, create: bool) -> JoinedStorage:
    """Open the store after checking that it is one of ours; `create` makes what is missing.

    Raises:
        UserError: The store is absent (and `create` is false), read-only, of another schema, or not ours.
        Unreachable: It is locked, or its server does not answer.
    """
    path = database_path(url)
    if path is not None and not path.exists():
        if not create:
            raise NoStore(f"there is no store at {path}; `hpo run` makes one, --storage or HPO_STORAGE names another")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"--storage: the folder {path.parent} does not exist or cannot be written to")
    with _explaining_errors(url, writing=create):
        with _probing(url) as engine:
            schema.check_tables(engine, url, create=create)
            if create:
                _create_tables(engine)
            is_current = not create and schema.has_newest_optuna_tables(engine)
        return _joined_storage(url, is_current=is_current)


def upgrade(url: URL) -> list[str]:
    """Upgrade a store of an older version to ours, or make an empty one; return what was done, a sentence each."""
    with _explaining_errors(url, writing=True):
        path = database_path(url)
        is_ours = False
        if path is None or path.exists():
            with _probing(url) as engine:
                is_ours = schema.meta_table.name in sa.inspect(engine).get_table_names()
        if not is_ours:
            open_storage(url, create=True).engine.dispose()
            return [f"made the tables of {url}, schema version {schema.SCHEMA_VERSION}"]
        with _probing(url) as engine, engine.connect() as connection:
            begin(connection)
            exclude_others(connection)
            ours = schema.upgrade_tables(connection)
            connection.commit()
        theirs = schema.upgrade_optuna(JoinedStorage(url))
    return [_upgrade_text("our", *ours), _upgrade_text("Optuna's", *theirs)]


def _upgrade_text(whose: str, before: int | str, after: int | str) -> str:
    if before == after:
        return f"{whose} tables: version {after} already"
    return f"{whose} tables: from version {before} to {after}"


def _joined_storage(url: URL, *, is_current: bool) -> JoinedStorage:
    storage = JoinedStorage(url)
    # Optuna's own check holds two connections at once. Behind a pooler that has few of the server's, workers that begin
    # together would wait for each other.
    if not is_current and storage.get_current_version() != storage.get_head_version():
        storage._version_manager.check_table_schema_compatibility()  # raises
    if url.drivername != POSTGRES:
        sa.event.listen(storage.engine, "connect", _set_pragmas)
    _prepare_connections(storage.engine)
    storage.engine.dispose()  # connections opened so far were made without this
    return storage


def _engine_options(url: URL) -> dict[str, Any]:
    if url.drivername != POSTGRES:
        timeout = float(str(url.query.get("timeout", BUSY_TIMEOUT_S)))
        return {"connect_args": {"timeout": timeout}}
    return {
        "pool_pre_ping": True,  # a connection that a restarted server has closed is replaced before it is used
        "pool_size": CONNECTIONS_PER_WORKER,
        "max_overflow": MAX_THREADS - CONNECTIONS_PER_WORKER,
        "connect_args": {
            "connect_timeout": 10,
            # A peer that vanished without closing is noticed within a minute, not after TCP's quarter of an hour.
            "keepalives_idle": 30,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 50_000,
        },
    }


@contextmanager
def _explaining_errors(url: URL, *, writing: bool) -> Iterator[None]:
    """Raise what opening a database raises as a UserError or Unreachable, whose message is a sentence."""
    try:
        yield
    except sa.exc.DatabaseError as error:
        message = _opening_message(error)
        may_pass = isinstance(error, sa.exc.OperationalError) and not any(words in message for words in REFUSALS)
        action = "opened for writing" if writing else "opened"
        kind = Unreachable if may_pass else UserError
        raise kind(f"the store {url} cannot be {action}: {message}") from None
    except ImportError:
        raise UserError(f"the store {url} needs the package psycopg: pip install 'hpo-studies[postgres]'") from None
    except ValueError as error:
        raise UserError(f"--storage {url} cannot be read: {error}") from None
    except RuntimeError as error:  # Optuna's own check of its schema
        raise UserError(f"the store {url} was written by another version of Optuna: {error}") from None


@contextmanager
def _probing(url: URL) -> Iterator[Engine]:
    """Give an engine without a pool, which waits for a lock for OPEN_TIMEOUT_S at most."""
    options = {key: value for key, value in _engine_options(url).items() if key == "connect_args"}
    if url.drivername != POSTGRES:
        options["connect_args"]["timeout"] = OPEN_TIMEOUT_S
    engine = sa.create_engine(url, **options, poolclass=sa.pool.NullPool)
    _prepare_connections(engine)
    try:
        yield engine
    finally:
        engine.dispose()


def _create_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        begin(connection)
        exclude_others(connection)
        schema.create_tables(connection)
        connection.commit()


def _prepare_connections(engine: Engine) -> None:
    sa.event.listen(engine, "connect", _read_any_text if engine.dialect.name == "sqlite" else _leave_no_session_state)


def _leave_no_session_state(connection: Any, record: Any) -> None:
    """Find out whether a pooler such as PgBouncer gives each transaction another session of the server.

    It then tells a client of a process that is none of the server's. There must be no prepared statements then, and
    time limits hold for a transaction only.
    """
    (pid,) = connection.execute("SELECT pg_backend_pid()").fetchone()
    record.info[IS_POOLED] = pid != connection.info.backend_pid
    if record.info[IS_POOLED]:
        connection.prepare_threshold = None
    else:
        connection.execute(_limits(of_transaction=False))
    connection.commit()


def _limits(*, of_transaction: bool) -> str:
    """Return the statement by which the server ends a transaction that is left open, or waits for another too long."""
    names = ("idle_in_transaction_session_timeout", "lock_timeout")
    return "SELECT " + ", ".join(f"set_config('{name}', '{ABANDONED_S}s', {of_transaction})" for name in names)


def _set_pragmas(connection: Any, _record: Any) -> None:
    # In WAL mode a commit without fsync survives the death of any process, and is many times faster.
    connection.execute("PRAGMA synchronous=NORMAL")


def _read_any_text(connection: Any, _record: Any) -> None:
    # Text that is no UTF-8, which SQLite keeps all the same, would keep its whole table from being read.
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")


def _opening_message(error: sa.exc.DatabaseError) -> str:
    text = " ".join(str(error.orig).split())
    if "locked" in text:
        return "it is locked by another process"
    if "readonly" in text or "read-only" in text:
        return "it is read-only"
    if "not a database" in text:
        return "it is not a database"
    return text
