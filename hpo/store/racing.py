"""The trials of a race in their database: which of them wait for others, and how they end with it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search.race import OPEN, Racer, course_of, find_goals, trains_on
from hpo.store.database import Database
from hpo.store.ledger import Ledger
from hpo.store.reading import read_optuna_trials
from hpo.store.schema import epochs_table, slots_table, studies_table
from hpo.store.slots import num_waiting
from hpo.study.chance import lucky_value
from hpo.study.records import StudyRecord

END_REASON = "dropped by the race after epoch {epoch}"


class Race(NamedTuple):
    """How a race stands. A study with another sampler is a race that holds nobody back."""

    held_back: frozenset[int] = frozenset()  # trials that have not ended and do not train on now
    is_over: bool = False


def read_race(database: Database, connection: Connection, study_id: int, spec: StudySpec) -> Race:
    """Return how the race of a study stands by what its trials have reported."""
    course = course_of(spec)
    if course is None:
        return Race()
    racers = _read_racers(database, connection, study_id, spec, course.rungs)
    goals = find_goals(course, racers)
    held_back = (
        racer.number
        for racer in racers
        if racer.state in OPEN and (goals is None or not trains_on(course, racer, goals))
    )
    return Race(frozenset(held_back), is_over=goals is None)


def count_claimable(database: Database, connection: Connection, study: StudyRecord) -> int:
    """Return how many trials wait for a worker, to train on or to end with a race that is over; enqueued ones wait."""
    race = read_race(database, connection, study.study_id, study.spec)
    without = frozenset() if race.is_over else race.held_back
    return num_waiting(connection, study.study_id, without=without)


def hold_back(database: Database, connection: Connection, study: StudyRecord) -> frozenset[int]:
    """Return the numbers of the trials that nobody may claim now; end those that wait in a race that is over."""
    race = read_race(database, connection, study.study_id, study.spec)
    if race.is_over:
        columns = (slots_table.c.number, slots_table.c.trial_id, slots_table.c.last_epoch)
        waiting = (slots_table.c.study_id == study.study_id) & (slots_table.c.state == "waiting")
        losing = waiting & slots_table.c.number.in_(race.held_back)
        for row in connection.execute(sa.select(*columns).where(losing)).all():
            slot = losing & (slots_table.c.number == row.number)
            Ledger(database).prune(connection, slot, row.trial_id, END_REASON.format(epoch=row.last_epoch))
    return race.held_back


def _read_racers(
    database: Database, connection: Connection, study_id: int, spec: StudySpec, rungs: Sequence[int]
) -> list[Racer]:
    """Return the trials of a race. Those that are no better than guessing are equal: their losses tell them apart."""
    sign = 1 if spec.direction == "maximize" else -1
    worst = _luck(connection, study_id, spec, sign=sign)
    columns = (slots_table.c.number, slots_table.c.state, slots_table.c.given, slots_table.c.trial_id)
    is_searched = (slots_table.c.study_id == study_id) & (slots_table.c.kind == "search")
    rows = connection.execute(sa.select(*columns).where(is_searched)).all()
    theirs = read_optuna_trials(database, study_id)
    losses = _read_losses(connection, study_id, rungs)
    racers = []
    for row in rows:
        trial = theirs.get(row.trial_id)
        reported = {} if trial is None else trial.intermediate_values
        params = json.loads(row.given) | ({} if trial is None else trial.params)
        values = {epoch: max(sign * value, worst) for epoch, value in reported.items()}
        racers.append(Racer(row.number, params.get("lr", 0.0), row.state, values, losses.get(row.number, {})))
    return racers


def _luck(connection: Connection, study_id: int, spec: StudySpec, *, sign: int) -> float:
    """Return what guessing may be worth, times the sign of the direction, or -inf where that is not known."""
    metadata = connection.execute(sa.select(studies_table.c.metadata).where(studies_table.c.study_id == study_id))
    value = lucky_value(spec, json.loads(metadata.scalar() or "{}"))
    return -math.inf if value is None else sign * value


def _read_losses(connection: Connection, study_id: int, epochs: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return the validation losses after these epochs, where they are known, by trial and epoch."""
    columns = (epochs_table.c.number, epochs_table.c.epoch, epochs_table.c.metrics)
    wanted = (epochs_table.c.study_id == study_id) & epochs_table.c.epoch.in_(list(epochs))
    losses: dict[int, dict[int, float]] = {}
    for row in connection.execute(sa.select(*columns).where(wanted)):
        loss = json.loads(row.metrics).get("val_loss")
        if loss is not None and math.isfinite(loss):
            losses.setdefault(row.number, {})[row.epoch] = loss
    return losses
