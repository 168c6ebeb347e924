"""The pruner's look at a study: what it compares, in one statement that reads trials which have ended only once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.storages._rdb.models import TrialIntermediateValueModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search.pruners import PRUNERS, build_pruner
from hpo.search.study_views import KIND_ATTRIBUTE
from hpo.store.database import Database, JoinedStorage
from hpo.store.judging import ComparedTrials, bare_trial
from hpo.store.prepared import execute_prepared, named_rows, row_values
from hpo.store.schema import (
    intermediate_values,
    optuna_trials,
    trial_system_attributes,
    trial_user_attributes,
)
from hpo.study.records import Claim, EpochReport

RUNG_PREFIX = "completed_rung_"  # of the attributes that Optuna's successive halving notes on trials
ENDED_FOR_GOOD = (TrialState.COMPLETE, TrialState.PRUNED)  # one that has failed may be tried again


def ask_pruner(
    database: Database, connection: Connection, reports: Sequence[EpochReport], spec: StudySpec
) -> tuple[set[Claim], dict[tuple[int, str], Any]]:
    """Return the claims that the study's pruner drops, and the attributes that it notes on trials.

    The reports are of locked slots of one study, and need not be recorded yet. All are known before any is judged.
    """
    trials = _read_compared(database, connection, reports, compares=PRUNERS[spec.pruner.name].compares)
    compared = ComparedTrials(trials, direction=spec.direction)
    pruner = build_pruner(spec)
    dropped = {r.claim for r in reports if compared.should_prune(spec.name, pruner, r.claim.trial_id)}
    return dropped, compared.notes


def _read_compared(
    database: Database, connection: Connection, reports: Sequence[EpochReport], *, compares: str | None
) -> dict[int, FrozenTrial]:
    """Return the trials that are judged, with what is reported, and those that they are compared with, by their ids."""
    storage, study_id = database.storage, reports[0].claim.study_id
    seen: Mapping[int, FrozenTrial] = storage.compared_trials.get(study_id, {})
    own = {report.claim.trial_id: _known_values(storage, report.claim) for report in reports}
    judged = [{"trial_id": trial_id, "after": max(values, default=0)} for trial_id, values in own.items()]
    bound = row_values("judged", judged)
    if compares is not None:
        unended = [trial_id for trial_id, trial in seen.items() if trial.state not in ENDED_FOR_GOOD]
        bound |= {"of_study_id": study_id, "after": max(seen, default=-1), "unended": unended}
    read: dict[int, FrozenTrial] = {}
    rows: Any = execute_prepared(connection, build_compared, bound, compares, len(judged))
    for trial_id, number, state, key, *value in rows:
        trial = read.get(trial_id) or read.setdefault(trial_id, bare_trial(trial_id, number, state))
        if key is None:
            continue
        if compares == "rungs":
            trial.system_attrs[key] = json.loads(*value)
        else:
            trial.intermediate_values[key] = TrialIntermediateValueModel.stored_repr_to_intermediate_value(*value)
    for report in reports:
        trial, values = read[report.claim.trial_id], own[report.claim.trial_id]
        values |= trial.intermediate_values
        for later in [epoch for epoch in values if epoch > report.epoch]:
            del values[later]
        values[report.epoch] = report.value
        trial.intermediate_values = values
    known = {**seen, **read}
    if compares is not None:
        storage.compared_trials[study_id] = known
    return dict(known)


def _known_values(storage: JoinedStorage, claim: Claim) -> dict[int, float]:
    """Return the values that an attempt is known to have, to be added to: no other changes them while it has the slot.

    They are forgotten where a transaction fails that may have added to them.
    """
    attempt, values = storage.own_values.get(claim.trial_id, (claim.attempt, {}))
    if attempt != claim.attempt:
        values = {}
    storage.own_values[claim.trial_id] = claim.attempt, values
    return values


def build_compared(dialect_name: str, compares: str | None, num_judged: int) -> list[sa.Select[Any]]:
    """Return the statement that reads what a pruner compares: of the trials that it judges, and of new ones."""
    judged = named_rows("judged", ("trial_id", "after"), num_judged)
    is_judged = sa.or_(*(optuna_trials.c.trial_id == row["trial_id"] for row in judged))
    values, notes = intermediate_values.c, trial_system_attributes.c
    columns: list[sa.ColumnElement[Any]] = [values.step, values.intermediate_value, values.intermediate_value_type]
    joined = intermediate_values
    is_wanted = sa.or_(*((values.trial_id == row["trial_id"]) & (values.step > row["after"]) for row in judged))
    if compares == "rungs":  # of its own values a trial needs the last one, which is reported now
        columns = [notes.key, notes.value_json]
        joined, is_wanted = trial_system_attributes, notes.key.startswith(RUNG_PREFIX, autoescape=True)
    elif compares == "values":
        is_wanted = is_wanted | (optuna_trials.c.state == TrialState.COMPLETE)
    query = sa.select(optuna_trials.c.trial_id, optuna_trials.c.number, optuna_trials.c.state, *columns).outerjoin_from(
        optuna_trials, joined, (joined.c.trial_id == optuna_trials.c.trial_id) & is_wanted
    )
    return [query.where(is_judged if compares is None else is_judged | _is_new())]


def _is_new() -> sa.ColumnElement[bool]:
    """Return the condition for trials of the search that had not ended when a process read the others."""
    attributes, trials = trial_user_attributes.c, optuna_trials.c
    has_kind = (attributes.trial_id == trials.trial_id) & (attributes.key == KIND_ATTRIBUTE)
    was_unended = trials.trial_id.in_(sa.bindparam("unended", expanding=True))
    return sa.and_(
        trials.study_id == sa.bindparam("of_study_id"),
        sa.or_(trials.trial_id > sa.bindparam("after"), was_unended),
        ~sa.exists().where(has_kind),
    )
