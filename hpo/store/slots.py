"""The slots of a study all together: added, counted, taken back while nobody has claimed them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search import proposals
from hpo.store.database import Database
from hpo.store.schema import slots_table, studies_table

UNCLAIMED = {
    "kind": "search",
    "replicate": None,
    "tested": None,
    "state": "waiting",
    "attempt": 0,
    "last_epoch": 0,
    "crashes": 0,
    "failures": 0,
    "exclusive": 0,
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


def num_slots(connection: Connection, study_id: int, *, kind: str | None = None) -> int:
    """Return how many slots the study has, of one kind or of all."""
    query = sa.select(sa.func.count()).select_from(slots_table).where(slots_table.c.study_id == study_id)
    return connection.execute(query if kind is None else query.where(slots_table.c.kind == kind)).scalar_one()


def slot_states(database: Database, study_id: int) -> list[SlotState]:
    """Return how far each slot of the study has come, in order."""
    columns = (slots_table.c.number, slots_table.c.kind, slots_table.c.state)
    query = sa.select(*columns).where(slots_table.c.study_id == study_id).order_by(slots_table.c.number)
    with database.connect() as connection:
        return [SlotState(*row) for row in connection.execute(query)]
