"""The studies of a database: created, joined, started, stopped, read and deleted."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search import proposals
from hpo.store.copying import read_rows
from hpo.store.dashboard_attributes import changed_attributes
from hpo.store.database import Database, exclude_others
from hpo.store.reading import check_exists, find_study_id, load_studies, load_study, study_names
from hpo.store.retry import retry_on_outage
from hpo.store.schema import delete_rows_of, optuna_studies, optuna_trials, slots_table, studies_table
from hpo.store.searches import give_budget
from hpo.store.slots import FRESH, add_slots, count_all_slots, lock_study, new_slot, num_slots, slot_states
from hpo.study import stages
from hpo.study.records import CODE, StudyRecord

SHARED_PREFIX = "hpo: "  # begins the names of Optuna's study attributes that are ours
# Metadata that may change: a note may be added to a folder of images, and of code that has changed people are told.
DESCRIPTIONS = ("images", "weights", CODE)
MAX_DIFFERENCES = 8  # that are named where a spec does not fit a study


class Studies:
    """The studies of a database. Any thread and any process may call any method."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.retry = database.retry

    def create(self, spec: StudySpec, *, metadata: Mapping[str, Any]) -> StudyRecord:
        """Create the study with its slots, or join the one of that name; a larger `search.trials` enlarges it.

        Raises:
            UserError: The spec, or what the preflight found (`metadata`), differs from the study's in anything that
                would change a result.
        """
        with self._database.transaction() as connection:
            exclude_others(connection)  # who might create it at the same time
            study_id = find_study_id(self._database, connection, spec.name)
            if study_id is None:
                study_id = self._insert(connection, spec, {**metadata, "uid": uuid.uuid4().hex[:8]})
            else:
                study = load_study(self._database, connection, study_id, spec.name)
                self.check_joins(study, spec, metadata=metadata)
                study = replace(study, metadata={**metadata, **study.metadata})  # an older hpo may have found fewer
                give_budget(self._database, connection, study, spec, trials=spec.num_trials)
            return load_study(self._database, connection, study_id, spec.name)

    def check_joins(self, study: StudyRecord, spec: StudySpec, *, metadata: Mapping[str, Any]) -> None:
        """Raise UserError, with the differences, if trials of this spec do not belong in the study."""
        differences = study.spec.differences(spec) + [
            f"{name} is {study.metadata[name]} in the study, {value} here"
            for name, value in metadata.items()
            if name in study.metadata and study.metadata[name] != value and name not in DESCRIPTIONS
        ]
        if differences:
            num_more = len(differences) - MAX_DIFFERENCES
            shown = differences[:MAX_DIFFERENCES] + ([f"and {num_more} more"] if num_more > 0 else [])
            raise UserError(
                f"study {spec.name!r} exists in {self._database.url} with other settings; give this one another name, "
                f"or undo: {'; '.join(shown)}"
            )

    def _insert(self, connection: Connection, spec: StudySpec, metadata: Mapping[str, Any]) -> int:
        direction = StudyDirection.MAXIMIZE if spec.direction == "maximize" else StudyDirection.MINIMIZE
        storage = self._database.storage
        try:
            study_id = storage.create_new_study([direction], spec.name)
        except optuna.exceptions.DuplicatedStudyError:
            raise UserError(
                f"{self._database.url} holds a study {spec.name!r} that hpo did not make; choose another name"
            ) from None
        optuna.load_study(study_name=spec.name, storage=storage).set_metric_names([spec.metric])
        at = self._database.now(connection)
        row = {
            "study_id": study_id,
            "spec": json.dumps(spec.frozen()),
            "metadata": json.dumps(metadata),
            "created_at": at,
            "started_at": at,
        }
        connection.execute(studies_table.insert().values(row))
        add_slots(connection, study_id, [new_slot(spec, values) for values in proposals.fixed_values(spec)])
        return study_id

    @retry_on_outage
    def get(self, name: str) -> StudyRecord:
        """Return the study of this name; raise UserError, which lists those that exist, if there is none."""
        with self._database.connect() as connection:
            return load_study(self._database, connection, self._find(connection, name), name)

    def _find(self, connection: Connection, name: str) -> int:
        """Return the id of the study of this name; raise UserError, which lists those that exist, if there is none."""
        study_id = find_study_id(self._database, connection, name)
        if study_id is None:
            names = ", ".join(sorted(study_names(self._database, connection).values())) or "none"
            raise UserError(f"there is no study {name!r} in {self._database.url}; there are: {names}")
        return study_id

    def get_all(self) -> list[StudyRecord]:
        """Return the studies that can be read; `load_all` tells what is wrong with others."""
        return self.load_all()[0]

    def load_all(self) -> tuple[list[StudyRecord], dict[str, str]]:
        """Return the studies that can be read, and what is wrong with each other one, a sentence by its name."""
        with self._database.connect() as connection:
            return load_studies(self._database, connection)

    @retry_on_outage
    def counts(self, studies: Sequence[StudyRecord]) -> dict[int, dict[str, int] | UserError]:
        """Return what `Trials.counts` returns of each study, or what is wrong with it, by its id."""
        return count_all_slots(self._database, [study.study_id for study in studies])

    @retry_on_outage
    def retry_failed(self, study: StudyRecord) -> None:
        """Have the trials that have failed wait to be trained again, from their start."""
        failed = (
            (slots_table.c.study_id == study.study_id) & (slots_table.c.state == "failed") & (slots_table.c.attempt > 0)
        )
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            # Not by Optuna's means: it lets no program take the end of a trial back.
            is_theirs = optuna_trials.c.trial_id.in_(sa.select(slots_table.c.trial_id).where(failed))
            reopened = {"state": TrialState.RUNNING, "datetime_complete": None}
            connection.execute(optuna_trials.update().where(is_theirs).values(reopened))
            connection.execute(slots_table.update().where(failed).values(FRESH | {"state": "waiting"}))

    @retry_on_outage
    def stage_due(self, study: StudyRecord) -> str | None:
        """Return what follows the trials that the study has: "confirm", "test", or None while any of them is open."""
        return None if study.spec.confirm is None else stages.due(study, slot_states(self._database, study.study_id))

    @retry_on_outage
    def add_planned(self, study: StudyRecord, planned: Sequence[stages.Planned], *, after: int) -> None:
        """Add the slots of these trials, unless the study has more than `after` slots: another caller was first."""
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            if num_slots(connection, study.study_id) == after:
                new = [
                    new_slot(study.spec, trial.params)
                    | {"kind": trial.kind, "replicate": trial.replicate, "tested": trial.tested}
                    for trial in planned
                ]
                add_slots(connection, study.study_id, new)

    def check_absent(self, name: str) -> None:
        """Raise UserError if the database has a study of that name."""
        with self._database.connect() as connection:
            query = sa.select(optuna_studies.c.study_id).where(optuna_studies.c.study_name == name)
            is_known = connection.execute(query).first() is not None
        if is_known:
            raise UserError(f"{self._database.url} holds a study {name!r} already")

    def rows(self, table: sa.Table, study: StudyRecord) -> list[dict[str, Any]]:
        """Return every row of one of our tables that belongs to the study."""
        with self._database.connect() as connection:
            return read_rows(connection, table, study.study_id)

    def request_stop(self, study: StudyRecord) -> None:
        """Ask every worker to release its trials after their next report, and to leave."""
        running = (studies_table.c.study_id == study.study_id) & studies_table.c.stop.is_(None)
        with self._database.transaction() as connection:
            stopped = {"stop": "requested", "stop_reason": "hpo stop"}
            connection.execute(studies_table.update().where(running).values(stopped))

    @retry_on_outage
    def is_stopping(self, study_id: int) -> bool:
        """Return whether the study was stopped, by a request or by failures."""
        with self._database.connect() as connection:
            query = sa.select(studies_table.c.stop).where(studies_table.c.study_id == study_id)
            row = connection.execute(query).first()
            return row is None or row.stop is not None

    @retry_on_outage
    def check_exists(self, study: StudyRecord) -> None:
        """Raise StudyStopped if the study was deleted, even if there is another one of its name."""
        with self._database.connect() as connection:
            check_exists(connection, study)

    def delete(self, name: str) -> None:
        """Delete a study with its trials, also a damaged one. Raise UserError if there is none or it is in training."""
        with self._database.transaction() as connection:
            exclude_others(connection)
            study_id = self._find(connection, name)
            lock_study(connection, study_id)
            if num_running := num_slots(connection, study_id, state="running"):
                raise UserError(f"study {name!r} has {num_running} trials in training; end them with: hpo stop {name}")
            self._database.storage.delete_study(study_id)
            delete_rows_of(connection, [study_id])

    def start(self, study: StudyRecord) -> None:
        """Take back a stop, whatever its reason; failures are counted from now on."""
        with self._database.transaction() as connection:
            started = {"stop": None, "stop_reason": None, "started_at": self._database.now(connection)}
            is_study = studies_table.c.study_id == study.study_id
            connection.execute(studies_table.update().where(is_study).values(started))

    @retry_on_outage
    def get_or_set_shared(self, study: StudyRecord, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Set `key` to `value` for all workers unless it is already set; return the value in effect."""
        name = f"{SHARED_PREFIX}{key}"
        storage = self._database.storage
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            known = storage.get_study_user_attrs(study.study_id).get(name)
            # Else another program has set it.
            if isinstance(known, dict) and known.keys() <= value.keys() and isinstance(known.get("reason", ""), str):
                return dict(known)
            storage.set_study_user_attr(study.study_id, name, dict(value))
            return dict(value)

    @retry_on_outage
    def shared_values(self, study: StudyRecord) -> dict[str, Any]:
        """Return the values with a reason that `get_or_set_shared` has set, by key."""
        attributes = self._database.storage.get_study_user_attrs(study.study_id)
        return {
            name.removeprefix(SHARED_PREFIX): value
            for name, value in attributes.items()
            if name.startswith(SHARED_PREFIX) and isinstance(value, dict) and isinstance(value.get("reason"), str)
        }

    def show(self, study: StudyRecord, figures: Mapping[str, str | None], *, note: str) -> None:
        """Have optuna-dashboard show these figures and this note with the study, instead of those of the same titles.

        All of them are shown or, if it raises, none; of two callers at once, those of the later one.

        Args:
            study: The study.
            figures: The JSON of a Plotly figure, or None for nothing to show, by title.
            note: The text, in Markdown.
        """
        storage = self._database.storage
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            known = storage.get_study_system_attrs(study.study_id)
            for key, value in changed_attributes(known, figures, note=note).items():
                storage.set_study_system_attr(study.study_id, key, value)
