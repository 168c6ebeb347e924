"""Studies in their database: created, joined, enlarged, stopped, and read; the life of their slots is in the ledger."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.study import StudyDirection
from sqlalchemy.engine import Connection

from hpo import liveness, search
from hpo.database import database_path, epochs, now, slots, studies, workers
from hpo.errors import UserError
from hpo.ledger import LEASE_S, Ledger, is_gone
from hpo.records import Study, Trial, WorkerRow, read_trial
from hpo.spec import StudySpec

MAX_DIFFERENCES = 8  # that are named where a spec does not fit a study
_UNCLAIMED = {"state": "waiting", "attempt": 0, "furthest": 0, "losses": 0}


class Store(Ledger):
    """A database of studies: their creation, their workers, and what there is to read of them."""

    def folder(self, study: Study) -> Path:
        """Where a study's logs and its trials' own files go: beside the database.

        No other study has it, not even one of the same name in another database, or after this one was deleted: a
        user's loop must never go on from a stranger's checkpoint.
        """
        return database_path(self.url).parent / "hpo_files" / f"{study.name}-{study.facts['uid']}"

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        """The Optuna storage, for Optuna's own tools."""
        return self._storage

    # Studies

    def create_study(self, spec: StudySpec, *, facts: Mapping[str, Any]) -> Study:
        """Creates the study with its slots, or joins the one of that name; a larger `search.trials` enlarges it.

        Raises UserError where the spec, or what the preflight found (`facts`), differs from the study's in anything
        that would change a result.
        """
        with self._transaction() as connection:
            study_id = self._find_id(connection, spec.name)
            if study_id is None:
                study_id = self._insert_study(connection, spec, json.dumps({**facts, "uid": uuid.uuid4().hex[:8]}))
            else:
                study = self._load(connection, study_id, spec.name)
                self.check_joins(study, spec, facts=facts)
                self._save(connection, study, spec, trials=spec.num_trials)
            return self._load(connection, study_id, spec.name)

    def check_joins(self, study: Study, spec: StudySpec, *, facts: Mapping[str, Any]) -> None:
        """Raises UserError, with the differences, where trials of this spec do not belong into the study."""
        differences = study.spec.differences(spec) + [
            f"{name} is {study.facts[name]} in the study, {value} here"
            for name, value in facts.items()
            if name in study.facts and study.facts[name] != value and name != "code_folder"
        ]
        if differences:
            raise UserError(
                f"study {spec.name!r} exists in {self.url} with other settings; give this one another name, "
                "or undo: "
                + "; ".join(differences[:MAX_DIFFERENCES])
                + (f"; and {len(differences) - MAX_DIFFERENCES} more" if len(differences) > MAX_DIFFERENCES else "")
            )

    def _insert_study(self, connection: Connection, spec: StudySpec, facts: str) -> int:
        direction = StudyDirection.MAXIMIZE if spec.direction == "maximize" else StudyDirection.MINIMIZE
        try:
            study_id = self._storage.create_new_study([direction], spec.name)
        except optuna.exceptions.DuplicatedStudyError:
            raise UserError(
                f"{self.url} holds a study {spec.name!r} that hpo did not make; choose another name"
            ) from None
        optuna.load_study(study_name=spec.name, storage=self._storage).set_metric_names([spec.metric])
        created = now(connection)
        connection.execute(
            studies.insert().values(
                study_id=study_id,
                spec=json.dumps(spec.frozen()),
                facts=facts,
                created_at=created,
                started_at=created,
            )
        )
        given = [json.dumps(search.optuna_params(spec, values)) for values in search.slots(spec)]
        self._insert_slots(connection, study_id, range(len(given)), given)
        return study_id

    def _insert_slots(self, connection: Connection, study_id: int, numbers: range, given: Sequence[str]) -> None:
        rows = [
            {"study_id": study_id, "number": number, "given": values, **_UNCLAIMED}
            for number, values in zip(numbers, given, strict=True)
        ]
        if rows:
            connection.execute(slots.insert(), rows)

    def study(self, name: str) -> Study:
        """The study of this name. Raises UserError, listing those that exist, where there is none."""
        with self._storage.engine.connect() as connection:
            study_id = self._find_id(connection, name)
            if study_id is None:
                names = ", ".join(sorted(self._names(connection).values())) or "none"
                raise UserError(f"there is no study {name!r} in {self.url}; there are: {names}")
            return self._load(connection, study_id, name)

    def studies(self) -> list[Study]:
        with self._storage.engine.connect() as connection:
            return [self._load(connection, study_id, name) for study_id, name in self._names(connection).items()]

    def enlarge(self, study: Study, trials: int) -> None:
        """Gives the study a budget of `trials`; what was trained stays. Raises UserError for a grid or for fewer."""
        if study.spec.search.sampler == "grid":
            raise UserError(f"--trials cannot enlarge a grid; study {study.name!r} has {study.spec.num_trials} points")
        with self._transaction() as connection:
            if trials < (count := self._num_slots(connection, study)):
                raise UserError(f"--trials must be at least {count}, which study {study.name!r} has, got {trials}")
            self._save(connection, study, study.spec, trials=trials)

    def _save(self, connection: Connection, study: Study, spec: StudySpec, *, trials: int) -> None:
        """Makes `spec` the study's, with a budget of `trials` or what it has already."""
        count = self._num_slots(connection, study)
        self._insert_slots(connection, study.study_id, range(count, trials), ["{}"] * (trials - count))
        frozen = spec.frozen()
        if spec.search.sampler != "grid":
            frozen["search"]["trials"] = max(trials, count)
        connection.execute(studies.update().where(studies.c.study_id == study.study_id).values(spec=json.dumps(frozen)))

    def _num_slots(self, connection: Connection, study: Study) -> int:
        query = sa.select(sa.func.count()).select_from(slots).where(slots.c.study_id == study.study_id)
        return connection.execute(query).scalar_one()

    def request_stop(self, study: Study) -> None:
        """Every worker lets go of its trial at its next report and leaves."""
        with self._transaction() as connection:
            connection.execute(
                studies.update()
                .where(studies.c.study_id == study.study_id, studies.c.stop.is_(None))
                .values(stop="requested", stop_reason="hpo stop")
            )

    def start(self, study: Study) -> None:
        """Takes back a stop, whatever its reason; failures are counted from now on."""
        with self._transaction() as connection:
            connection.execute(
                studies.update()
                .where(studies.c.study_id == study.study_id)
                .values(stop=None, stop_reason=None, started_at=now(connection))
            )

    def _names(self, connection: Connection) -> dict[int, str]:
        ours = set(connection.execute(sa.select(studies.c.study_id)).scalars())
        return {s._study_id: s.study_name for s in self._storage.get_all_studies() if s._study_id in ours}

    def _find_id(self, connection: Connection, name: str) -> int | None:
        return next((study_id for study_id, other in self._names(connection).items() if other == name), None)

    def _load(self, connection: Connection, study_id: int, name: str) -> Study:
        row = connection.execute(sa.select(studies).where(studies.c.study_id == study_id)).one()
        spec = StudySpec.from_dict(json.loads(row.spec), source=f"study {name!r} in {self.url}")
        return Study(study_id, name, spec, json.loads(row.facts), row.stop, row.stop_reason)

    # Workers

    def add_worker(self, study_id: int, *, device: str) -> str:
        """Registers the calling process as a worker and returns its id."""
        worker_id = uuid.uuid4().hex[:12]
        with self._transaction() as connection:
            at = now(connection)
            connection.execute(
                workers.insert().values(
                    worker_id=worker_id,
                    study_id=study_id,
                    host=socket.gethostname(),
                    machine=liveness.machine(),
                    pid=os.getpid(),
                    pid_started=liveness.process_started(),
                    device=device,
                    started_at=at,
                    seen_at=at,
                )
            )
        return worker_id

    def remove_worker(self, worker_id: str) -> None:
        with self._transaction() as connection:
            connection.execute(
                workers.update().where(workers.c.worker_id == worker_id).values(ended_at=now(connection))
            )

    def workers(self, study: Study) -> list[WorkerRow]:
        """The workers that have not left, with how long ago each gave a sign of life."""
        with self._storage.engine.connect() as connection:
            at = now(connection)
            rows = connection.execute(
                sa.select(workers).where(workers.c.study_id == study.study_id, workers.c.ended_at.is_(None))
            )
            return [
                WorkerRow(
                    row.worker_id, row.host, row.pid, row.device, at - row.seen_at,
                    alive=not is_gone(row) and at - row.seen_at < LEASE_S,
                )
                for row in rows.all()
            ]  # fmt: skip

    def counts(self, study_id: int) -> dict[str, int]:
        """How many slots are in each state; states that no slot is in are left out."""
        with self._storage.engine.connect() as connection:
            query = (
                sa.select(slots.c.state, sa.func.count().label("num"))
                .where(slots.c.study_id == study_id)
                .group_by(slots.c.state)
            )
            return {row.state: row.num for row in connection.execute(query)}

    def trials(self, study: Study) -> list[Trial]:
        """Every slot of the study with what is known of it, in order."""
        with self._storage.engine.connect() as connection:
            rows = connection.execute(
                sa.select(slots).where(slots.c.study_id == study.study_id).order_by(slots.c.number)
            ).all()
            reports: dict[int, list[tuple[int, dict[str, float | None]]]] = {}
            latest: dict[int, int] = {}  # the attempt that reported last
            for row in connection.execute(
                sa.select(epochs).where(epochs.c.study_id == study.study_id).order_by(epochs.c.number, epochs.c.epoch)
            ):
                reports.setdefault(row.number, []).append((row.epoch, json.loads(row.metrics)))
                latest[row.number] = row.attempt
        for row in rows:  # a trial that has just been begun again has no epoch yet, whatever was reported before
            if row.state == "running" and latest.get(row.number) != row.attempt:
                reports.pop(row.number, None)
        frozen = {trial._trial_id: trial for trial in self._cached.get_all_trials(study.study_id, deepcopy=False)}
        return [read_trial(row, frozen.get(row.trial_id), reports.get(row.number, [])) for row in rows]
