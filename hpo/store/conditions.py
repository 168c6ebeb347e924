"""Conditions on our tables: the rows of a claim or a worker, and whether a row is of a worker that is gone."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.store.damage import is_number
from hpo.store.schema import attempts_table, optuna_trials, slots_table, workers_table
from hpo.system import processes as liveness

if TYPE_CHECKING:
    from hpo.study.records import Claim

StudyId = int | sa.BindParameter[int]  # given now, or when the statement is executed


def is_slot(claim: Claim) -> sa.ColumnElement[bool]:
    """Return the condition for the slot of the claim, whoever holds it."""
    return sa.and_(slots_table.c.study_id == claim.study_id, slots_table.c.number == claim.number)


def is_attempt(claim: Claim) -> sa.ColumnElement[bool]:
    """Return the condition for the row of the claim's attempt."""
    return sa.and_(
        attempts_table.c.study_id == claim.study_id,
        attempts_table.c.number == claim.number,
        attempts_table.c.attempt == claim.attempt,
    )


def is_held(claim: Claim) -> sa.ColumnElement[bool]:
    """Return the condition for the slot of the claim, as long as the claim holds it."""
    return sa.and_(
        is_slot(claim),
        slots_table.c.attempt == claim.attempt,
        slots_table.c.worker_id == claim.worker_id,
        slots_table.c.state == "running",
    )


def is_waiting(study_id: StudyId, *, without: Collection[int] = ()) -> sa.ColumnElement[bool]:
    """Return the condition for the slots of a study that wait for a worker, without those of some numbers."""
    is_of_study = (slots_table.c.study_id == study_id) & (slots_table.c.state == "waiting")
    return is_of_study & slots_table.c.number.not_in(without) if without else is_of_study


def enqueued_trials(study_id: StudyId) -> sa.Select[Any]:
    """Return a query of the trials that other programs have enqueued in the Optuna study and that have no slot yet."""
    return (
        sa.select(optuna_trials.c.trial_id, optuna_trials.c.number)
        .outerjoin(slots_table, slots_table.c.trial_id == optuna_trials.c.trial_id)
        .where(optuna_trials.c.study_id == study_id, optuna_trials.c.state == TrialState.WAITING)
        .where(slots_table.c.number.is_(None))
        .order_by(optuna_trials.c.number)
    )


def on_same_device(worker_id: str | sa.BindParameter[str]) -> sa.Select[Any]:
    """Return a query of the trials in training on this worker's device, of any study, for `is_lost` to judge."""
    mine, other = workers_table.alias("mine"), workers_table.alias("other")
    columns = (other.c.machine, other.c.pid, other.c.pid_started, other.c.ended_at.label("left"))
    return (
        sa.select(slots_table.c.exclusive.label("exclusive"), slots_table.c.lease_until, *columns)
        .join(other, sa.and_(other.c.worker_id == slots_table.c.worker_id, other.c.study_id == slots_table.c.study_id))
        .join(mine, sa.and_(mine.c.machine == other.c.machine, mine.c.device == other.c.device))
        .where(mine.c.worker_id == worker_id, slots_table.c.state == "running")
    )


def process_is_gone(worker: Any) -> bool:
    """Return whether a row of hpo_workers is of a process of this machine that has ended.

    Elsewhere, and where the row is damaged, a lease tells.
    """
    is_here = worker.machine == liveness.machine_id() and type(worker.pid) is int and is_number(worker.pid_started)
    return is_here and not liveness.is_running(worker.pid, started=worker.pid_started)


def is_lost(row: Any, at: float) -> bool:
    """Return whether a running slot has lost its worker: its lease is over, or the worker has left or ended."""
    return is_given_up(row, at) or process_is_gone(row)


def is_given_up(row: Any, at: float) -> bool:
    """Return whether a running slot's lease is over, or damaged, or its worker has left."""
    return not is_number(row.lease_until) or row.lease_until < at or row.left is not None
