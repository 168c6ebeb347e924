"""Our tables alongside Optuna's: what they hold, and how they are made, checked and upgraded.

Some columns have a name on disk from an older version, and another one in code: their key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    BaseModel,
    StudyModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialValueModel,
)
from sqlalchemy.engine import URL, Connection, Engine

from hpo.errors import UserError

if TYPE_CHECKING:  # loaded only to make and to upgrade tables
    from alembic.operations import Operations

SCHEMA_VERSION = 3
MIGRATIONS = Path(optuna.storages.__file__).parent / "_rdb" / "alembic"  # of Optuna's tables

our_tables = sa.MetaData()

meta_table = sa.Table(
    "hpo_meta",
    our_tables,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
studies_table = sa.Table(
    "hpo_studies",
    our_tables,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),  # Optuna's
    sa.Column("spec", sa.Text, nullable=False),  # StudySpec.frozen() as JSON
    sa.Column("facts", sa.Text, nullable=False, key="metadata"),  # what the preflight found, as JSON
    sa.Column("created_at", sa.Float, nullable=False),  # every time: seconds since 1970 by the database's clock
    sa.Column("started_at", sa.Float, nullable=False),  # of the latest `hpo run` or `hpo resume`
    sa.Column("stop", sa.String(16)),  # None | "requested" | "failure"
    sa.Column("stop_reason", sa.Text),
)
slots_table = sa.Table(
    "hpo_slots",
    our_tables,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # also the Optuna trial's number
    sa.Column("kind", sa.String(16), nullable=False, server_default="search"),  # search | confirm | test
    sa.Column("replicate", sa.Integer),  # of those that are trained alike to confirm, counted from 0: gives the seed
    sa.Column("tested", sa.Integer),  # of a test: the number of the trial whose network it measures
    sa.Column("state", sa.String(16), nullable=False),  # waiting | running | complete | pruned | diverged | failed
    sa.Column("given", sa.Text, nullable=False),  # parameters fixed beforehand, under Optuna's names, as JSON
    sa.Column("trial_id", sa.Integer),  # Optuna's, from the first claim on
    sa.Column("attempt", sa.Integer, nullable=False),  # 0 before the first claim; fences out whoever lost the slot
    sa.Column("furthest", sa.Integer, nullable=False, key="last_epoch"),  # the highest epoch that any attempt reported
    sa.Column("pruned_at", sa.Integer),  # the epoch after which the pruner stopped it
    sa.Column("losses", sa.Integer, nullable=False, key="crashes"),  # of workers at it, since `last_epoch` last rose
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),  # attempts that an exception ended
    sa.Column(
        "alone", sa.Integer, nullable=False, server_default="0", key="exclusive"
    ),  # 1: ran out of memory, has a device to itself
    sa.Column("worker_id", sa.String(64)),
    sa.Column("claimed_at", sa.Float),  # by the latest attempt
    sa.Column("lease_until", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("reason", sa.Text),  # why it ended, in a few words
    sa.Column("error", sa.Text),  # traceback of a failed trial
    sa.Column("failure_key", sa.Text),  # equal for two trials that failed the same way
    sa.Index("hpo_slots_by_state", "study_id", "state", "number"),
)
attempts_table = sa.Table(
    "hpo_attempts",
    our_tables,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("worker_id", sa.String(64), nullable=False),
    sa.Column("began_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Column(
        "furthest", sa.Integer, nullable=False, key="last_epoch"
    ),  # epochs that earlier attempts had reported when it began
    sa.Column(
        "went_on_from", sa.Integer, key="resumed_from"
    ),  # the epoch of the checkpoint it resumed from; 0: none, from the start
    sa.Column("outcome", sa.Text),  # how it ended: a final state, "released", "lost", or an exception in a line
    sa.Column("error", sa.Text),  # traceback, where an exception ended it
    sa.Column("note", sa.Text),  # what went wrong on the way without ending it, such as a torn checkpoint
)
epochs_table = sa.Table(
    "hpo_epochs",
    our_tables,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),  # JSON; null stands for a number that is not finite
)
workers_table = sa.Table(
    "hpo_workers",
    our_tables,
    sa.Column("worker_id", sa.String(64), primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("machine", sa.Text, nullable=False),  # tells whether `pid` can be looked up on this machine
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("pid_started", sa.Float, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Index("hpo_workers_by_study", "study_id"),
)
intermediate_values = TrialIntermediateValueModel.__table__  # Optuna's
trial_values = TrialValueModel.__table__  # Optuna's
trial_params = BaseModel.metadata.tables["trial_params"]
trial_user_attributes = BaseModel.metadata.tables["trial_user_attributes"]
trial_system_attributes = BaseModel.metadata.tables["trial_system_attributes"]
optuna_studies = StudyModel.__table__
optuna_trials = TrialModel.__table__
# Optuna's tables that hold what is read of a study, and of its trials.
OPTUNA_STUDY_TABLES: tuple[sa.Table, ...] = (
    optuna_studies,
    *(BaseModel.metadata.tables[f"study_{name}"] for name in ("directions", "user_attributes", "system_attributes")),
)
OPTUNA_TRIAL_TABLES: tuple[sa.Table, ...] = (
    optuna_trials,
    *(BaseModel.metadata.tables[f"trial_{name}"] for name in ("user_attributes", "system_attributes", "params")),
    trial_values,
    intermediate_values,
)
# Our rows of a study, in the order in which they are deleted: without its slot no worker can add to the others.
TABLES_OF_STUDY = (slots_table, epochs_table, attempts_table, workers_table, studies_table)


def select_all(table: sa.Table) -> sa.Select[Any]:
    """Return a query of all columns of a table, whose rows have the names that the code uses, not those on disk."""
    return sa.select(*labelled(table))


def select_raw(table: sa.Table) -> sa.Select[Any]:
    """Return a query of all columns of a table of Optuna's as the database has them, and the study of each row.

    SQLAlchemy would raise an exception for a value that is none of the column's type.
    """
    whose = table if "study_id" in table.c else optuna_trials
    columns: list[sa.Label[Any]] = [sa.type_coerce(column, sa.types.NullType()).label(column.key) for column in table.c]
    query: sa.Select[Any] = sa.select(*columns, whose.c.study_id.label("whose"))
    return query if whose is table else query.join(optuna_trials, optuna_trials.c.trial_id == table.c.trial_id)


def union_of(parts: Mapping[str, sa.Select[Any]]) -> sa.CompoundSelect[Any]:
    """Return one statement for several queries; each row has its query's name as `part`, the last column.

    The others are the columns of all queries in the order in which they first occur. Those that a query lacks are null.
    """
    queries = {name: part.subquery() for name, part in parts.items()}
    types = {column.name: column.type for query in reversed(queries.values()) for column in query.c}
    names = dict.fromkeys(column.name for query in queries.values() for column in query.c)
    return sa.union_all(
        *(
            sa.select(
                *(query.c[name] if name in query.c else sa.cast(sa.null(), types[name]).label(name) for name in names),
                sa.literal(part, sa.Text()).label("part"),
            )
            for part, query in queries.items()
        )
    )


def rows_by_part(rows: Iterable[Any]) -> dict[str, list[Any]]:
    """Return the rows of each query of `union_of`; a query without rows has none."""
    found: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        found[row.part].append(row)
    return found


def labelled(table: sa.Table) -> list[sa.Label[Any]]:
    """Return the columns of a table under the names that the code uses: older names stay on disk."""
    return [column.label(column.key) for column in table.c]


def check_tables(engine: Engine, url: URL, *, create: bool) -> bool:
    """Return whether the database holds our tables; `create` allows that it does not.

    Raises:
        UserError: The database is somebody else's, or of a version that this code does not know.
    """
    tables = set(sa.inspect(engine).get_table_names())
    if tables and not {"studies", "trials", "version_info"} <= tables:
        raise UserError(
            f"the database {url} is no store of ours nor of Optuna's; its tables: {', '.join(sorted(tables)[:5])}"
        )
    if meta_table.name not in tables:
        if not create:
            raise UserError(f"the database {url} holds no study of ours; `hpo run` adds one")
        return False
    with engine.connect() as connection:
        version = schema_version(connection)
    if version > SCHEMA_VERSION:
        raise UserError(
            f"the store {url} has schema version {version}, and this hpo knows up to {SCHEMA_VERSION}: upgrade hpo"
        )
    if version < SCHEMA_VERSION:
        raise UserError(
            f"the store {url} has schema version {version}, and this hpo needs {SCHEMA_VERSION}: "
            "end its workers, then run `hpo storage upgrade`"
        )
    return True


def schema_version(connection: Connection) -> int:
    """Return the version of our tables."""
    version = connection.execute(sa.select(meta_table.c.value).where(meta_table.c.key == "schema_version")).scalar()
    if version is not None and not str(version).isdecimal():
        raise UserError(f"the store is damaged: schema_version in hpo_meta must be a number, got {version!a}")
    return SCHEMA_VERSION if version is None else int(version)


def create_tables(connection: Connection) -> None:
    """Make Optuna's tables and ours if they are absent, and prove that the database can be written to.

    The caller is in a transaction that excludes another one of this function.
    """
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    if not sa.inspect(connection).get_table_names():
        # Optuna would do this later, outside our transaction, and fail where two processes do it at once.
        MigrationContext.configure(connection).stamp(ScriptDirectory(str(MIGRATIONS)), "heads")
    BaseModel.metadata.create_all(connection)
    our_tables.create_all(connection)
    follow_deletions(connection)
    # The update changes nothing, and fails where the database is read-only.
    known = meta_table.update().where(meta_table.c.key == "schema_version").values(value=meta_table.c.value)
    if connection.execute(known).rowcount == 0:
        connection.execute(meta_table.insert().values(key="schema_version", value=str(SCHEMA_VERSION)))


def follow_deletions(connection: Connection) -> None:
    """Delete our rows of studies that Optuna's tools have deleted; SQLite is told to do so at once from now on.

    SQLite gives the id of a deleted study to the next one, which may not be ours. Postgres never does, and there a
    trigger and a worker's report could wait for each other.
    """
    delete_rows_of(connection, deleted_study_ids(connection))
    if connection.dialect.name == "sqlite":
        deletions = " ".join(f"DELETE FROM {table.name} WHERE study_id = OLD.study_id;" for table in TABLES_OF_STUDY)
        connection.exec_driver_sql(
            f"CREATE TRIGGER IF NOT EXISTS hpo_follow_deletion AFTER DELETE ON {optuna_studies.name} "
            f"BEGIN {deletions} END"
        )


def deleted_study_ids(connection: Connection) -> list[int]:
    """Return the ids of the studies of which we have rows and Optuna has none."""
    is_deleted = studies_table.c.study_id.not_in(sa.select(optuna_studies.c.study_id))
    return list(connection.execute(sa.select(studies_table.c.study_id).where(is_deleted)).scalars())


def delete_rows_of(connection: Connection, study_ids: Sequence[int]) -> None:
    """Delete our rows of these studies."""
    for table in TABLES_OF_STUDY if study_ids else ():
        connection.execute(table.delete().where(table.c.study_id.in_(study_ids)))


def _to_2(operations: Operations) -> None:
    """Add retries by cause, the kept verdict of the pruner, and a row for each attempt."""
    for name in ("failures", "alone"):
        operations.add_column("hpo_slots", sa.Column(name, sa.Integer, nullable=False, server_default="0"))
    operations.add_column("hpo_slots", sa.Column("pruned_at", sa.Integer))
    attempts_table.create(operations.get_bind())


def _to_3(operations: Operations) -> None:
    """Add trials that confirm the answer, and those that measure the test set."""
    operations.add_column("hpo_slots", sa.Column("kind", sa.String(16), nullable=False, server_default="search"))
    for name in ("replicate", "tested"):
        operations.add_column("hpo_slots", sa.Column(name, sa.Integer))


UPGRADES: dict[int, Callable[[Operations], None]] = {1: _to_2, 2: _to_3}  # from this version to the next


def upgrade_tables(connection: Connection) -> tuple[int, int]:
    """Bring our tables to SCHEMA_VERSION in the caller's transaction, and return the version before and after.

    Raises:
        UserError: This code does not know the version.
    """
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    before = version = schema_version(connection)
    if version > SCHEMA_VERSION:
        raise UserError(
            f"the store has schema version {version}, and this hpo knows up to {SCHEMA_VERSION}: upgrade hpo"
        )
    operations = Operations(MigrationContext.configure(connection))
    while version in UPGRADES:
        UPGRADES[version](operations)
        version += 1
        connection.execute(meta_table.update().where(meta_table.c.key == "schema_version").values(value=str(version)))
    follow_deletions(connection)
    return before, version


def has_newest_optuna_tables(engine: Engine) -> bool:
    """Return whether Optuna's tables have, and name, the version of the installed Optuna.

    The version is read from the names of its migrations. Optuna itself asks Alembic, which loads all of them; where
    this is false it is asked.
    """
    migrations = [path.stem.strip("_") for path in (MIGRATIONS / "versions").glob("v*.py")]
    newest = max(migrations, key=_version_key, default=None)
    if not sa.inspect(engine).has_table("alembic_version"):
        return False
    with engine.connect() as connection:
        known = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
        is_written = connection.execute(sa.select(BaseModel.metadata.tables["version_info"].c.library_version)).first()
        return known == [newest] and is_written is not None


def _version_key(name: str) -> list[tuple[int, str]]:
    """Return what sorts names of versions, such as v3.0.0.b, by the numbers and letters between their dots."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.removeprefix("v").split(".")]


def upgrade_optuna(storage: RDBStorage) -> tuple[str, str]:
    """Bring Optuna's tables to the version of the installed Optuna, and return the version before and after."""
    before, newest = str(storage.get_current_version()), str(storage.get_head_version())
    if before != newest:
        storage.upgrade()
    return before, newest
