"""The slots of a study all together: added, counted, taken back while nobody has claimed them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search import proposals
from hpo.store.conditions import StudyId, enqueued_trials, is_waiting
from hpo.store.damage import refuse_damage
from hpo.store.database import Database
from hpo.store.reading import study_names
from hpo.store.schema import optuna_trials, select_all, slots_table, studies_table
from hpo.study.records import KINDS, STATES

# Of a slot at which nothing has failed yet.
FRESH = {
    "crashes": 0,
    "failures": 0,
    "exclusive": 0,
    "ended_at": None,
    "reason": None,
    "error": None,
    "failure_key": None,
}
UNCLAIMED = {
    "kind": "search",
    "replicate": None,
    "tested": None,
    "state": "waiting",
    "attempt": 0,
    "last_epoch": 0,
    **FRESH,
}


class SlotState(NamedTuple):
    """How far a slot has come."""

    number: int
    kind: str
    state: str


def new_slot(spec: StudySpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a slot that nobody has claimed, for a trial with these values given."""
    return {"given": json.dumps(proposals.optuna_params(spec, values)), **UNCLAIMED}


def add_slots(connection: Connection, study_id: int, new: Sequence[Mapping[str, Any]]) -> None:
    """Add slots after the last one that the study has."""
    numbers = sa.select(sa.func.max(slots_table.c.number)).where(slots_table.c.study_id == study_id)
    last = connection.execute(numbers).scalar()
    first = 0 if last is None else last + 1
    rows = [{"study_id": study_id, "number": first + index, **slot} for index, slot in enumerate(new)]
    if rows:
        connection.execute(slots_table.insert(), rows)


def lock_study(connection: Connection, study_id: int) -> None:
    """Keep others from claiming and from adding slots until the transaction ends."""
    query = sa.select(studies_table.c.study_id).where(studies_table.c.study_id == study_id)
    connection.execute(query.with_for_update())


def drop_unclaimed(connection: Connection, study_id: int) -> None:
    """Delete the slots that should confirm and that nobody has claimed; they are the last, as claims go in order."""
    is_of_search = slots_table.c.kind == "search"
    is_unclaimed = slots_table.c.trial_id.is_(None)
    connection.execute(slots_table.delete().where(slots_table.c.study_id == study_id, ~is_of_search, is_unclaimed))


def num_slots(connection: Connection, study_id: int, **columns: str) -> int:
    """Return how many slots of the study have these values in these columns."""
    query = sa.select(sa.func.count()).select_from(slots_table).where(slots_table.c.study_id == study_id)
    return connection.execute(query.filter_by(**columns)).scalar_one()


def num_enqueued(study_id: StudyId) -> sa.ScalarSelect[int]:
    """Return the part of a query that counts the trials that `enqueued_trials` finds."""
    return sa.select(sa.func.count()).select_from(enqueued_trials(study_id).subquery()).scalar_subquery()


def num_waiting(connection: Connection, study_id: int, *, without: Collection[int]) -> int:
    """Return how many slots wait, without those of some numbers, and enqueued trials, as of one instant."""
    slots = sa.select(sa.func.count()).select_from(slots_table).where(is_waiting(study_id, without=without))
    return int(connection.execute(sa.select(slots.scalar_subquery() + num_enqueued(study_id))).scalar_one())


def slot_states(database: Database, study_id: int) -> list[SlotState]:
    """Return how far each slot of the study has come, in order, then the enqueued trials, which will have one."""
    columns = (slots_table.c.number, slots_table.c.kind, slots_table.c.state)
    query = sa.select(*columns).where(slots_table.c.study_id == study_id).order_by(slots_table.c.number)
    with database.connect() as connection:  # enqueued ones first: rather one twice than one that nobody sees
        enqueued = [SlotState(row.number, "search", "waiting") for row in connection.execute(enqueued_trials(study_id))]
        slots = [SlotState(*row) for row in connection.execute(query)]
        if not all(type(slot.number) is int and slot.kind in KINDS and slot.state in STATES for slot in slots):
            _refuse_damaged_slots(database, connection, study_id)
    return slots + enqueued


def count_slots(database: Database, study_id: int) -> dict[str, int]:
    """Return how many slots are in each state, without the states that none is in; enqueued trials wait."""
    with database.connect() as connection:
        # First: rather one twice than one that nobody sees.
        enqueued = connection.execute(sa.select(num_enqueued(study_id))).scalar_one()
        counts = _count_states(connection, slots_table.c.study_id == study_id).get(study_id, {})
        if not counts.keys() <= set(STATES):
            _refuse_damaged_slots(database, connection, study_id)
    return counts | ({"waiting": counts.get("waiting", 0) + enqueued} if enqueued else {})


def count_all_slots(database: Database, study_ids: Collection[int]) -> dict[int, dict[str, int] | UserError]:
    """Return what `count_slots` returns of each study, or raises."""
    with database.connect() as connection:
        waiting = sa.select(optuna_trials.c.study_id).where(optuna_trials.c.state == TrialState.WAITING).distinct()
        one_by_one = set(connection.execute(waiting).scalars())
        counts = _count_states(connection, sa.true())
    found: dict[int, dict[str, int] | UserError] = {}
    for study_id in study_ids:
        found[study_id] = counts.get(study_id, {})
        if study_id in one_by_one or not counts.get(study_id, {}).keys() <= set(STATES):
            try:
                found[study_id] = count_slots(database, study_id)
            except UserError as error:
                found[study_id] = error
    return found


def _count_states(connection: Connection, condition: sa.ColumnElement[bool]) -> dict[int, dict[str, int]]:
    """Return how many slots are in each state, by study."""
    query = sa.select(slots_table.c.study_id, slots_table.c.state, sa.func.count().label("num")).where(condition)
    counts: dict[int, dict[str, int]] = {}
    for row in connection.execute(query.group_by(slots_table.c.study_id, slots_table.c.state)):
        counts.setdefault(row.study_id, {})[row.state] = row.num
    return counts


def _refuse_damaged_slots(database: Database, connection: Connection, study_id: int) -> None:
    """Raise UserError where a slot of the study is damaged."""
    rows = connection.execute(select_all(slots_table).where(slots_table.c.study_id == study_id)).all()
    name = study_names(database, connection).get(study_id, f"with the id {study_id}")
    refuse_damage(database.url, name, slots_table, rows)
