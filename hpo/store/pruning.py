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
from hpo.store.database import Database
from hpo.store.judging import ComparedTrials, bare_trial
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
    for report in reports:
        values = trials[report.claim.trial_id].intermediate_values
        earlier = {epoch: value for epoch, value in values.items() if epoch < report.epoch}
        trials[report.claim.trial_id].intermediate_values = {**earlier, report.epoch: report.value}
    compared = ComparedTrials(trials, direction=spec.direction)
    pruner = build_pruner(spec)
    dropped = {r.claim for r in reports if compared.should_prune(spec.name, pruner, r.claim.trial_id)}
    return dropped, compared.notes


def _read_compared(
    database: Database, connection: Connection, reports: Sequence[EpochReport], *, compares: str | None
) -> dict[int, FrozenTrial]:
    """Return the trials that are judged, and those that they are compared with, by their ids."""
    study_id = reports[0].claim.study_id
    seen: Mapping[int, FrozenTrial] = database.storage.compared_trials.get(study_id, {})
    is_judged = optuna_trials.c.trial_id.in_([report.claim.trial_id for report in reports])
    is_read: sa.ColumnElement[bool] = is_judged
    values, notes = intermediate_values.c, trial_system_attributes.c
    columns: list[sa.ColumnElement[Any]] = [values.step, values.intermediate_value, values.intermediate_value_type]
    joined, is_wanted = intermediate_values, is_judged
    if compares == "rungs":  # of its own values a trial needs the last one, which is reported now
        columns = [notes.key, notes.value_json]
        joined, is_wanted = trial_system_attributes, notes.key.startswith(RUNG_PREFIX, autoescape=True)
    elif compares == "values":
        is_wanted = is_judged | (optuna_trials.c.state == TrialState.COMPLETE)
    if compares is not None:
        is_read = is_judged | _is_new(study_id, seen)
    query = (
        sa.select(optuna_trials.c.trial_id, optuna_trials.c.number, optuna_trials.c.state, *columns)
        .outerjoin_from(optuna_trials, joined, (joined.c.trial_id == optuna_trials.c.trial_id) & is_wanted)
        .where(is_read)
    )
    read: dict[int, FrozenTrial] = {}
    for trial_id, number, state, key, *value in connection.execute(query):
        trial = read.get(trial_id) or read.setdefault(trial_id, bare_trial(trial_id, number, state))
        if key is None:
            continue
        if compares == "rungs":
            trial.system_attrs[key] = json.loads(*value)
        else:
            trial.intermediate_values[key] = TrialIntermediateValueModel.stored_repr_to_intermediate_value(*value)
    known = {**seen, **read}
    if compares is not None:
        database.storage.compared_trials[study_id] = known
    return dict(known)


def _is_new(study_id: int, seen: Mapping[int, FrozenTrial]) -> sa.ColumnElement[bool]:
    """Return the condition for trials of the search that had not ended when a process read the others."""
    attributes = trial_user_attributes.c
    has_kind = (attributes.trial_id == optuna_trials.c.trial_id) & (attributes.key == KIND_ATTRIBUTE)
    unended = [trial_id for trial_id, trial in seen.items() if trial.state not in ENDED_FOR_GOOD]
    return sa.and_(
        optuna_trials.c.study_id == study_id,
        sa.or_(optuna_trials.c.trial_id > max(seen, default=-1), optuna_trials.c.trial_id.in_(unended)),
        ~sa.exists().where(has_kind),
    )
