"""The database: opening it with every check, our tables beside Optuna's, and transactions that Optuna's calls join.

Optuna's `RDBStorage` commits each call by itself. Here the session it works in belongs to the transaction that the
calling thread has open (SQLAlchemy, "Joining a Session into an External Transaction"), so that a slot and its trial
change together or not at all, whatever instruction the process is killed at.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel, TrialIntermediateValueModel
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.orm import Session, scoped_session

from hpo.errors import UserError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 60.0  # how long a writer waits for SQLite's one write lock
OPEN_TIMEOUT_S = 10.0  # the same while opening, where a lock held that long is somebody's mistake

metadata = sa.MetaData()

meta = sa.Table(
    "hpo_meta",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
studies = sa.Table(
    "hpo_studies",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),  # Optuna's
    sa.Column("spec", sa.Text, nullable=False),  # StudySpec.frozen() as JSON
    sa.Column("facts", sa.Text, nullable=False),  # what the preflight found, as JSON
    sa.Column("created_at", sa.Float, nullable=False),  # every time: seconds since 1970 by the database's clock
    sa.Column("started_at", sa.Float, nullable=False),  # of the latest `hpo run` or `hpo resume`
    sa.Column("stop", sa.String(16)),  # None | "requested" | "failure"
    sa.Column("stop_reason", sa.Text),
)
slots = sa.Table(
    "hpo_slots",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # also the Optuna trial's number
    sa.Column("state", sa.String(16), nullable=False),  # waiting | running | complete | pruned | diverged | failed
    sa.Column("given", sa.Text, nullable=False),  # parameters fixed beforehand, under Optuna's names, as JSON
    sa.Column("trial_id", sa.Integer),  # Optuna's, from the first claim on
    sa.Column("attempt", sa.Integer, nullable=False),  # 0 before the first claim; fences out whoever lost the slot
    sa.Column("furthest", sa.Integer, nullable=False),  # the highest epoch that any attempt reported
    sa.Column("losses", sa.Integer, nullable=False),  # attempts whose worker died since `furthest` last rose
    sa.Column("worker_id", sa.String(64)),
    sa.Column("claimed_at", sa.Float),  # by the latest attempt
    sa.Column("lease_until", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("reason", sa.Text),  # why it ended, in a few words
    sa.Column("error", sa.Text),  # traceback of a failed trial
    sa.Column("failure_key", sa.Text),  # equal for two trials that failed the same way
    sa.Index("hpo_slots_by_state", "study_id", "state", "number"),
)
epochs = sa.Table(
    "hpo_epochs",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),  # JSON; null stands for a number that is not finite
)
workers = sa.Table(
    "hpo_workers",
    metadata,
    sa.Column("worker_id", sa.String(64), primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("machine", sa.Text, nullable=False),  # tells whether `pid` can be looked up from here
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("pid_started", sa.Float, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Index("hpo_workers_by_study", "study_id"),
)
intermediate_values = TrialIntermediateValueModel.__table__  # Optuna's


class JoinedStorage(RDBStorage):
    """Optuna's storage on an engine of ours; inside `transaction()` its calls become part of that transaction.

    The connection belongs to the thread that opened the transaction; other threads are not affected. Do not nest.
    """

    def __init__(self, url: URL, *, engine_kwargs: dict[str, Any]) -> None:
        super().__init__(
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
            engine_kwargs=engine_kwargs,
            skip_table_creation=True,
        )
        self._joined = threading.local()
        self.scoped_session = scoped_session(self._session)  # type: ignore[arg-type]

    def _session(self) -> Session:
        connection: Connection | None = getattr(self._joined, "connection", None)
        if connection is None:
            return Session(bind=self.engine)
        return Session(bind=connection, join_transaction_mode="create_savepoint")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One atomic write transaction: commits at the end of the block, rolls back if it raises."""
        with self.engine.connect() as connection:
            begin(connection)
            self.scoped_session.remove()
            self._joined.connection = connection
            try:
                yield connection
                self.scoped_session.remove()
                connection.commit()
            finally:
                self._joined.connection = None
                self.scoped_session.remove()


def begin(connection: Connection) -> None:
    """Starts a transaction that will write. SQLite must take its write lock now: a reader that turns into a writer
    after another one has committed fails at once, whatever the timeout."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def now(connection: Connection) -> float:
    """Seconds since 1970 by the database's clock, the only one that leases are measured by."""
    sqlite = connection.dialect.name == "sqlite"
    clock = "(julianday('now') - 2440587.5) * 86400.0" if sqlite else "extract(epoch from clock_timestamp())"
    return float(connection.exec_driver_sql(f"SELECT {clock}").scalar_one())


