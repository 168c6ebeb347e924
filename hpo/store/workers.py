"""The workers of a study in their database: registered, renewed, and reaped once they are gone."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.store.claiming import sign_on
from hpo.store.conditions import is_given_up, is_held, process_is_gone
from hpo.store.damage import refuse_damage
from hpo.store.database import Database, upsert
from hpo.store.ledger import LEASE_S, Ledger, storable_text
from hpo.store.racing import count_claimable
from hpo.store.retry import retry_on_outage
from hpo.store.schema import labelled, select_all, slots_table, studies_table, workers_table
from hpo.store.slots import lock_study
from hpo.study.processes import Cause, Process
from hpo.study.records import Claim, DeviceFailures, StudyRecord, WorkerRecord
from hpo.system import processes as liveness

MAX_DEVICE_FAILURES = 3  # of a device since the study was started, after which no worker tries it again
# Optuna's study attribute with the failures of devices, a list of dictionaries. It does not begin with the prefix of
# values that workers agree on, and optuna-dashboard shows it.
DEVICE_FAILURES = "hpo device failures"


class Workers:
    """The workers of the studies in a database. Every method may be called from any thread and any process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ledger = Ledger(database)
        self.retry = database.retry

    def add(self, study_id: int, *, device: str, host: str | None = None) -> str:
        """Register the calling process as a worker and return its id; `host` is by default the machine's name."""
        worker_id = uuid.uuid4().hex[:12]
        self._add(worker_id, study_id, device, host or socket.gethostname())
        return worker_id

    @retry_on_outage
    def _add(self, worker_id: str, study_id: int, device: str, host: str) -> None:
        with self._database.transaction() as connection:
            at = self._database.now(connection)
            row = {
                "worker_id": worker_id,
                "study_id": study_id,
                "host": host,
                "machine": liveness.machine_id(),
                "pid": os.getpid(),
                "pid_started": liveness.process_start_s(),
                "device": device,
                "started_at": at,
                "seen_at": at,
            }
            connection.execute(upsert(connection.dialect.name, workers_table, row, ["worker_id"]))

    @retry_on_outage
    def remove(self, worker_id: str) -> None:
        """Record that the worker has left."""
        with self._database.transaction() as connection:
            connection.execute(
                workers_table.update()
                .where(workers_table.c.worker_id == worker_id)
                .values(ended_at=self._database.clock)
            )

    def get_all(self, study: StudyRecord) -> list[WorkerRecord]:
        """Return the workers that have not left, with the time since each gave a sign of life."""
        with self._database.connect() as connection:
            at = self._database.now(connection)
            rows = connection.execute(_living(study.study_id)).all()
        refuse_damage(self._database.url, study.name, workers_table, rows)
        return [
            WorkerRecord(
                row.worker_id,
                row.host,
                row.pid,
                row.device,
                seen_s=at - row.seen_at,
                alive=not process_is_gone(row) and at - row.seen_at < LEASE_S,
            )
            for row in rows
        ]

    @retry_on_outage
    def in_training(self, study: StudyRecord) -> dict[Process, list[tuple[int, int]]]:
        """Return the numbers and attempts of the trials that each process has in training."""
        query = (
            sa.select(slots_table.c.number, slots_table.c.attempt, workers_table.c.machine, workers_table.c.pid)
            .join(workers_table, workers_table.c.worker_id == slots_table.c.worker_id)
            .where(slots_table.c.study_id == study.study_id, slots_table.c.state == "running")
            .order_by(slots_table.c.number)
        )
        found: dict[Process, list[tuple[int, int]]] = {}
        with self._database.connect() as connection:
            for row in connection.execute(query):
                found.setdefault((row.machine, row.pid), []).append((row.number, row.attempt))
        return found

    @retry_on_outage
    def num_claimable(self, study: StudyRecord) -> int:
        """Return how many trials wait for a worker."""
        with self._database.connect() as connection:
            return count_claimable(self._database, connection, study)

    def renew(self, claims: Sequence[Claim], worker_id: str) -> None:
        """Extend the leases of the claims that still hold their slots, and record that the worker lives.

        A worker that was taken for dead is among the living again.
        """
        with self._database.transaction() as connection:
            at = self._database.now(connection)
            connection.execute(sign_on(worker_id, at=at))
            for claim in sorted(claims, key=lambda claim: claim.number):
                connection.execute(slots_table.update().where(is_held(claim)).values(lease_until=at + LEASE_S))

    @retry_on_outage
    def reap(
        self, study: StudyRecord, *, dead: Mapping[Process, Cause] = {}, supervised: Collection[Process] = ()
    ) -> int:
        """Free the slots of workers that died or lost their lease, and return how many there were.

        A worker on this machine is looked up by its process. One elsewhere is given up when its lease has run out, or
        when its supervisor has seen it die. A worker that died by itself, or of SIGKILL, as a kernel without memory
        sends it, counts against the trials that it had, until they reach another epoch. The end of a whole machine, or
        of everything at once, does not count.

        Args:
            study: The study.
            dead: The workers that were seen to die, with the cause.
            supervised: The workers that are not looked up, because their supervisor will report their deaths. Looked
                up a moment before it does, a crash would count for nothing.

        Returns:
            The number of slots that were freed.

        Raises:
            UserError: A row of these slots or workers is damaged.
        """

        def is_dead(row: Any) -> bool:
            process = (row.machine, row.pid)
            return process in dead or (process not in supervised and process_is_gone(row))

        running = _running_slots(study.study_id)
        living = _living(study.study_id)
        with self._database.connect() as connection:  # asked often: no write lock if there is nothing to do
            at = self._database.now(connection)
            slots, workers = connection.execute(running).all(), connection.execute(living).all()
        refuse_damage(self._database.url, study.name, slots_table, slots)
        refuse_damage(self._database.url, study.name, workers_table, workers)
        if not any(is_dead(row) or is_given_up(row, at) for row in slots) and not any(map(is_dead, workers)):
            return 0
        with self._database.transaction() as connection:
            at = self._database.now(connection)
            # A slot that is locked is being reported on at this moment: its worker lives.
            rows = connection.execute(running.with_for_update(of=slots_table, skip_locked=True)).all()
            lost = [row for row in rows if is_dead(row) or is_given_up(row, at)]
            for row in lost:
                claim = Claim(row.study_id, row.number, row.attempt, row.trial_id, row.worker_id)
                cause = dead.get((row.machine, row.pid), "gone")
                self._ledger.give_back(connection, claim, cause, outcome="lost")
            for row in connection.execute(living).all():
                if is_dead(row):
                    is_worker = workers_table.c.worker_id == row.worker_id
                    connection.execute(workers_table.update().where(is_worker).values(ended_at=at))
            return len(lost)

    @retry_on_outage
    def count_device_failure(self, study: StudyRecord, *, device: str, host: str, reason: str) -> DeviceFailures:
        """Count a failure of a device of this machine, and return its failures since the study was started."""
        storage = self._database.storage
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            known = self._device_failures(connection, study)
            machine = liveness.machine_id()
            before = known.get((machine, device))
            failures = DeviceFailures(machine, host, device, before.count + 1 if before else 1, storable_text(reason))
            known[machine, device] = failures
            started = self._started(connection, study)
            rows = [{**asdict(one), "started": started} for one in known.values()]
            storage.set_study_user_attr(study.study_id, DEVICE_FAILURES, rows)
        return failures

    @retry_on_outage
    def device_failures(self, study: StudyRecord) -> dict[tuple[str, str], DeviceFailures]:
        """Return the failures of devices since the study was started, by machine and device."""
        with self._database.connect() as connection:
            return self._device_failures(connection, study)

    def _device_failures(self, connection: Connection, study: StudyRecord) -> dict[tuple[str, str], DeviceFailures]:
        attributes = self._database.storage.get_study_user_attrs(study.study_id)
        started = self._started(connection, study)
        failures = []
        with suppress(TypeError, AttributeError, KeyError):  # anybody can set attributes of a study, of any form
            for row in attributes.get(DEVICE_FAILURES, []):
                if row["started"] == started:
                    failures.append(DeviceFailures(**{key: row[key] for key in row if key != "started"}))
        return {(one.machine, one.device): one for one in failures}

    def _started(self, connection: Connection, study: StudyRecord) -> float:
        query = sa.select(studies_table.c.started_at).where(studies_table.c.study_id == study.study_id)
        return float(connection.execute(query).scalar_one())


def _living(study_id: int) -> sa.Select[Any]:
    """Return a query of the study's workers that have not left."""
    return select_all(workers_table).where(workers_table.c.study_id == study_id, workers_table.c.ended_at.is_(None))


def _running_slots(study_id: int) -> sa.Select[Any]:
    """Return a query of the study's slots in training, with what `is_given_up` and `process_is_gone` ask for."""
    worker = workers_table.c
    columns = (worker.machine, worker.pid, worker.pid_started, worker.ended_at.label("left"))
    return (
        sa.select(*labelled(slots_table), *columns)
        .outerjoin(workers_table, worker.worker_id == slots_table.c.worker_id)  # its row may be gone
        .where(slots_table.c.study_id == study_id, slots_table.c.state == "running")
    )
