"""Claiming: which slot a worker is given, and the rows that give it to the worker."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Connection

from hpo.store.conditions import is_lost, is_slot, is_waiting, on_same_device
from hpo.store.enqueued import Queue, select_queue
from hpo.store.ledger import LEASE_S, MAX_TRIAL_CRASHES
from hpo.store.optuna_rows import TrialId, TrialRows, insert_trial, rows_of, set_rows, utc_now
from hpo.store.prepared import claim_values, execute_prepared, named_claim
from hpo.store.schema import attempts_table, rows_by_part, select_all, slots_table, union_of, workers_table
from hpo.study.records import Claim

FITS = slots_table.c.exclusive == 0
HARMLESS = FITS & (slots_table.c.crashes == 0)
USUAL = FITS & (slots_table.c.crashes < MAX_TRIAL_CRASHES)
EXCLUSIVE = slots_table.c.exclusive == 1


class Waiting(NamedTuple):
    """What a worker that has locked a study chooses a slot from."""

    queue: Queue
    neighbours: list[Any]  # the rows of the trials that are in training on its device, of any study
    suitable: list[Any]  # the rows of the slot that suits it, and of the one that does where it has its device alone

    def choose(self) -> Any | None:
        """Return the row of the slot that the worker should claim, or None where none suits it.

        A trial that keeps killing workers is claimed after those that do not, so that it does not keep the study from
        them, and never alongside others, which would pay for it. One that ran out of memory is claimed last, and only
        by a worker that has its device to itself; no other worker then claims a trial on that device.
        """
        neighbours = [row for row in self.neighbours if not is_lost(row, self.queue.now)]
        if any(row.exclusive for row in neighbours):
            return None
        usual = (row for row in self.suitable if not (row.exclusive and neighbours))
        return min(usual, key=lambda row: row.exclusive, default=None)


def read_waiting(
    connection: Connection,
    study_id: int,
    worker_id: str,
    *,
    num_held: int,
    last_seed: int | None = None,
    without: Collection[int] = (),
) -> Waiting:
    """Return what a worker that holds `num_held` trials chooses a slot from, read by one statement.

    Of the slots that confirm, only the seeds up to `last_seed` are in turn. The numbers in `without` are not to be
    claimed.
    """
    values = {"of_study_id": study_id, "of_worker_id": worker_id, "last_seed": last_seed, "without": list(without)}
    shape = (num_held > 0, last_seed is not None, bool(without))
    rows = rows_by_part(execute_prepared(connection, build_waiting, values, *shape))
    (last,) = rows["queue"]
    queue = Queue(*(getattr(last, name) for name in Queue._fields))
    return Waiting(queue, rows["neighbour"], rows["suitable"])


def build_waiting(dialect_name: str, holds_others: bool, has_last_seed: bool, has_without: bool) -> list[Any]:
    """Return the statement of `read_waiting`."""
    slots, study_id = slots_table.c, sa.bindparam("of_study_id", type_=sa.Integer)
    waiting = sa.select(slots.number).where(is_waiting(study_id)).order_by(slots.number).limit(1)
    if has_without:
        waiting = waiting.where(slots.number.not_in(sa.bindparam("without", expanding=True)))
    if has_last_seed:
        waiting = waiting.where((slots.kind != "confirm") | (slots.replicate <= sa.bindparam("last_seed")))

    def first(condition: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:  # which an index gives: nothing is sorted
        return waiting.where(condition).scalar_subquery()

    numbers = [first(HARMLESS)] if holds_others else [sa.func.coalesce(first(USUAL), first(FITS)), first(EXCLUSIVE)]
    suitable = select_all(slots_table).where(slots.study_id == study_id, slots.number.in_(numbers))
    neighbours = on_same_device(sa.bindparam("of_worker_id", type_=sa.String))
    queue = select_queue(dialect_name, study_id)
    return [union_of({"suitable": suitable, "neighbour": neighbours, "queue": queue})]


def take_slot(connection: Connection, row: Any, queue: Queue, new: FrozenTrial | None, *, worker_id: str) -> Claim:
    """Give the slot of `row` to the worker under a new lease, and add the row of its attempt and, if any, its trial."""
    assert new is None or row.number == queue.last_of_optuna + 1, "slot n is trial n of Optuna's study"
    claim = Claim(
        row.study_id,
        row.number,
        row.attempt + 1,
        row.trial_id,
        worker_id,
        is_suspect=row.crashes > 0,
        kind=row.kind,
        replicate=row.replicate,
        tested=row.tested,
    )
    rows = TrialRows([], [], []) if new is None else rows_of(new)
    values = rows.values | claim_values("of", claim)
    values |= {"now": queue.now, "until": queue.now + LEASE_S, "epochs": row.last_epoch}
    values |= {"new_number": queue.last_of_optuna + 1, "utc": utc_now()}
    if new is not None and connection.dialect.name == "sqlite":
        values["of_trial_id"] = execute_prepared(connection, build_trial, values).scalar_one()
    taken = execute_prepared(connection, build_taking, values, new is not None, *rows.shape)
    return replace(claim, trial_id=taken.scalar_one())


def build_taking(dialect_name: str, is_new: bool, *shape: int) -> list[Any]:
    """Return the statements of `take_slot`; Postgres adds the trial with them, SQLite has done so before."""
    trial_id: TrialId = sa.bindparam("of_trial_id", type_=sa.Integer)
    if is_new and dialect_name != "sqlite":
        trial_id = sa.select(insert_trial().cte("new_trial").c.trial_id).scalar_subquery()
    claim, now = named_claim("of"), sa.bindparam("now", type_=sa.Float)
    begun = {"study_id": claim.study_id, "number": claim.number, "attempt": claim.attempt, "began_at": now}
    taken = {"state": "running", "attempt": claim.attempt, "trial_id": trial_id, "claimed_at": now}
    ours = {"worker_id": claim.worker_id}
    update = slots_table.update().where(is_slot(claim)).values({**taken, **ours, "lease_until": sa.bindparam("until")})
    return [
        *set_rows(dialect_name, trial_id, *shape),
        attempts_table.insert().values({**begun, **ours, "last_epoch": sa.bindparam("epochs")}),
        sign_on(claim.worker_id, at=now),
        update.returning(slots_table.c.trial_id),
    ]


def build_trial(dialect_name: str) -> list[Any]:
    """Return the statement that adds a trial of Optuna's."""
    return [insert_trial()]


def sign_on(worker_id: str, *, at: float | sa.BindParameter[float]) -> sa.Update:
    """Return the statement that records that the worker lives, whoever has taken it for dead.

    Only a living one claims and renews.
    """
    is_worker = workers_table.c.worker_id == worker_id
    return workers_table.update().where(is_worker).values(seen_at=at, ended_at=None)
