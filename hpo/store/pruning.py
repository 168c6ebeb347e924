"""The pruner's look at a study: what it compares, in one query that reads trials which have ended only once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.storages._rdb.models import TrialIntermediateValueModel
from optuna.trial import FrozenTrial, TrialState

from hpo.config.study_spec import StudySpec
from hpo.search.pruners import PRUNERS, build_pruner
from hpo.search.study_views import KIND_ATTRIBUTE
from hpo.store.database import JoinedStorage
from hpo.store.judging import ComparedTrials, bare_trial
from hpo.store.prepared import named_rows, row_values
from hpo.store.schema import (
    intermediate_values,
    optuna_trials,
    trial_system_attributes,
    trial_user_attributes,
)
from hpo.study.records import Claim, EpochReport

RUNG_PREFIX = "completed_rung_"  # of the attributes that Optuna's successive halving notes on trials
ENDED_FOR_GOOD = (TrialState.COMPLETE, TrialState.PRUNED)  # one that has failed may be tried again


class Look(NamedTuple):
    """A pruner's look at a study: what it reads with the statement that locks the slots of reports.

    The reports are of one study, and need not be recorded yet. All are known before any is judged.
    """

    storage: JoinedStorage
    reports: Sequence[EpochReport]
    spec: StudySpec

    @property
    def compares(self) -> str | None:
        """What of other trials the pruner compares."""
        return PRUNERS[self.spec.pruner.name].compares

    @property
    def shape(self) -> tuple[Any, ...]:
        """What `select_compared` depends on."""
        return self.compares, len(self.reports)

    def values(self) -> dict[str, Any]:
        """Return the values of `select_compared`: only what this process has not read before."""
        own = [(report.claim.trial_id, _known_values(self.storage, report.claim)) for report in self.reports]
        bound = row_values(
            "judged", [{"trial_id": trial_id, "after": max(known, default=0)} for trial_id, known in own]
        )
        if self.compares is not None:
            seen = self._seen
            unended = [trial_id for trial_id, trial in seen.items() if trial.state not in ENDED_FOR_GOOD]
            bound |= {"compared_of": self.reports[0].claim.study_id, "after": max(seen, default=-1), "unended": unended}
        return bound

    def judge(
        self, rows: Iterable[Any], reports: Sequence[EpochReport]
    ) -> tuple[set[Claim], dict[tuple[int, str], Any]]:
        """Return which of some of the reports the pruner drops, by their claims, and what it notes on trials."""
        compared = ComparedTrials(self._merge(rows, reports), direction=self.spec.direction)
        pruner = build_pruner(self.spec)
        dropped = {r.claim for r in reports if compared.should_prune(self.spec.name, pruner, r.claim.trial_id)}
        return dropped, compared.notes

    @property
    def _seen(self) -> Mapping[int, FrozenTrial]:
        return self.storage.compared_trials.get(self.reports[0].claim.study_id, {})

    def _merge(self, rows: Iterable[Any], reports: Sequence[EpochReport]) -> dict[int, FrozenTrial]:
        """Return the trials that are judged, with what they report, and those that they are compared with, by id."""
        read: dict[int, FrozenTrial] = {}
        for row in rows:
            trial = read.get(row.trial_id) or read.setdefault(
                row.trial_id, bare_trial(row.trial_id, row.number, row.state)
            )
            if row.key is None:
                continue
            if self.compares == "rungs":
                trial.system_attrs[row.key] = json.loads(row.value)
            else:
                to_value = TrialIntermediateValueModel.stored_repr_to_intermediate_value
                trial.intermediate_values[row.key] = to_value(row.value, row.value_type)
        for report in reports:
            trial, values = read[report.claim.trial_id], _known_values(self.storage, report.claim)
            values |= trial.intermediate_values
            for later in [epoch for epoch in values if epoch > report.epoch]:
                del values[later]
            values[report.epoch] = report.value
            trial.intermediate_values = values
        known = {**self._seen, **read}
        if self.compares is not None:
            self.storage.compared_trials[self.reports[0].claim.study_id] = known
        return dict(known)


def plan_look(storage: JoinedStorage, reports: Sequence[EpochReport], spec: StudySpec) -> Look | None:
    """Return the look that the study's pruner takes at reports, or None where it is not asked."""
    asked = [report for report in reports if report.may_prune]
    return Look(storage, asked, spec) if asked and spec.pruner.name != "none" else None


def _known_values(storage: JoinedStorage, claim: Claim) -> dict[int, float]:
    """Return the values that an attempt is known to have, to be added to: no other changes them while it has the slot.

    They are forgotten where a transaction fails that may have added to them.
    """
    attempt, values = storage.own_values.get(claim.trial_id, (claim.attempt, {}))
    if attempt != claim.attempt:
        values = {}
    storage.own_values[claim.trial_id] = claim.attempt, values
    return values


def select_compared(compares: str | None, num_judged: int) -> sa.Select[Any]:
    """Return the query of what a pruner compares: of the trials that it judges, and of new ones."""
    judged = named_rows("judged", ("trial_id", "after"), num_judged)
    is_judged = sa.or_(*(optuna_trials.c.trial_id == row["trial_id"] for row in judged))
    values, notes = intermediate_values.c, trial_system_attributes.c
    columns = [values.step.label("key"), values.intermediate_value.label("value")]
    columns.append(values.intermediate_value_type.label("value_type"))
    joined = intermediate_values
    is_wanted = sa.or_(*((values.trial_id == row["trial_id"]) & (values.step > row["after"]) for row in judged))
    if compares == "rungs":  # of its own values a trial needs the last one, which is reported now
        columns = [notes.key.label("key"), notes.value_json.label("value")]
        joined, is_wanted = trial_system_attributes, notes.key.startswith(RUNG_PREFIX, autoescape=True)
    elif compares == "values":
        is_wanted = is_wanted | (optuna_trials.c.state == TrialState.COMPLETE)
    query = sa.select(optuna_trials.c.trial_id, optuna_trials.c.number, optuna_trials.c.state, *columns).outerjoin_from(
        optuna_trials, joined, (joined.c.trial_id == optuna_trials.c.trial_id) & is_wanted
    )
    return query.where(is_judged if compares is None else is_judged | _is_new())


def _is_new() -> sa.ColumnElement[bool]:
    """Return the condition for trials of the search that had not ended when a process read the others."""
    attributes, trials = trial_user_attributes.c, optuna_trials.c
    has_kind = (attributes.trial_id == trials.trial_id) & (attributes.key == KIND_ATTRIBUTE)
    was_unended = trials.trial_id.in_(sa.bindparam("unended", expanding=True))
    return sa.and_(
        trials.study_id == sa.bindparam("compared_of"),
        sa.or_(trials.trial_id > sa.bindparam("after"), was_unended),
        ~sa.exists().where(has_kind),
    )
