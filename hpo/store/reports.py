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
from hpo.store.conditions import is_held
from hpo.store.database import Database, execute_together, upsert
from hpo.store.ledger import LEASE_S, Verdict
from hpo.store.pruning import ask_pruner
from hpo.store.racing import Race, read_race
from hpo.store.schema import (
    epochs_table,
    intermediate_values,
    optuna_trials,
    slots_table,
    studies_table,
    trial_system_attributes,
)
from hpo.study.records import Claim, EpochReport


class SlotProgress(NamedTuple):
    """How far a slot had come before a report."""

    last_epoch: int
    pruned_at: int | None
    is_ended_elsewhere: bool  # another program has ended Optuna's trial
    is_stopping: bool  # the study


class Judgement(NamedTuple):
    """What the pruner says of reports: the claims that it drops, and what it notes on trials, by their ids and keys."""

    dropped: set[Claim]
    notes: Mapping[tuple[int, str], Any]


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


def judge_epochs(
    database: Database,
    connection: Connection,
    reports: Sequence[EpochReport],
    progress: Mapping[Claim, SlotProgress],
    spec: StudySpec,
) -> Judgement:
    """Return what the pruner says of reports of locked slots; what it has said of an epoch before holds."""
    dropped = {report.claim for report in reports if progress[report.claim].pruned_at == report.epoch}
    new = [r for r in reports if r.may_prune and r.epoch > progress[r.claim].last_epoch]
    if not new or spec.pruner.name == "none":
        return Judgement(dropped, {})
    newly_dropped, notes = ask_pruner(database, connection, new, spec)
    return Judgement(dropped | newly_dropped, notes)


def record_epochs(
    database: Database,
    connection: Connection,
    reports: Sequence[EpochReport],
    progress: Mapping[Claim, SlotProgress],
    judgement: Judgement,
) -> None:
    """Extend the leases of locked slots, and write an epoch of each and the judgement in our tables and Optuna's."""
    epochs, values = epochs_table.c, intermediate_values.c
    is_later_epoch = [
        (epochs.study_id == report.claim.study_id)
        & (epochs.number == report.claim.number)
        & (epochs.epoch > report.epoch)
        for report in reports
    ]
    is_later_value = [(values.trial_id == report.claim.trial_id) & (values.step > report.epoch) for report in reports]
    notes = [
        {"trial_id": of, "key": key, "value_json": json.dumps(note)} for (of, key), note in judgement.notes.items()
    ]
    execute_together(
        connection,
        epochs_table.delete().where(sa.or_(*is_later_epoch)),
        intermediate_values.delete().where(sa.or_(*is_later_value)),
        upsert(connection, epochs_table, [_epoch_row(report) for report in reports], ["study_id", "number", "epoch"]),
        upsert(connection, intermediate_values, [_value_row(report) for report in reports], ["trial_id", "step"]),
        *([upsert(connection, trial_system_attributes, notes, ["trial_id", "key"])] if notes else []),
        _advance(database, reports, progress, judgement),
    )


def _advance(
    database: Database, reports: Sequence[EpochReport], progress: Mapping[Claim, SlotProgress], judgement: Judgement
) -> sa.Update:
    """Return the statement that extends leases, and notes the epochs that no attempt has reached before."""
    slots = slots_table.c
    numbers = [report.claim.number for report in reports]
    new = [report for report in reports if report.epoch > progress[report.claim].last_epoch]
    values: dict[str, Any] = {"lease_until": database.clock + LEASE_S}
    if new:
        reached = {report.claim.number: report.epoch for report in new}
        pruned_at = {
            report.claim.number: report.epoch if report.claim in judgement.dropped else sa.null() for report in new
        }
        values["last_epoch"] = sa.case(reached, value=slots.number, else_=slots.last_epoch)
        values["crashes"] = sa.case((slots.number.in_(reached), 0), else_=slots.crashes)
        values["pruned_at"] = sa.case(pruned_at, value=slots.number, else_=slots.pruned_at)
    of_study = slots.study_id == reports[0].claim.study_id
    return slots_table.update().where(of_study, slots.number.in_(numbers)).values(values)


def decide(
    database: Database,
    connection: Connection,
    reports: Sequence[EpochReport],
    progress: Mapping[Claim, SlotProgress],
    judgement: Judgement,
    spec: StudySpec,
) -> dict[Claim, Verdict]:
    """Return how the trials go on whose reports were recorded."""
    is_at_rung = any(report.may_prune for report in reports)
    race = read_race(database, connection, reports[0].claim.study_id, spec) if is_at_rung else Race()
    verdicts: dict[Claim, Verdict] = {}
    for report in reports:
        if report.may_prune and report.claim in judgement.dropped:
            verdicts[report.claim] = "prune"
        elif progress[report.claim].is_stopping:
            verdicts[report.claim] = "stop"
        else:
            is_waiting = report.may_prune and report.claim.number in race.held_back
            verdicts[report.claim] = "wait" if is_waiting else "go on"
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
