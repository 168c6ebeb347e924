"""Studies in their database: created, joined, enlarged, stopped, read; their slots are in slots.py and the ledger."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.study import StudyDirection
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search import proposals
from hpo.store.database import Database, exclude_others
from hpo.store.retry import retry_on_outage
from hpo.store.schema import attempts_table, epochs_table, select_all, slots_table, studies_table, workers_table
from hpo.store.slots import add_slots, drop_unclaimed, lock_study, new_slot, num_slots
from hpo.study.records import StudyRecord

AGREEMENT = "hpo: "  # begins the names of Optuna's study attributes that are ours
FIGURE, NOTE = "dashboard:plot_data:", "dashboard:note_"  # begin the names of optuna-dashboard's
NO_FIGURE = '{"data":[],"layout":{}}'
MAX_DIFFERENCES = 8  # that are named where a spec does not fit a study


class Studies:
    """The studies in a database. Every method may be called from any thread and any process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.retry = database.retry

    def create(self, spec: StudySpec, *, metadata: Mapping[str, Any]) -> StudyRecord:
        """Creates the study with its slots, or joins the one of that name; a larger `search.trials` enlarges it.

        Raises UserError where the spec, or what the preflight found (`metadata`), differs from the study's in anything
        that would change a result.
        """
        with self._database.transaction() as connection:
            exclude_others(connection)  # who might create it at the same time
            study_id = self._find_id(connection, spec.name)
            if study_id is None:
                study_id = self._insert_study(connection, spec, json.dumps({**metadata, "uid": uuid.uuid4().hex[:8]}))
            else:
                study = self._load(connection, study_id, spec.name)
                self.check_joins(study, spec, metadata=metadata)
                study = replace(study, metadata={**metadata, **study.metadata})  # an older hpo may have found fewer
                self._save(connection, study, spec, trials=spec.num_trials)
            return self._load(connection, study_id, spec.name)

    def check_joins(self, study: StudyRecord, spec: StudySpec, *, metadata: Mapping[str, Any]) -> None:
        """Raises UserError, with the differences, where trials of this spec do not belong into the study."""
        differences = study.spec.differences(spec) + [
            f"{name} is {study.metadata[name]} in the study, {value} here"
            for name, value in metadata.items()
            if name in study.metadata and study.metadata[name] != value
        ]
        if differences:
            raise UserError(
                f"study {spec.name!r} exists in {self._database.url} with other settings; give this one another name, "
                "or undo: "
                + "; ".join(differences[:MAX_DIFFERENCES])
                + (f"; and {len(differences) - MAX_DIFFERENCES} more" if len(differences) > MAX_DIFFERENCES else "")
            )

    def _insert_study(self, connection: Connection, spec: StudySpec, metadata: str) -> int:
        direction = StudyDirection.MAXIMIZE if spec.direction == "maximize" else StudyDirection.MINIMIZE
        try:
            study_id = self._database.storage.create_new_study([direction], spec.name)
        except optuna.exceptions.DuplicatedStudyError:
            raise UserError(
                f"{self._database.url} holds a study {spec.name!r} that hpo did not make; choose another name"
            ) from None
        optuna.load_study(study_name=spec.name, storage=self._database.storage).set_metric_names([spec.metric])
        created = self._database.now(connection)
        connection.execute(
            studies_table.insert().values(
                study_id=study_id,
                spec=json.dumps(spec.frozen()),
                metadata=metadata,
                created_at=created,
                started_at=created,
            )
        )
        add_slots(connection, study_id, [new_slot(spec, values) for values in proposals.fixed_values(spec)])
        return study_id

    @retry_on_outage
    def get(self, name: str) -> StudyRecord:
        """The study of this name. Raises UserError, listing those that exist, where there is none."""
        with self._database.connect() as connection:
            study_id = self._find_id(connection, name)
            if study_id is None:
                names = ", ".join(sorted(self._names(connection).values())) or "none"
                raise UserError(f"there is no study {name!r} in {self._database.url}; there are: {names}")
            return self._load(connection, study_id, name)

    def get_all(self) -> list[StudyRecord]:
        """The studies that can be read; what is wrong with others, `damages` tells."""
        return self._load_all()[0]

    def damages(self) -> list[str]:
        """What is wrong with studies that cannot be read."""
        return self._load_all()[1]

    def _load_all(self) -> tuple[list[StudyRecord], list[str]]:
        found, damages = [], []
        with self._database.connect() as connection:
            for study_id, name in self._names(connection).items():
                try:
                    found.append(self._load(connection, study_id, name))
                except UserError as error:
                    damages.append(str(error))
        return found, damages

    def enlarge(self, study: StudyRecord, trials: int) -> None:
        """Gives the study a budget of `trials`; what was trained stays. Raises UserError for a grid or for fewer."""
        if study.spec.search.sampler == "grid":
            raise UserError(f"--trials cannot enlarge a grid; study {study.name!r} has {study.spec.num_trials} points")
        with self._database.transaction() as connection:
            exclude_others(connection)
            study = self._load(connection, study.study_id, study.name)
            if trials < (count := num_slots(connection, study.study_id, kind="search")):
                raise UserError(f"--trials must be at least {count}, which study {study.name!r} has, got {trials}")
            self._save(connection, study, study.spec, trials=trials)

    def _save(self, connection: Connection, study: StudyRecord, spec: StudySpec, *, trials: int) -> None:
        """Makes `spec` the study's, with a budget of `trials` or what it has already."""
        lock_study(connection, study.study_id)
        count = num_slots(connection, study.study_id, kind="search")
        if trials > count:
            drop_unclaimed(connection, study.study_id)
        add_slots(connection, study.study_id, [new_slot(spec, {})] * (trials - count))
        frozen = spec.frozen()
        if spec.search.sampler != "grid":
            frozen["search"]["trials"] = max(trials, count)
        saved = {"spec": json.dumps(frozen), "metadata": json.dumps(dict(study.metadata))}
        connection.execute(studies_table.update().where(studies_table.c.study_id == study.study_id).values(**saved))

    def check_absent(self, name: str) -> None:
        """Raises UserError where this store has a study of that name."""
        if name in {study.study_name for study in self._database.storage.get_all_studies()}:
            raise UserError(f"{self._database.url} holds a study {name!r} already")

    def copy_from(
        self,
        source: Studies,
        study: StudyRecord,
        *,
        metadata: Mapping[str, Any],
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> StudyRecord:
        """Copies a study of another store into this one, all of it or nothing; trials keep numbers, values and curves.

        `metadata` are the copy's. `progress(done, of)` is called as trials are copied. Raises UserError where this store
        has a study of that name, and where trials of it were in training meanwhile.
        """
        theirs = source._database.storage
        rows = {
            table: source.rows(table, study)
            for table in (slots_table, studies_table, epochs_table, attempts_table, workers_table)
        }
        trials = theirs.get_all_trials(study.study_id)
        if rows[slots_table] != source.rows(slots_table, study) or any(
            row["state"] == "running" for row in rows[slots_table]
        ):
            raise UserError(f"study {study.name!r} is in training; end that with: hpo stop {study.name}")
        with self._database.transaction() as connection:
            exclude_others(connection)
            at = self._database.now(connection)
            try:
                study_id = self._database.storage.create_new_study(
                    theirs.get_study_directions(study.study_id), study.name
                )
            except optuna.exceptions.DuplicatedStudyError:
                raise UserError(f"{self._database.url} holds a study {study.name!r} already") from None
            assert metadata["uid"] != study.metadata["uid"]
            for key, value in theirs.get_study_system_attrs(study.study_id).items():
                self._database.storage.set_study_system_attr(study_id, key, value)
            for key, value in theirs.get_study_user_attrs(study.study_id).items():
                self._database.storage.set_study_user_attr(study_id, key, value)
            trial_ids: dict[int | None, int | None] = {None: None}
            for trial in trials:
                trial_ids[trial._trial_id] = self._database.storage.create_new_trial(study_id, template_trial=trial)
                progress(trial.number + 1, len(trials))
            known = set(connection.execute(sa.select(workers_table.c.worker_id)).scalars())
            rows[workers_table] = [row for row in rows[workers_table] if row["worker_id"] not in known]
            for row in rows[studies_table]:
                row["metadata"] = json.dumps(dict(metadata))
            for row in rows[slots_table]:
                row["trial_id"] = trial_ids[row["trial_id"]]
            for row in rows[attempts_table] + rows[workers_table]:
                row["ended_at"] = row["ended_at"] or at
            for table, copied in rows.items():
                if copied:
                    connection.execute(table.insert(), [{**row, "study_id": study_id} for row in copied])
            return self._load(connection, study_id, study.name)

    def rows(self, table: sa.Table, study: StudyRecord) -> list[dict[str, Any]]:
        """Every row of one of our tables that belongs to a study."""
        with self._database.connect() as connection:
            query = select_all(table).where(table.c.study_id == study.study_id)
            return [dict(row) for row in connection.execute(query).mappings()]

    def request_stop(self, study: StudyRecord) -> None:
        """Every worker lets go of its trial at its next report and leaves."""
        with self._database.transaction() as connection:
            connection.execute(
                studies_table.update()
                .where(studies_table.c.study_id == study.study_id, studies_table.c.stop.is_(None))
                .values(stop="requested", stop_reason="hpo stop")
            )

    @retry_on_outage
    def is_stopping(self, study_id: int) -> bool:
        """Return whether the study was asked, or has itself decided, to stop."""
        with self._database.connect() as connection:
            query = sa.select(studies_table.c.stop).where(studies_table.c.study_id == study_id)
            return connection.execute(query).scalar_one() is not None

    def start(self, study: StudyRecord) -> None:
        """Takes back a stop, whatever its reason; failures are counted from now on."""
        with self._database.transaction() as connection:
            connection.execute(
                studies_table.update()
                .where(studies_table.c.study_id == study.study_id)
                .values(stop=None, stop_reason=None, started_at=self._database.now(connection))
            )

    def _names(self, connection: Connection) -> dict[int, str]:
        ours = set(connection.execute(sa.select(studies_table.c.study_id)).scalars())
        return {s._study_id: s.study_name for s in self._database.storage.get_all_studies() if s._study_id in ours}

    def _find_id(self, connection: Connection, name: str) -> int | None:
        return next((study_id for study_id, other in self._names(connection).items() if other == name), None)

    def _load(self, connection: Connection, study_id: int, name: str) -> StudyRecord:
        row = connection.execute(select_all(studies_table).where(studies_table.c.study_id == study_id)).one()
        try:
            settings, metadata = json.loads(row.spec), dict(json.loads(row.metadata))
        except (ValueError, TypeError) as error:
            raise UserError(f"study {name!r} in {self._database.url} is damaged: {error}") from None
        spec = StudySpec.from_dict(settings, source=f"study {name!r} in {self._database.url}")
        # Name and uid become part of a path: a store must not be able to name any folder of this machine.
        if spec.name != name or not re.fullmatch(r"[0-9a-f]{8}", str(metadata.get("uid"))):
            raise UserError(
                f"study {name!r} in {self._database.url} is damaged: its spec names it {spec.name!r}, its uid is "
                f"{metadata.get('uid')!r}"
            )
        return StudyRecord(study_id, name, spec, metadata, row.stop, row.stop_reason, row.started_at)

    @retry_on_outage
    def get_or_set_shared(self, study: StudyRecord, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """What holds for the study under this name from now on: `value`, or what an earlier caller gave."""
        name = f"{AGREEMENT}{key}"
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            known = self._database.storage.get_study_user_attrs(study.study_id)
            if name not in known:
                self._database.storage.set_study_user_attr(study.study_id, name, dict(value))
            return dict(known.get(name, value))

    @retry_on_outage
    def shared_values(self, study: StudyRecord) -> dict[str, Any]:
        """All that was agreed on, by name."""
        attributes = self._database.storage.get_study_user_attrs(study.study_id)
        return {key.removeprefix(AGREEMENT): attributes[key] for key in attributes if key.startswith(AGREEMENT)}

    def show(self, study: StudyRecord, figures: Mapping[str, str | None], *, note: str) -> None:
        """Has optuna-dashboard show these figures (title -> JSON of a Plotly figure) and this note with the study.

        In the place of those of the same titles, all of them or, where it raises, none; of two callers at once the
        later one's stay. None is nothing to show. They are kept as optuna-dashboard keeps them, but whole: its own
        functions cut them into pieces of 2,045 characters for MySQL, a transaction each, which another writer's pieces
        could come between.
        """
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            known = self._database.storage.get_study_system_attrs(study.study_id)
            wanted: dict[str, Any] = {f"{NOTE}str:0": note}
            for title, figure in figures.items():
                if figure is not None or f"{FIGURE}{title}:0" in known:
                    wanted[f"{FIGURE}{title}:0"] = figure or NO_FIGURE  # an attribute can be changed but not removed
            prefixes = (f"{NOTE}str:", *(f"{FIGURE}{title}:" for title in figures))
            wanted |= dict.fromkeys((key for key in known if key.startswith(prefixes) and key not in wanted), "")
            changed = {key: value for key, value in wanted.items() if known.get(key) != value}
            if changed:
                changed[f"{NOTE}ver"] = known.get(f"{NOTE}ver", 0) + 1
            for key, value in changed.items():
                self._database.storage.set_study_system_attr(study.study_id, key, value)
