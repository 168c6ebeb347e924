"""Trials that other programs add to a study with Optuna: enqueued ones are trained, all of them keep their numbers.

Optuna numbers the trials of a study in the order in which they are created, and slot n is Optuna's trial n. Slots that
nobody has claimed yet therefore move behind the trials of others.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from hpo.config.checks import check_point
from hpo.errors import UserError
from hpo.search import proposals
from hpo.store.conditions import StudyId, enqueued_trials
from hpo.store.database import Database, clock_of
from hpo.store.schema import optuna_trials, slots_table
from hpo.store.slots import drop_unclaimed, new_slot, num_enqueued
from hpo.study.records import StudyRecord

FIXED = "fixed_params"  # Optuna's system attribute with the values of an enqueued trial


class Queue(NamedTuple):
    """Where the slots that nobody has claimed stand among Optuna's trials."""

    now: float  # the seconds since 1970 by the database's clock
    num_enqueued: int  # without a slot
    first_unclaimed: int | None
    last_of_optuna: int  # the number of its last trial, or -1

    @property
    def is_in_order(self) -> bool:
        """Whether every trial that is enqueued has a slot, and the slots that nobody has claimed follow all trials."""
        return not self.num_enqueued and (self.first_unclaimed is None or self.first_unclaimed > self.last_of_optuna)


def select_queue(dialect_name: str, study_id: StudyId) -> sa.Select[Any]:
    """Return the query for the `Queue` of a study."""
    first = sa.select(sa.func.min(slots_table.c.number)).where(_is_unclaimed(study_id))
    last = sa.select(sa.func.max(optuna_trials.c.number)).where(optuna_trials.c.study_id == study_id)
    return sa.select(
        clock_of(dialect_name).label("now"),
        num_enqueued(study_id).label("num_enqueued"),
        first.scalar_subquery().label("first_unclaimed"),
        sa.func.coalesce(last.scalar_subquery(), -1).label("last_of_optuna"),
    )


def take_in(database: Database, connection: Connection, study: StudyRecord) -> None:
    """Add a slot for each enqueued trial, and move the slots that nobody has claimed behind all trials of Optuna's.

    The caller has locked the study. An enqueued trial that the study does not search fails with a sentence.
    """
    query = select_queue(connection.dialect.name, study.study_id)
    queue = Queue(*connection.execute(query).one())
    slots: list[dict[str, Any]] = []
    if queue.num_enqueued:
        waiting = enqueued_trials(study.study_id).with_for_update(of=optuna_trials)  # none is taken meanwhile
        enqueued = connection.execute(waiting).all()
        slots = [_slot_of(database, connection, study, row) for row in enqueued]
        if any(slot["state"] == "waiting" for slot in slots):
            drop_unclaimed(connection, study.study_id)  # a confirmation follows the last trial of the search
            queue = Queue(*connection.execute(query).one())
    if queue.first_unclaimed is not None and queue.first_unclaimed <= queue.last_of_optuna:
        _move_unclaimed(connection, study.study_id, distance=queue.last_of_optuna + 1 - queue.first_unclaimed)
    for slot in slots:
        connection.execute(slots_table.insert().values(slot))


def _slot_of(database: Database, connection: Connection, study: StudyRecord, row: Any) -> dict[str, Any]:
    """Return the slot of an enqueued trial: one that waits, or that has failed where the study does not search it."""
    fixed = database.storage.get_trial(row.trial_id).system_attrs.get(FIXED, {})
    values = proposals.values_from_optuna(fixed if isinstance(fixed, dict) else {FIXED: fixed})
    slot = {**new_slot(study.spec, {}), "study_id": study.study_id, "number": row.number, "trial_id": row.trial_id}
    try:
        check_point(study.spec.search, values, setting="enqueued")
    except UserError as error:
        database.storage.set_trial_state_values(row.trial_id, TrialState.FAIL)
        return slot | {"state": "failed", "reason": str(error), "ended_at": database.now(connection)}
    given = proposals.optuna_params(study.spec, values)
    database.storage.set_trial_system_attr(row.trial_id, FIXED, given)
    return slot | {"given": json.dumps(given)}


def begin_enqueued(database: Database, connection: Connection, row: Any) -> bool:
    """Begin the enqueued trial of a slot; delete the slot and return False where another program has begun it."""
    try:
        if database.storage.set_trial_state_values(row.trial_id, TrialState.RUNNING):
            return True
    except optuna.exceptions.UpdateFinishedTrialError:
        pass
    slot = (slots_table.c.study_id == row.study_id) & (slots_table.c.number == row.number)
    connection.execute(slots_table.delete().where(slot))
    return False


def _is_unclaimed(study_id: StudyId) -> sa.ColumnElement[bool]:
    return sa.and_(slots_table.c.study_id == study_id, slots_table.c.trial_id.is_(None))


def _move_unclaimed(connection: Connection, study_id: int, *, distance: int) -> None:
    # By way of negative numbers, because each number is one slot's at every moment.
    number, unclaimed = slots_table.c.number, _is_unclaimed(study_id)
    connection.execute(slots_table.update().where(unclaimed).values(number=-1 - number - distance))
    connection.execute(slots_table.update().where(unclaimed).values(number=-1 - number))
