"""Claiming: which slot a worker is given, and the rows that give it to the worker."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.store.conditions import is_lost, is_slot, on_same_device
from hpo.store.database import execute_together
from hpo.store.ledger import LEASE_S, MAX_TRIAL_CRASHES
from hpo.store.schema import attempts_table, select_all, slots_table, workers_table
from hpo.study.records import Claim


def choose_slot(
    connection: Connection,
    study_id: int,
    worker_id: str,
    *,
    num_held: int,
    at: float,
    last_seed: int | None = None,
    without: Collection[int] = (),
) -> Any | None:
    """Return the row of the waiting slot that the worker should claim, or None where none suits it.

    Of those that confirm, only the seeds up to `last_seed` are in turn. The numbers in `without` are not to be claimed.

    A trial that keeps killing workers is claimed after those that do not, so that it does not keep the study from them,
    and never alongside others, which would pay for it. One that ran out of memory is claimed last, and only by a worker
    that has its device to itself; no other worker then claims a trial on that device.
    """
    neighbours = [row for row in connection.execute(on_same_device(worker_id)) if not is_lost(row, at)]
    if any(row.exclusive for row in neighbours):
        return None
    waiting = select_all(slots_table).where(slots_table.c.study_id == study_id, slots_table.c.state == "waiting")
    waiting = waiting.where(slots_table.c.number.not_in(without))
    if last_seed is not None:
        waiting = waiting.where((slots_table.c.kind != "confirm") | (slots_table.c.replicate <= last_seed))
    fits = slots_table.c.exclusive == 0
    kinds: list[sa.ColumnElement[bool]]
    if num_held:
        kinds = [fits & (slots_table.c.crashes == 0)]
    else:
        kinds = [fits & (slots_table.c.crashes < MAX_TRIAL_CRASHES), fits]
        if not neighbours:
            kinds.append(slots_table.c.exclusive == 1)
    # One after the other, not one ORDER BY, so that the index gives the first at once and nothing is sorted.
    for kind in kinds:
        row = connection.execute(waiting.where(kind).order_by(slots_table.c.number).limit(1)).first()
        if row is not None:
            return row
    return None


def take_slot(
    connection: Connection, row: Any, *, trial_id: int, worker_id: str, at: float, beside: Sequence[sa.Insert] = ()
) -> Claim:
    """Give the slot of `row` to the worker under a new lease, and add the row of its attempt.

    Execute the statements `beside` together with these.
    """
    claim = Claim(
        row.study_id,
        row.number,
        row.attempt + 1,
        trial_id,
        worker_id,
        is_suspect=row.crashes > 0,
        kind=row.kind,
        replicate=row.replicate,
        tested=row.tested,
    )
    taken = {
        "state": "running",
        "attempt": claim.attempt,
        "trial_id": trial_id,
        "worker_id": worker_id,
        "claimed_at": at,
        "lease_until": at + LEASE_S,
    }
    attempt = {
        "study_id": claim.study_id,
        "number": claim.number,
        "attempt": claim.attempt,
        "worker_id": worker_id,
        "began_at": at,
        "last_epoch": row.last_epoch,
    }
    execute_together(
        connection,
        *beside,
        attempts_table.insert().values(attempt),
        sign_on(worker_id, at=at),
        slots_table.update().where(is_slot(claim)).values(taken),
    )
    return claim


def sign_on(worker_id: str, *, at: float) -> sa.Update:
    """Return the statement that records that the worker lives, whoever has taken it for dead.

    Only a living one claims and renews.
    """
    is_worker = workers_table.c.worker_id == worker_id
    return workers_table.update().where(is_worker).values(seen_at=at, ended_at=None)
