"""Which rows of our tables a claim or a worker means, as conditions and queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from hpo.store.schema import attempts_table, slots_table, workers_table
from hpo.system import processes as liveness

if TYPE_CHECKING:
    from hpo.study.records import Claim


def is_slot(claim: Claim) -> sa.ColumnElement[bool]:
    """The slot of the claim, whoever has it."""
    return sa.and_(slots_table.c.study_id == claim.study_id, slots_table.c.number == claim.number)


def is_attempt(claim: Claim) -> sa.ColumnElement[bool]:
    """The row of the claim's attempt."""
    return sa.and_(
        attempts_table.c.study_id == claim.study_id,
        attempts_table.c.number == claim.number,
        attempts_table.c.attempt == claim.attempt,
    )


def is_held(claim: Claim) -> sa.ColumnElement[bool]:
    """The slot of the claim, where that still holds it."""
    return sa.and_(
        is_slot(claim),
        slots_table.c.attempt == claim.attempt,
        slots_table.c.worker_id == claim.worker_id,
        slots_table.c.state == "running",
    )


def on_same_device(worker_id: str) -> sa.Select[Any]:
    """The trials, of whatever study, that are in training on this worker's device, with what tells if that is true."""
    mine, other = workers_table.alias("mine"), workers_table.alias("other")
    columns = (other.c.machine, other.c.pid, other.c.pid_started, other.c.ended_at.label("left"))
    return (
        sa.select(slots_table.c.exclusive.label("exclusive"), slots_table.c.lease_until, *columns)
        .join(other, sa.and_(other.c.worker_id == slots_table.c.worker_id, other.c.study_id == slots_table.c.study_id))
        .join(mine, sa.and_(mine.c.machine == other.c.machine, mine.c.device == other.c.device))
        .where(mine.c.worker_id == worker_id, slots_table.c.state == "running")
    )


def process_is_gone(worker: Any) -> bool:
    """Whether a row of hpo_workers is of a process of this machine that no longer runs; elsewhere a lease must tell."""
    here = worker.machine == liveness.machine_id()
    return here and not liveness.is_running(worker.pid, started=worker.pid_started)


def is_lost(row: Any, at: float) -> bool:
    return row.lease_until < at or row.left is not None or process_is_gone(row)
