"""The slots of a study, all together: added, counted, read, and what is to follow once all of them have ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search import proposals
from hpo.store.ledger import Ledger
from hpo.store.retry import retry_on_outage
from hpo.store.schema import attempts, epochs, slots, studies, workers
from hpo.study import stages
from hpo.study.processes import Process
from hpo.study.records import ENDED, Attempt, StudyRecord, TrialRecord, read_attempt, read_trial

_UNCLAIMED = {
    "kind": "search",
    "replicate": None,
    "tested": None,
    "state": "waiting",
    "attempt": 0,
    "furthest": 0,
    "losses": 0,
    "failures": 0,
    "alone": 0,
}


class SlotState(NamedTuple):
    """How far a slot has come."""

    number: int
    kind: str
    state: str


def new_slot(spec: StudySpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a slot that nobody has claimed, with these values given."""
    return {"given": json.dumps(proposals.optuna_params(spec, values)), **_UNCLAIMED}


class Slots(Ledger):
    """What a store does with all slots of a study at once."""

    @retry_on_outage
    def counts(self, study_id: int) -> dict[str, int]:
        """How many slots are in each state; states that no slot is in are left out."""
        with self._storage.engine.connect() as connection:
            query = (
                sa.select(slots.c.state, sa.func.count().label("num"))
                .where(slots.c.study_id == study_id)
                .group_by(slots.c.state)
            )
            return {row.state: row.num for row in connection.execute(query)}

    @retry_on_outage
    def num_epochs(self, study: StudyRecord) -> int:
        """How many epochs its trials have come to, all together."""
        with self._storage.engine.connect() as connection:
            query = sa.select(sa.func.sum(slots.c.furthest)).where(slots.c.study_id == study.study_id)
            return connection.execute(query).scalar_one() or 0

    @retry_on_outage
    def trials(self, study: StudyRecord) -> list[TrialRecord]:
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
            tries: dict[int, list[Attempt]] = {}
            query = sa.select(attempts, workers.c.host, workers.c.device).outerjoin(
                workers, workers.c.worker_id == attempts.c.worker_id
            )
            mine = attempts.c.study_id == study.study_id
            for row in connection.execute(query.where(mine).order_by(attempts.c.number, attempts.c.attempt)):
                tries.setdefault(row.number, []).append(read_attempt(row))
        for row in rows:  # a trial that has just been begun again has the epochs that it goes on from
            if row.state == "running" and latest.get(row.number) not in (None, row.attempt):
                kept = next((a.resumed_from or 0 for a in tries.get(row.number, []) if a.attempt == row.attempt), 0)
                reports[row.number] = [report for report in reports[row.number] if report[0] <= kept]
        frozen = {trial._trial_id: trial for trial in self._cached.get_all_trials(study.study_id, deepcopy=False)}
        return [
            read_trial(row, frozen.get(row.trial_id), reports.get(row.number, []), tries.get(row.number, []))
            for row in rows
        ]

    @retry_on_outage
    def in_training(self, study: StudyRecord) -> dict[Process, list[tuple[int, int]]]:
        """Which trials each process has in training: their numbers and attempts."""
        query = (
            sa.select(slots.c.number, slots.c.attempt, workers.c.machine, workers.c.pid)
            .join(workers, workers.c.worker_id == slots.c.worker_id)
            .where(slots.c.study_id == study.study_id, slots.c.state == "running")
            .order_by(slots.c.number)
        )
        found: dict[Process, list[tuple[int, int]]] = {}
        with self._storage.engine.connect() as connection:
            for row in connection.execute(query):
                found.setdefault((row.machine, row.pid), []).append((row.number, row.attempt))
        return found

    def _add_slots(self, connection: Connection, study_id: int, new: Sequence[Mapping[str, Any]]) -> None:
        """Adds slots after the last one that the study has."""
        last = connection.execute(sa.select(sa.func.max(slots.c.number)).where(slots.c.study_id == study_id)).scalar()
        first = 0 if last is None else last + 1
        rows = [{"study_id": study_id, "number": first + index, **slot} for index, slot in enumerate(new)]
        if rows:
            connection.execute(slots.insert(), rows)

    def _lock(self, connection: Connection, study_id: int) -> None:
        """Keeps others from claiming and from adding slots until the transaction ends."""
        connection.execute(sa.select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update())

    def _drop_unclaimed(self, connection: Connection, study_id: int) -> None:
        """Takes back what was to confirm and nobody has claimed: the last slots, as they are claimed in order."""
        mine = (slots.c.study_id == study_id) & (slots.c.kind != "search") & slots.c.trial_id.is_(None)
        connection.execute(slots.delete().where(mine))

    @retry_on_outage
    def stage_due(self, study: StudyRecord) -> str | None:
        """Return what follows the trials that the study has: "confirm", "test", or None while any of them is open."""
        return None if study.spec.confirm is None else stages.due(study, self._places(study))

    @retry_on_outage
    def add_planned(self, study: StudyRecord, planned: Sequence[stages.Planned], *, after: int) -> None:
        """Add the slots of these trials, unless the study has more than `after` slots: somebody else was first."""
        with self._transaction() as connection:
            self._lock(connection, study.study_id)
            if self._num_slots(connection, study) == after:
                new = [
                    new_slot(study.spec, one.params)
                    | {"kind": one.kind, "replicate": one.replicate, "tested": one.tested}
                    for one in planned
                ]
                self._add_slots(connection, study.study_id, new)

    @retry_on_outage
    def num_left(self, study: StudyRecord) -> int:
        """How many trials are to end yet, as far as that is known."""
        num_open = sum(count for state, count in self.counts(study.study_id).items() if state not in ENDED)
        return num_open or (stages.num_due(study, self._places(study)) if study.spec.confirm else 0)

    @retry_on_outage
    def most_at_once(self, study: StudyRecord) -> int:
        """How many trials may come to wait at the same time, now or later."""
        confirm_ = study.spec.confirm
        waiting = self.counts(study.study_id).get("waiting", 0)
        return max(waiting, confirm_.top * confirm_.seeds) if confirm_ and self.num_left(study) else waiting

    @retry_on_outage
    def untested(self, study: StudyRecord) -> set[int]:
        """The numbers of the trials whose networks the test set may yet be measured with."""
        return stages.untested(study, self._places(study)) if study.spec.confirm else set()

    def _places(self, study: StudyRecord) -> list[SlotState]:
        columns = (slots.c.number, slots.c.kind, slots.c.state)
        query = sa.select(*columns).where(slots.c.study_id == study.study_id).order_by(slots.c.number)
        with self._storage.engine.connect() as connection:
            return [SlotState(*row) for row in connection.execute(query)]

    def _num_slots(self, connection: Connection, study: StudyRecord, *, kind: str | None = None) -> int:
        query = sa.select(sa.func.count()).select_from(slots).where(slots.c.study_id == study.study_id)
        return connection.execute(query if kind is None else query.where(slots.c.kind == kind)).scalar_one()
