"""The reports of epochs: recorded in our tables and in Optuna's, and judged by the pruner."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.storages._rdb.models import TrialIntermediateValueModel
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search import pruners
from hpo.search.study_views import RoundStudy
from hpo.store.conditions import is_held, is_slot
from hpo.store.database import Database, execute_together, upsert
from hpo.store.ledger import LEASE_S, Verdict
from hpo.store.racing import Race, read_race
from hpo.store.schema import epochs_table, intermediate_values, optuna_trials, slots_table, studies_table
from hpo.study.records import Claim, EpochReport


class SlotProgress(NamedTuple):
    """How far a slot had come before a report."""

    last_epoch: int
    pruned_at: int | None
    is_ended_elsewhere: bool  # another program has ended Optuna's trial
    is_stopping: bool  # the study


def lock_slots(connection: Connection, claims: Sequence[Claim]) -> dict[Claim, SlotProgress]:
    """Lock the slots that claims of a study hold, and return how far each has come; leave out the claims that are lost.

    Slots are locked in the order of their numbers, as `Workers.renew` does: there is no deadlock.
    """
    study_id = slots_table.c.study_id
    stop = sa.select(studies_table.c.stop).where(studies_table.c.study_id == study_id).scalar_subquery()
    state = sa.select(optuna_trials.c.state).where(optuna_trials.c.trial_id == slots_table.c.trial_id).scalar_subquery()
    columns = (slots_table.c.number, slots_table.c.last_epoch, slots_table.c.pruned_at, state, stop)
    held = sa.select(*columns).where(sa.or_(*map(is_held, claims))).order_by(slots_table.c.number)
    by_number, progress = {claim.number: claim for claim in claims}, {}
    for number, last_epoch, pruned_at, trial_state, stop in connection.execute(held.with_for_update(of=slots_table)):
        if trial_state is None:
            raise KeyError(f"Optuna's tables have no trial for trial {number}")
        progress[by_number[number]] = SlotProgress(
            last_epoch, pruned_at, is_ended_elsewhere=trial_state.is_finished(), is_stopping=stop is not None
        )
    return progress


def record_epochs(
    database: Database, connection: Connection, reports: Sequence[EpochReport], progress: Mapping[Claim, SlotProgress]
) -> None:
    """Extend the leases of locked slots, and write an epoch of each in our tables and Optuna's."""
    epochs, values = epochs_table.c, intermediate_values.c
    is_later_epoch = [
        (epochs.study_id == report.claim.study_id)
        & (epochs.number == report.claim.number)
        & (epochs.epoch > report.epoch)
        for report in reports
    ]
    is_later_value = [(values.trial_id == report.claim.trial_id) & (values.step > report.epoch) for report in reports]
    execute_together(
        connection,
        epochs_table.delete().where(sa.or_(*is_later_epoch)),
        intermediate_values.delete().where(sa.or_(*is_later_value)),
        upsert(connection, epochs_table, [_epoch_row(report) for report in reports], ["study_id", "number", "epoch"]),
        upsert(connection, intermediate_values, [_value_row(report) for report in reports], ["trial_id", "step"]),
        _advance(database, reports, progress),
    )


def _advance(database: Database, reports: Sequence[EpochReport], progress: Mapping[Claim, SlotProgress]) -> sa.Update:
    """Return the statement that extends leases, and notes the epochs that no attempt has reached before."""
    slots = slots_table.c
    numbers = [report.claim.number for report in reports]
    reached = {r.claim.number: r.epoch for r in reports if r.epoch > progress[r.claim].last_epoch}
    values: dict[str, Any] = {"lease_until": database.clock + LEASE_S}
    if reached:
        is_new = slots.number.in_(reached)
        values["last_epoch"] = sa.case(reached, value=slots.number, else_=slots.last_epoch)
        values["crashes"] = sa.case((is_new, 0), else_=slots.crashes)
        values["pruned_at"] = sa.case((is_new, sa.null()), else_=slots.pruned_at)
    of_study = slots.study_id == reports[0].claim.study_id
    return slots_table.update().where(of_study, slots.number.in_(numbers)).values(values)


def judge_epochs(
    database: Database,
    connection: Connection,
    reports: Sequence[EpochReport],
    progress: Mapping[Claim, SlotProgress],
    spec: StudySpec,
) -> dict[Claim, Verdict]:
    """Return how the trials go on whose reports were recorded, and record the pruner's verdict on each new epoch."""
    is_at_rung = any(report.may_prune for report in reports)
    race = read_race(database, connection, reports[0].claim.study_id, spec) if is_at_rung else Race()
    judge: RoundStudy | None = None  # is made where it is needed
    verdicts: dict[Claim, Verdict] = {}
    for report in reports:
        claim, before = report.claim, progress[report.claim]
        is_pruned = before.pruned_at == report.epoch
        if report.epoch > before.last_epoch and report.may_prune and spec.pruner.name != "none":
            judge = judge or RoundStudy(spec.name, database.cached, pruner=pruners.build_pruner(spec))
            is_pruned = judge.should_prune(claim.trial_id)
            if is_pruned:
                pruned = slots_table.update().where(is_slot(claim)).values(pruned_at=report.epoch)
                connection.execute(pruned)
        if is_pruned and report.may_prune:
            verdicts[claim] = "prune"
        elif before.is_stopping:
            verdicts[claim] = "stop"
        else:
            verdicts[claim] = "wait" if report.may_prune and claim.number in race.held_back else "go on"
    return verdicts


def _epoch_row(report: EpochReport) -> dict[str, Any]:
    finite = {key: number if math.isfinite(number) else None for key, number in report.metrics.items()}
    claim = report.claim
    return {
        "study_id": claim.study_id,
        "number": claim.number,
        "epoch": report.epoch,
        "attempt": claim.attempt,
        "metrics": json.dumps(finite),
    }


def _value_row(report: EpochReport) -> dict[str, Any]:
    stored, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(report.value)
    return {
        "trial_id": report.claim.trial_id,
        "step": report.epoch,
        "intermediate_value": stored,
        "intermediate_value_type": kind,
    }
