"""Copying a study with all its trials from one store into another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage
from sqlalchemy.engine import Connection

from hpo.errors import UserError
from hpo.store.database import Database, exclude_others
from hpo.store.reading import load_study
from hpo.store.schema import (
    attempts_table,
    epochs_table,
    select_all,
    slots_table,
    studies_table,
    workers_table,
)
from hpo.study.records import StudyRecord

COPIED_TABLES = (slots_table, studies_table, epochs_table, attempts_table, workers_table)

Row = dict[str, Any]


def read_rows(connection: Connection, table: sa.Table, study_id: int) -> list[Row]:
    """Return every row of one of our tables that belongs to a study, under the names that the code uses."""
    query = select_all(table).where(table.c.study_id == study_id)
    return [dict(row) for row in connection.execute(query).mappings()]


def copy_study(
    source: Database,
    target: Database,
    study: StudyRecord,
    *,
    metadata: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> StudyRecord:
    """Copy a study into another store, all of it or nothing; trials keep numbers, values and curves.

    Args:
        source: The database of the study.
        target: The other one.
        study: The study to copy.
        metadata: The copy's metadata, with a uid of its own.
        progress: Is called with the number of trials copied, and of all.

    Raises:
        UserError: There is a study of that name, or trials were in training meanwhile.
    """
    with source.snapshot() as connection:
        rows = {table: read_rows(connection, table, study.study_id) for table in COPIED_TABLES}
        trials = source.storage.get_all_trials(study.study_id)
    if any(row["state"] == "running" for row in rows[slots_table]):
        raise UserError(f"study {study.name!r} is in training; end that with: hpo stop {study.name}")
    with target.transaction() as connection:
        exclude_others(connection)
        at = target.now(connection)
        study_id = _copy_optuna_study(source.storage, target, study)
        assert metadata["uid"] != study.metadata["uid"]
        trial_ids: dict[int | None, int | None] = {None: None}
        for trial in trials:
            trial_ids[trial._trial_id] = target.storage.create_new_trial(study_id, template_trial=trial)
            progress(trial.number + 1, len(trials))
        rows[workers_table] = _without_known_workers(connection, rows[workers_table])
        for row in rows[studies_table]:
            row["metadata"] = json.dumps(dict(metadata))
        for row in rows[slots_table]:
            row["trial_id"] = trial_ids[row["trial_id"]]
        for row in rows[attempts_table] + rows[workers_table]:
            row["ended_at"] = row["ended_at"] or at
        for table, copied in rows.items():
            if copied:
                connection.execute(table.insert(), [{**row, "study_id": study_id} for row in copied])
        return load_study(target, connection, study_id, study.name)


def _copy_optuna_study(source: BaseStorage, target: Database, study: StudyRecord) -> int:
    """Create the study in Optuna's tables with its attributes, and return its id."""
    directions = source.get_study_directions(study.study_id)
    try:
        study_id = target.storage.create_new_study(directions, study.name)
    except optuna.exceptions.DuplicatedStudyError:
        raise UserError(f"{target.url} holds a study {study.name!r} already") from None
    for key, value in source.get_study_system_attrs(study.study_id).items():
        target.storage.set_study_system_attr(study_id, key, value)
    for key, value in source.get_study_user_attrs(study.study_id).items():
        target.storage.set_study_user_attr(study_id, key, value)
    return study_id


def _without_known_workers(connection: Connection, rows: list[Row]) -> list[Row]:
    known = set(connection.execute(sa.select(workers_table.c.worker_id)).scalars())
    return [row for row in rows if row["worker_id"] not in known]
