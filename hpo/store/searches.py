"""How far a search is, its end by `search.until` or `search.hours`, and the bounds that it may be given later."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.config.widening import Ends, num_trials_to_add, points_to_add, widened_spec
from hpo.errors import UserError
from hpo.search import proposals
from hpo.search.space import Scalar
from hpo.store.database import Database, exclude_others
from hpo.store.enqueued import take_in
from hpo.store.reading import is_outdated, load_study
from hpo.store.retry import retry_on_outage
from hpo.store.schema import attempts_table, slots_table, studies_table, workers_table
from hpo.store.slots import add_slots, drop_unclaimed, lock_study, new_slot, num_slots
from hpo.study.records import ENDED, SEARCH_END, WIDENED, StudyRecord

SECONDS_PER_HOUR = 3600


class SearchProgress(NamedTuple):
    """How far a search is."""

    num_unbegun: int  # trials that nobody has claimed yet
    num_open: int  # trials that have begun and not ended
    num_ended: int


class Searches:
    """The searches of the studies in a database. Any thread and any process may call any method."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.retry = database.retry

    @retry_on_outage
    def progress(self, study: StudyRecord) -> SearchProgress:
        """Return how far the study's search is."""
        with self._database.connect() as connection:
            return read_progress(connection, study.study_id)

    @retry_on_outage
    def is_outdated(self, study: StudyRecord) -> bool:
        """Return whether a range of the study was widened since this record of it was read."""
        with self._database.connect() as connection:
            return is_outdated(connection, study)

    @retry_on_outage
    def hours_in_training(self, study: StudyRecord) -> float:
        """Return for how long at least one trial of the search was in training, in hours.

        The time between a stop and the next start does not count, and of two workers at once neither counts twice.
        Where an attempt was lost with its worker, it lasted until the worker's last sign of life.
        """
        attempts, seen_at = attempts_table.c, workers_table.c.seen_at
        is_of_slot = (slots_table.c.study_id == attempts.study_id) & (slots_table.c.number == attempts.number)
        query = (
            sa.select(attempts.began_at, attempts.ended_at, attempts.outcome, seen_at)
            .join(slots_table, is_of_slot)
            .outerjoin(workers_table, workers_table.c.worker_id == attempts.worker_id)
            .where(_is_searched(study.study_id))
        )
        with self._database.connect() as connection:
            spans = [
                (row.began_at, (row.seen_at or row.began_at) if row.outcome in (None, "lost") else row.ended_at)
                for row in connection.execute(query)
            ]
        return _covered(spans) / SECONDS_PER_HOUR

    @retry_on_outage
    def end(self, study: StudyRecord, reason: str) -> None:
        """End the search: drop the trials that nobody has begun, and keep the reason with the study.

        Trials that have begun are trained to their end. Nothing is done where the study has other limits by now than
        the caller knows, or no such trial is left.
        """
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            known = load_study(self._database, connection, study.study_id, study.name)
            if known.spec.search.limits != study.spec.search.limits:
                return
            if connection.execute(slots_table.delete().where(_is_unbegun(study.study_id))).rowcount:
                save_study(connection, study, known.spec, {**known.metadata, SEARCH_END: reason})

    @retry_on_outage
    def grow(self, study: StudyRecord, ends: Ends) -> None:
        """Give the range of learning rates these ends, unless a range was widened since `study` was read."""
        self.enlarge(study, widening={"lr": ends}, grew=True)

    def enlarge(
        self,
        study: StudyRecord,
        trials: int | None = None,
        *,
        until: str | None = None,
        hours: float | None = None,
        widening: Mapping[str, Ends] = {},
        grew: bool = False,
    ) -> None:
        """Give the study's search other bounds, and keep its trials.

        Args:
            study: The study.
            trials: The new number of trials. Where a limit has ended the search, it no longer has any limit.
            until: The new `search.until`.
            hours: The new `search.hours`.
            widening: The new ends of ranges, by their keys. Without `trials` the study gets as many more as it needs to
                be searched as densely there. The first of them are where nobody has been.
            grew: Whether the search widens by itself. Nothing is done where it was widened since `study` was read.

        Raises:
            UserError: A bound is wrong, there are more trials than that already, or the study is a grid.
        """
        with self._database.transaction() as connection:
            exclude_others(connection)
            if grew and is_outdated(connection, study):
                return
            study = load_study(self._database, connection, study.study_id, study.name)
            count = num_slots(connection, study.study_id, kind="search")
            wider = widened_spec(study.spec, widening) if widening else study.spec
            if widening and trials is None:
                trials = count + num_trials_to_add(study.spec, wider, count=count)
            spec = rebounded_spec(replace(study, spec=wider), count, trials=trials, until=until, hours=hours)
            first = points_to_add(study.spec, wider, count=spec.num_trials - count)
            if widening:
                space = study.spec.search.space
                before, after = ({key: of[key] for key in widening} for of in (space, spec.search.space))
                entry = {"before": before, "after": after, "grew": grew}
                study = replace(study, metadata={**study.metadata, WIDENED: [*study.widenings, entry]})
            give_budget(self._database, connection, study, spec, trials=spec.num_trials, first=first)


