"""The rows of slots that nobody has claimed: made, counted and taken back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search import proposals
from hpo.store.schema import slots_table, studies_table

_UNCLAIMED = {
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


def new_slot(spec: StudySpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a slot that nobody has claimed, with these values given."""
    return {"given": json.dumps(proposals.optuna_params(spec, values)), **_UNCLAIMED}


def add_slots(connection: Connection, study_id: int, new: Sequence[Mapping[str, Any]]) -> None:
    """Adds slots after the last one that the study has."""
    last = connection.execute(
        sa.select(sa.func.max(slots_table.c.number)).where(slots_table.c.study_id == study_id)
    ).scalar()
    first = 0 if last is None else last + 1
    rows = [{"study_id": study_id, "number": first + index, **slot} for index, slot in enumerate(new)]
    if rows:
        connection.execute(slots_table.insert(), rows)


def lock_study(connection: Connection, study_id: int) -> None:
    """Keeps others from claiming and from adding slots until the transaction ends."""
    connection.execute(
        sa.select(studies_table.c.study_id).where(studies_table.c.study_id == study_id).with_for_update()
    )


def drop_unclaimed(connection: Connection, study_id: int) -> None:
    """Takes back what was to confirm and nobody has claimed: the last slots, as they are claimed in order."""
    mine = (slots_table.c.study_id == study_id) & (slots_table.c.kind != "search") & slots_table.c.trial_id.is_(None)
    connection.execute(slots_table.delete().where(mine))


def num_slots(connection: Connection, study_id: int, *, kind: str | None = None) -> int:
    query = sa.select(sa.func.count()).select_from(slots_table).where(slots_table.c.study_id == study_id)
    return connection.execute(query if kind is None else query.where(slots_table.c.kind == kind)).scalar_one()
