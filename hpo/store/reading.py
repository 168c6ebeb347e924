"""Reading studies and trials: from their rows to records.

A study may have tens of thousands of trials, each with as many reports as epochs, so each table is read by one
statement, whole columns are checked at once, and each text of JSON is parsed once. Of Optuna's rows only those are read
of which the records tell: our own tables have the course of each trial.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Connection

from hpo.config.earlier_studies import stored_spec
from hpo.errors import StudyStopped, UserError
from hpo.store.conditions import enqueued_trials, is_waiting
from hpo.store.damage import check_trial, read_metrics, refuse_damage, refuse_damage_of_optuna
from hpo.store.database import Database
from hpo.store.frozen_trials import read_distribution
from hpo.store.prepared import execute_prepared
from hpo.store.schema import (
    OPTUNA_STUDY_TABLES,
    attempts_table,
    epochs_table,
    optuna_studies,
    select_all,
    select_raw,
    slots_table,
    studies_table,
    trial_params,
    trial_user_attributes,
    trial_values,
    workers_table,
)
from hpo.study.records import (
    WIDENED,
    Attempt,
    Claim,
    RecordedTrial,
    StudyRecord,
    TrialRecord,
    read_attempt,
    read_trial,
)

Reports = list[tuple[int, dict[str, float | None]]]  # of one trial, in order: epoch and metrics
INFINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf}  # values for which Optuna keeps no number, by their type


def study_names(database: Database, connection: Connection) -> dict[int, str]:
    """Return the names of our studies by their ids; the database may hold studies that others made with Optuna."""
    # Not by Optuna's means, which read all that studies have: a damaged one would hide the others.
    query = sa.select(optuna_studies.c.study_id, optuna_studies.c.study_name).join(
        studies_table, studies_table.c.study_id == optuna_studies.c.study_id
    )
    names = connection.execute(query.order_by(optuna_studies.c.study_id))
    return {row.study_id: row.study_name if isinstance(row.study_name, str) else ascii(row.study_name) for row in names}


def find_study_id(database: Database, connection: Connection, name: str) -> int | None:
    """Return the id of our study of this name, or None if there is none."""
    names = study_names(database, connection)
    return next((study_id for study_id, other in names.items() if other == name), None)


def load_study(database: Database, connection: Connection, study_id: int, name: str) -> StudyRecord:
    """Return the study; raise UserError if its row is damaged."""
    row = connection.execute(select_all(studies_table).where(studies_table.c.study_id == study_id)).one()
    refuse_damage(database.url, name, studies_table, [row])
    refuse_damage_of_optuna(database.url, name, study_id, connection, OPTUNA_STUDY_TABLES)
    return _study_record(database, row, name)


def load_studies(database: Database, connection: Connection) -> tuple[list[StudyRecord], dict[str, str]]:
    """Return the studies that can be read, and what is wrong with each other one, a sentence by its name."""
    names = study_names(database, connection)
    rows = {row.study_id: row for row in connection.execute(select_all(studies_table)).all()}
    of_optuna: dict[sa.Table, dict[int, list[Any]]] = {table: {} for table in OPTUNA_STUDY_TABLES}
    for table, of_studies in of_optuna.items():
        for row in connection.execute(select_raw(table)).all():
            of_studies.setdefault(row.whose, []).append(row)
    studies, damages = [], {}
    for study_id, name in names.items():
        try:
            refuse_damage(database.url, name, studies_table, [rows[study_id]])
            for table, of_studies in of_optuna.items():
                refuse_damage(database.url, name, table, of_studies.get(study_id, []))
            studies.append(_study_record(database, rows[study_id], name))
        except UserError as error:
            damages[name] = str(error)
    return studies, damages


def _study_record(database: Database, row: Any, name: str) -> StudyRecord:
    """Return the study of an undamaged row; raise UserError if its spec or its metadata cannot be."""
    source = f"study {name!r} in {database.url} is damaged: {studies_table.name}, study_id {row.study_id}"
    try:
        spec = stored_spec(json.loads(row.spec))
    except UserError as error:
        raise UserError(f"{source}: spec: {error}, unless a newer hpo wrote it") from None
    metadata = json.loads(row.metadata)
    # Name and uid become part of a path: a store must not be able to name any folder of this machine.
    if spec.name != name:
        raise UserError(f"{source}: spec names it {spec.name!r}")
    if not re.fullmatch(r"[0-9a-f]{8}", str(metadata.get("uid"))):
        raise UserError(f"{source}: facts must have a uid of 8 digits, got {metadata.get('uid')!a}")
    database.storage.forget_other(row.study_id, metadata["uid"])
    return StudyRecord(row.study_id, name, spec, metadata, row.stop, row.stop_reason, row.started_at)


def check_exists(connection: Connection, study: StudyRecord) -> None:
    """Raise StudyStopped if the study was deleted, by us or by Optuna's tools, even if another one has its name."""
    query = (
        sa.select(studies_table.c.metadata)
        .join(optuna_studies, optuna_studies.c.study_id == studies_table.c.study_id)
        .where(studies_table.c.study_id == study.study_id)
    )
    _refuse_deleted(study, connection.execute(query).scalar())