def give_budget(
    database: Database,
    connection: Connection,
    study: StudyRecord,
    spec: StudySpec,
    *,
    trials: int,
    first: Sequence[Mapping[str, Scalar]] = (),
) -> None:
    """Give the study this spec, its metadata, and a budget of `trials` or the one it has.

    A search that its limits have ended stays ended, unless the spec has other limits. The first of the trials that are
    added have the values in `first`.
    """
    lock_study(connection, study.study_id)
    take_in(database, connection, study)
    count = num_slots(connection, study.study_id, kind="search")
    metadata = dict(study.metadata)
    if spec.search.limits != study.spec.search.limits:
        metadata.pop(SEARCH_END, None)
    frozen = spec.frozen()
    if spec.search.sampler not in ("grid", "race"):
        frozen["search"]["trials"] = max(trials, count)
        spec = StudySpec.from_dict(frozen)
    if trials > count and SEARCH_END not in metadata:
        drop_unclaimed(connection, study.study_id)
        left = proposals.values_left(spec, _given_values(connection, study.study_id))
        add_slots(connection, study.study_id, [new_slot(spec, values) for values in [*first, *left[len(first) :]]])
    save_study(connection, study, spec, metadata)


def rebounded_spec(
    study: StudyRecord, count: int, *, trials: int | None, until: str | None, hours: float | None
) -> StudySpec:
    """Return the spec of a study that has `count` trials, with other bounds of its search; see `Searches.enlarge`."""
    search = study.spec.frozen()["search"]
    if trials is not None:
        if study.spec.search.sampler == "race":
            raise UserError(f"--trials cannot enlarge a race; study {study.name!r} has a budget of epochs")
        if study.spec.search.sampler == "grid" and trials != study.spec.num_trials:
            raise UserError(f"--trials cannot enlarge a grid; study {study.name!r} has {study.spec.num_trials} points")
        if trials < count:
            raise UserError(f"--trials must be at least {count}, which study {study.name!r} has, got {trials}")
        search["trials"] = trials
        if study.search_end is not None:
            search = {key: value for key, value in search.items() if key not in ("until", "hours")}
    given = {"until": until, "hours": hours}
    search |= {key: value for key, value in given.items() if value is not None}
    return StudySpec.from_dict(study.spec.frozen() | {"search": search})


def read_progress(connection: Connection, study_id: int) -> SearchProgress:
    """Return how far the study's search is."""
    is_unbegun = slots_table.c.trial_id.is_(None).label("is_unbegun")
    is_ended = slots_table.c.state.in_(ENDED).label("is_ended")
    query = sa.select(is_unbegun, is_ended, sa.func.count().label("num")).where(_is_searched(study_id))
    counts = {
        (bool(row.is_unbegun), bool(row.is_ended)): row.num
        for row in connection.execute(query.group_by(is_unbegun, is_ended))
    }
    num_ended = counts.get((True, True), 0) + counts.get((False, True), 0)
    return SearchProgress(counts.get((True, False), 0), counts.get((False, False), 0), num_ended)


def last_unbegun(connection: Connection, study_id: int) -> set[int]:
    """Return the number of the only trial of the search that nobody has begun; nothing where there are others."""
    query = sa.select(slots_table.c.number).where(_is_unbegun(study_id)).limit(2)
    numbers = set(connection.execute(query).scalars())
    return numbers if len(numbers) == 1 else set()


def save_study(connection: Connection, study: StudyRecord, spec: StudySpec, metadata: Mapping[str, Any]) -> None:
    """Write the spec and the metadata of a study."""
    saved = {"spec": json.dumps(spec.frozen()), "metadata": json.dumps(dict(metadata))}
    connection.execute(studies_table.update().where(studies_table.c.study_id == study.study_id).values(saved))


def _is_searched(study_id: int) -> sa.ColumnElement[bool]:
    return (slots_table.c.study_id == study_id) & (slots_table.c.kind == "search")


def _is_unbegun(study_id: int) -> sa.ColumnElement[bool]:
    return _is_searched(study_id) & slots_table.c.trial_id.is_(None)


def _given_values(connection: Connection, study_id: int) -> list[dict[str, Any]]:
    """Return the values that each trial of the search was given, in order."""
    query = sa.select(slots_table.c.given).where(_is_searched(study_id)).order_by(slots_table.c.number)
    return [proposals.values_from_optuna(json.loads(given)) for given in connection.execute(query).scalars()]


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much of a line these spans cover, each from its first to its last point."""
    total, reached = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return total
