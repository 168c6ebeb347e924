"""The seeds of a confirmation in its database: which of them is in turn, and which trials are no longer needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.store.damage import is_number, refuse_damage
from hpo.store.database import Database
from hpo.store.reading import best_values
from hpo.store.schema import labelled, slots_table, trial_values
from hpo.store.slots import UNCLAIMED, add_slots, drop_unclaimed, slot_states
from hpo.study import stages
from hpo.study.records import ENDED, StudyRecord
from hpo.study.seed_race import FIRST_SEEDS, SeedResults, racing_on


def last_seed_in_turn(database: Database, connection: Connection, study: StudyRecord) -> int | None:
    """Return the last seed on which a rate may be confirmed now; None where no trial that confirms is left to begin.

    When a seed has ended for all rates, the trials of those that get no more of them are deleted. The caller has locked
    the study. What has ended by then decides, so every worker decides alike.
    """
    rows = [] if study.spec.confirm is None else _latest_rows(database, connection, study)
    unbegun = [row for row in rows if row.trial_id is None]
    if not unbegun:
        return None
    num_common: int = min(row.replicate for row in rows) + FIRST_SEEDS
    last: int = min(row.replicate for row in unbegun)
    needed = sorted(unbegun, key=lambda row: row.replicate)  # earlier versions added them rate by rate
    if last < num_common:
        last = num_common - 1
    else:
        before = [row for row in rows if row.replicate < last]
        if any(row.state not in ENDED for row in before):
            last -= 1
        else:
            left = _racing_on(study, before)
            needed = [row for row in needed if row.given in left]
    if needed != unbegun:
        drop_unclaimed(connection, study.study_id)  # and all of them again: each slot has the number of Optuna's trial
        new = [{**UNCLAIMED, "given": row.given, "kind": row.kind, "replicate": row.replicate} for row in needed]
        add_slots(connection, study.study_id, new)
    return last


def weights_to_keep(
    database: Database, connection: Connection, study: StudyRecord, count: int
) -> tuple[set[int], set[int]]:
    """Return the numbers of the trials whose last checkpoint stays, and of others that may have one.

    The `count` best of the search stay and, where any does, the best one of each rate of the latest confirmation; so do
    those whose networks the test set may yet be measured with.
    """
    best = [number for number, _ in best_values(connection, study, count + 1)]
    if study.spec.confirm is None:
        return set(best[:count]), set(best[count:])
    rows = [
        row for row in _latest_rows(database, connection, study) if row.state == "complete" and is_number(row.value)
    ]
    sign = 1 if study.spec.direction == "maximize" else -1
    ascending = sorted(rows, key=lambda row: (sign * row.value, -row.number))
    of_rates = {row.given: row.number for row in ascending}  # the last and best one of each
    kept = set(best[:count]) | (set(of_rates.values()) if count else set())
    kept |= stages.untested(study, slot_states(database, study.study_id))
    return kept, {*best, *(row.number for row in rows)} - kept


def _latest_rows(database: Database, connection: Connection, study: StudyRecord) -> Sequence[Any]:
    """Return the slots of the latest confirmation in order, each with Optuna's value if its trial has one."""
    slots = slots_table.c
    of_search = (slots.study_id == study.study_id) & (slots.kind == "search") & (slots.state != "failed")
    last = connection.execute(sa.select(sa.func.max(slots.number)).where(of_search)).scalar()
    query = (
        sa.select(*labelled(slots_table), trial_values.c.value)
        .outerjoin(trial_values, trial_values.c.trial_id == slots.trial_id)
        .where(slots.study_id == study.study_id, slots.kind == "confirm", slots.number > (-1 if last is None else last))
    )
    rows = connection.execute(query.order_by(slots.number)).all()
    refuse_damage(database.url, study.name, slots_table, rows)
    return rows


def _racing_on(study: StudyRecord, rows: Sequence[Any]) -> set[str]:
    """Return the values, as slots are given them, of the rates that get another seed; `rows` have ended."""
    assert study.spec.confirm is not None
    sign = 1 if study.spec.direction == "maximize" else -1
    by_given: dict[str, list[Any]] = {}
    for row in sorted(rows, key=lambda row: row.replicate):
        by_given.setdefault(row.given, []).append(row)
    rates = [
        SeedResults(
            [sign * row.value if row.state == "complete" and is_number(row.value) else None for row in of_rate],
            sum(row.state == "diverged" for row in of_rate),
        )
        for of_rate in by_given.values()
    ]
    left = racing_on(rates, max_seeds=study.spec.confirm.seeds, grain=study.grain)
    return {given for index, given in enumerate(by_given) if index in left}