def lock_to_claim(connection: Connection, study: StudyRecord) -> bool:
    """Let one worker claim at a time, and no other program add a trial; return whether the study goes on as recorded.

    It does not if it should stop, if a range was widened since, or if no trial waits; then nothing is locked. Raise
    StudyStopped if the study was deleted.
    """
    row = execute_prepared(connection, build_lock, {"of_study_id": study.study_id}).first()
    if row is None:
        check_exists(connection, study)
        return False
    _refuse_deleted(study, row.metadata)
    refuse_damage(connection.engine.url, study.name, studies_table, [row])
    return row.stop is None and not _is_widened(study, row)


def build_lock(dialect_name: str) -> list[sa.Select[Any]]:
    """Return the statement of `lock_to_claim`."""
    study_id = sa.bindparam("of_study_id", type_=sa.Integer)
    waits = sa.exists().where(is_waiting(study_id)) | enqueued_trials(study_id).exists()
    query = (
        select_all(studies_table)
        .join(optuna_studies, optuna_studies.c.study_id == studies_table.c.study_id)
        .where(studies_table.c.study_id == study_id, waits)
    )
    # In this order, as whoever sets attributes of the study.
    return [query.with_for_update(of=[studies_table, optuna_studies])]


def _refuse_deleted(study: StudyRecord, metadata: str | None) -> None:
    """Raise StudyStopped where the metadata of the row with its id are not the study's."""
    if study.metadata["uid"] not in str(metadata):
        raise StudyStopped(f"study {study.name!r} was deleted from the store")


def _is_widened(study: StudyRecord, row: Any) -> bool:
    return len(json.loads(row.metadata).get(WIDENED, [])) != len(study.widenings)


def is_outdated(connection: Connection, study: StudyRecord) -> bool:
    """Return whether a range of the study was widened since this record of it was read."""
    row = connection.execute(select_all(studies_table).where(studies_table.c.study_id == study.study_id)).one()
    refuse_damage(connection.engine.url, study.name, studies_table, [row])
    return _is_widened(study, row)


def read_trials(database: Database, study: StudyRecord, *, latest: int | None = None) -> list[TrialRecord]:
    """Return every slot of the study with what is known of it, in order; raise UserError where a row is damaged.

    With `latest` return only so many slots, of which the last has begun last, or the first ones if fewer have begun.
    """
    with database.snapshot() as connection:
        numbers = None if latest is None else _latest_numbers(connection, study, latest)
        query = select_all(slots_table).where(_is_of_trials(slots_table, study, numbers)).order_by(slots_table.c.number)
        rows = connection.execute(query).all()
        refuse_damage(database.url, study.name, slots_table, rows)
        reports, last_attempt = _read_reports(database, connection, study, numbers)
        attempts = _read_attempts(database, connection, study, numbers)
        recorded = _read_recorded(database, connection, study, numbers)
    for row in rows:
        # A trial that has just been resumed has the epochs up to its checkpoint's: the later ones will be replaced.
        if row.state == "running" and last_attempt.get(row.number) not in (None, row.attempt):
            tries = attempts.get(row.number, [])
            resumed_from = next((a.resumed_from or 0 for a in tries if a.attempt == row.attempt), 0)
            reports[row.number] = [report for report in reports[row.number] if report[0] <= resumed_from]
    return [
        read_trial(row, recorded(row.trial_id), reports.get(row.number, []), attempts.get(row.number, []))
        for row in rows
    ]


def _latest_numbers(connection: Connection, study: StudyRecord, count: int) -> range | None:
    """Return `count` numbers of slots, of which the last is that of the slot that began last, if so many have begun.

    Return None, for all numbers, where that one is damaged.
    """
    has_begun = (slots_table.c.study_id == study.study_id) & slots_table.c.trial_id.is_not(None)
    last = connection.execute(sa.select(sa.func.max(slots_table.c.number)).where(has_begun)).scalar()
    if not isinstance(last, int | None):
        return None
    end = max(count, 0 if last is None else last + 1)
    return range(end - count, end)


def _is_of_trials(table: sa.Table, study: StudyRecord, numbers: range | None) -> sa.ColumnElement[bool]:
    """Return the condition on rows of a table of ours that they are of the study, and of trials of these numbers."""
    is_of_study: sa.ColumnElement[bool] = table.c.study_id == study.study_id
    return is_of_study if numbers is None else is_of_study & table.c.number.between(numbers[0], numbers[-1])