def parse_url(url: str) -> URL:
    """The URL of a store, an SQLite path made absolute. Raises UserError for what is no such URL."""
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError:
        raise UserError(f"--storage must be a URL such as sqlite:///hpo.db, got {url!r}") from None
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise UserError(f"--storage must be an SQLite URL such as sqlite:///hpo.db, got {parsed}")
    if not parsed.database or parsed.database == ":memory:":
        raise UserError(f"--storage must name a file, which workers can share, got {url!r}")
    if parsed.database.startswith("file:"):
        return parsed
    return parsed.set(database=str(Path(parsed.database).expanduser().absolute()))


def database_path(url: URL) -> Path:
    """The file of an SQLite database, whose URL may hold a URI: sqlite:///file:/x/hpo.db?mode=ro&uri=true."""
    return Path((url.database or "").removeprefix("file:"))


def masked(url: str) -> str:
    """The URL of a store as it may be shown: without its password."""
    return str(parse_url(url))


def open_storage(url: URL, *, create: bool) -> JoinedStorage:
    """Opens the store after checking that it is one of ours; `create` makes what is missing.

    Raises UserError where it is absent (and not to be made), locked, read-only, of a newer schema, or not ours.
    """
    path = database_path(url)
    if not path.exists():
        if not create:
            raise UserError(f"there is no store at {path}; `hpo run` makes one, --storage or HPO_STORAGE names another")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"--storage: the folder {path.parent} does not exist or cannot be written to")
    try:
        with _probing(url) as engine:
            _check_tables(engine, url, create=create)
            if create:
                _create_tables(engine)
        storage = JoinedStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_TIMEOUT_S}})
    except sa.exc.DatabaseError as error:
        raise UserError(
            f"the store {url} cannot be opened{' for writing' if create else ''}: {_plain(error)}"
        ) from None
    except ValueError as error:
        raise UserError(f"--storage {url} cannot be read: {error}") from None
    except RuntimeError as error:  # Optuna's own check of its schema
        raise UserError(f"the store {url} was written by another version of Optuna: {error}") from None
    sa.event.listen(storage.engine, "connect", _set_pragmas)
    storage.engine.dispose()  # connections opened so far were made without the pragmas
    return storage


@contextmanager
def _probing(url: URL) -> Iterator[Engine]:
    engine = sa.create_engine(url, connect_args={"timeout": OPEN_TIMEOUT_S}, poolclass=sa.pool.NullPool)
    try:
        yield engine
    finally:
        engine.dispose()


def _check_tables(engine: Engine, url: URL, *, create: bool) -> None:
    tables = set(sa.inspect(engine).get_table_names())
    if tables and not {"studies", "trials", "version_info"} <= tables:
        raise UserError(
            f"the database {url} is no store of ours nor of Optuna's; its tables: {', '.join(sorted(tables)[:5])}"
        )
    if meta.name not in tables:
        if not create:
            raise UserError(f"the database {url} holds no study of ours; `hpo run` adds one")
        return
    with engine.connect() as connection:
        version = connection.execute(sa.select(meta.c.value).where(meta.c.key == "schema_version")).scalar()
    if version is not None and int(version) > SCHEMA_VERSION:
        raise UserError(
            f"the store {url} has schema version {version}, and this hpo knows up to {SCHEMA_VERSION}: upgrade hpo"
        )


def _create_tables(engine: Engine) -> None:
    """Makes Optuna's tables and ours in one transaction; also proves that the database can be written to."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        begin(connection)
        if not sa.inspect(connection).get_table_names():
            # Optuna would do this later, outside our transaction, and fail where two processes do it at once.
            migrations = Path(optuna.storages.__file__).parent / "_rdb" / "alembic"
            MigrationContext.configure(connection).stamp(ScriptDirectory(str(migrations)), "heads")
        BaseModel.metadata.create_all(connection)
        metadata.create_all(connection)
        # The update changes nothing, and fails where the database is read-only.
        known = meta.update().where(meta.c.key == "schema_version").values(value=meta.c.value)
        if connection.execute(known).rowcount == 0:
            connection.execute(meta.insert().values(key="schema_version", value=str(SCHEMA_VERSION)))
        connection.commit()


def _set_pragmas(connection: Any, _record: Any) -> None:
    # In WAL mode a commit without fsync survives the death of any process, and is many times faster.
    connection.execute("PRAGMA synchronous=NORMAL")


def _plain(error: sa.exc.DatabaseError) -> str:
    text = str(error.orig)
    if "locked" in text:
        return "it is locked by another process"
    if "readonly" in text or "read-only" in text:
        return "it is read-only"
    if "not a database" in text:
        return "it is not a database"
    return text