def _read_recorded(
    database: Database, connection: Connection, study: StudyRecord, numbers: range | None
) -> Callable[[int | None], RecordedTrial | None]:
    """Return the function that gives what Optuna's tables have of a trial by its id there, None if it has none."""
    rows: dict[sa.Table, Sequence[Any]] = {}
    for table in (trial_params, trial_values, trial_user_attributes):
        query = select_raw(table)
        query = query.where(query.selected_columns.whose == study.study_id)
        if numbers is not None:
            chosen = sa.select(slots_table.c.trial_id).where(_is_of_trials(slots_table, study, numbers))
            query = query.where(table.c.trial_id.in_(chosen))
        rows[table] = connection.execute(query.order_by(*table.primary_key)).all()
        refuse_damage(database.url, study.name, table, rows[table])
    params: dict[int, dict[str, Any]] = {}
    for row in rows[trial_params]:  # in the order in which they were drawn
        value = read_distribution(row.distribution_json).to_external_repr(row.param_value)
        params.setdefault(row.trial_id, {})[row.param_name] = value
    values = {row.trial_id: INFINITE.get(row.value_type, row.value) for row in rows[trial_values]}
    parsed = {text: json.loads(text) for text in {row.value_json for row in rows[trial_user_attributes]}}
    attributes: dict[int, dict[str, Any]] = {}
    for row in rows[trial_user_attributes]:
        attributes.setdefault(row.trial_id, {})[row.key] = parsed[row.value_json]

    def recorded(trial_id: int | None) -> RecordedTrial | None:
        if trial_id is None:
            return None
        return RecordedTrial(values.get(trial_id), params.get(trial_id, {}), attributes.get(trial_id, {}))

    return recorded


def read_optuna_trials(database: Database, study_id: int) -> dict[int, FrozenTrial]:
    """Return Optuna's trials of the study by their ids.

    Raise TypeError, or what Optuna does, where one is damaged.
    """
    trials = database.cached.get_all_trials(study_id, deepcopy=False)
    for trial in trials:
        check_trial(trial)
    return {trial._trial_id: trial for trial in trials}


def best_values(connection: Connection, study: StudyRecord, count: int) -> list[tuple[int, float]]:
    """Return the numbers and values of the `count` best complete trials of the search, the best first."""
    value = trial_values.c.value
    order = value.desc() if study.spec.direction == "maximize" else value.asc()
    is_complete = (slots_table.c.state == "complete") & (slots_table.c.kind == "search")
    query = (
        sa.select(slots_table.c.number, value)
        .join(trial_values, trial_values.c.trial_id == slots_table.c.trial_id)
        .where(slots_table.c.study_id == study.study_id, is_complete)
        .order_by(order, slots_table.c.number)
        .limit(count)
    )
    return [(number, value) for number, value in connection.execute(query)]


def read_epoch_seconds(connection: Connection, claim: Claim) -> dict[int, float]:
    """Return how long each reported epoch of a trial took, in seconds by epoch; 0 where that was not reported."""
    whose = (epochs_table.c.study_id == claim.study_id) & (epochs_table.c.number == claim.number)
    rows = connection.execute(sa.select(epochs_table.c.epoch, epochs_table.c.metrics).where(whose))
    return {row.epoch: json.loads(row.metrics).get("seconds") or 0.0 for row in rows}


def _read_reports(
    database: Database, connection: Connection, study: StudyRecord, numbers: range | None
) -> tuple[dict[int, Reports], dict[int, int]]:
    """Return the reports of each trial, and the attempt that reported last, both by the trial's number."""
    reports: dict[int, Reports] = {}
    last_attempt: dict[int, int] = {}
    query = select_all(epochs_table).where(_is_of_trials(epochs_table, study, numbers))
    rows = connection.execute(query.order_by(epochs_table.c.number, epochs_table.c.epoch)).all()
    all_metrics = read_metrics([row.metrics for row in rows])
    # Metrics, the last column, need no second look.
    refuse_damage(database.url, study.name, epochs_table, rows if all_metrics is None else [row[:-1] for row in rows])
    for (_, number, epoch, attempt, _), metrics in zip(rows, all_metrics or (), strict=True):
        reports.setdefault(number, []).append((epoch, metrics))
        last_attempt[number] = attempt
    return reports, last_attempt


def _read_attempts(
    database: Database, connection: Connection, study: StudyRecord, numbers: range | None
) -> dict[int, list[Attempt]]:
    """Return the attempts at each trial by its number."""
    mine = _is_of_trials(attempts_table, study, numbers)
    query = select_all(attempts_table).where(mine).order_by(attempts_table.c.number, attempts_table.c.attempt)
    rows: Sequence[Any] = connection.execute(query).all()
    refuse_damage(database.url, study.name, attempts_table, rows)
    whose = workers_table.c.worker_id.in_(sa.select(attempts_table.c.worker_id).where(mine))
    workers = {row.worker_id: row for row in connection.execute(select_all(workers_table).where(whose))}
    refuse_damage(database.url, study.name, workers_table, list(workers.values()))
    attempts: dict[int, list[Attempt]] = {}
    for row in rows:
        attempts.setdefault(row.number, []).append(read_attempt(row, workers.get(row.worker_id)))
    return attempts
