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
from hpo.store.database import Database, clock_of, upsert
from hpo.store.ledger import LEASE_S, Verdict
from hpo.store.prepared import NamedRow, claim_values, execute_prepared, named_claim, named_rows, row_values
from hpo.store.pruning import Look, select_compared
from hpo.store.racing import Race, read_race
from hpo.store.schema import (
    epochs_table,
    intermediate_values,
    labelled,
    optuna_trials,
    rows_by_part,
    slots_table,
    studies_table,
    trial_system_attributes,
    union_of,
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


class LockedSlots(NamedTuple):
    """Slots that are locked, and what a look at their study has read with them."""

    progress: dict[Claim, SlotProgress]  # without the claims that are lost
    compared: list[Any]


def lock_slots(connection: Connection, claims: Sequence[Claim], look: Look | None = None) -> LockedSlots:
    """Lock the slots that claims of a study hold, and read how far each has come, and what a look compares.

    Slots are locked in the order of their numbers, as `Workers.renew` does: there is no deadlock. In Postgres a look
    shows the study as it was before the wait for these locks: only the holders of the claims report on their trials.
    """
    by_number, progress = {claim.number: claim for claim in claims}, {}
    values: dict[str, Any] = {} if look is None else look.values()
    for index, claim in enumerate(claims):
        values |= claim_values(f"claim_{index}", claim)
    shape = () if look is None else look.shape
    rows = rows_by_part(execute_prepared(connection, build_locking, values, len(claims), *shape))
    for row in rows["slot"]:
        if row.state is None:
            raise KeyError(f"Optuna's tables have no trial for trial {row.number}")
        is_ended, is_stopping = row.state.is_finished(), row.stop is not None
        progress[by_number[row.number]] = SlotProgress(row.last_epoch, row.pruned_at, is_ended, is_stopping)
    return LockedSlots(progress, rows["compared"])


def build_locking(dialect_name: str, num_claims: int, *look: Any) -> list[Any]:
    """Return the statement of `lock_slots`; `look` is the shape of one."""
    study_id = slots_table.c.study_id
    stop = sa.select(studies_table.c.stop).where(studies_table.c.study_id == study_id).scalar_subquery()
    state = sa.select(optuna_trials.c.state).where(optuna_trials.c.trial_id == slots_table.c.trial_id).scalar_subquery()
    columns = [column for column in labelled(slots_table) if column.name in ("number", "last_epoch", "pruned_at")]
    is_one = sa.or_(*(is_held(named_claim(f"claim_{index}")) for index in range(num_claims)))
    query = sa.select(*columns, state.label("state"), stop.label("stop")).where(is_one).order_by(slots_table.c.number)
    parts = {"slot": query.with_for_update(of=slots_table)}
    return [union_of(parts | {"compared": select_compared(*look)} if look else parts)]


def judge_epochs(
    look: Look | None, compared: Sequence[Any], reports: Sequence[EpochReport], progress: Mapping[Claim, SlotProgress]
) -> Judgement:
    """Return what the pruner says of reports of locked slots; what it has said of an epoch before holds."""
    dropped = {report.claim for report in reports if progress[report.claim].pruned_at == report.epoch}
    new = [r for r in reports if r.may_prune and r.epoch > progress[r.claim].last_epoch]
    if look is None or not new:
        return Judgement(dropped, {})
    newly_dropped, notes = look.judge(compared, new)
    return Judgement(dropped | newly_dropped, notes)


def record_epochs(
    connection: Connection,
    reports: Sequence[EpochReport],
    progress: Mapping[Claim, SlotProgress],
    judgement: Judgement,
) -> None:
    """Extend the leases of locked slots, and write an epoch of each and the judgement in our tables and Optuna's."""
    notes = [
        {"trial_id": of, "key": key, "value_json": json.dumps(note)} for (of, key), note in judgement.notes.items()
    ]
    values = row_values("epoch", map(_epoch_row, reports)) | row_values("value", map(_value_row, reports))
    values |= row_values("slot", [_slot_row(of, progress[of.claim], judgement) for of in reports])
    execute_prepared(connection, build_recording, values | row_values("note", notes), len(reports), len(notes))


EPOCH = ("study_id", "number", "epoch", "attempt", "metrics")
VALUE_COLUMNS = ("trial_id", "step", "intermediate_value", "intermediate_value_type")
SLOT = ("study_id", "number", "epoch", "pruned_at")
NOTE = ("trial_id", "key", "value_json")


def build_recording(dialect_name: str, num_reports: int, num_notes: int) -> list[Any]:
    """Return the statements of `record_epochs`."""
    statements: list[Any] = []
    for row in named_rows("epoch", EPOCH, num_reports):
        epochs = epochs_table.c
        is_of_trial = (epochs.study_id == row["study_id"]) & (epochs.number == row["number"])
        statements.append(epochs_table.delete().where(is_of_trial, epochs.epoch > row["epoch"]))
        statements.append(upsert(dialect_name, epochs_table, row, ["study_id", "number", "epoch"]))
    for row in named_rows("value", VALUE_COLUMNS, num_reports):
        is_later = (intermediate_values.c.trial_id == row["trial_id"]) & (intermediate_values.c.step > row["step"])
        statements.append(intermediate_values.delete().where(is_later))
        statements.append(upsert(dialect_name, intermediate_values, row, ["trial_id", "step"]))
    for row in named_rows("note", NOTE, num_notes):
        statements.append(upsert(dialect_name, trial_system_attributes, row, ["trial_id", "key"]))
    return statements + [_advance(dialect_name, row) for row in named_rows("slot", SLOT, num_reports)]


def _advance(dialect_name: str, row: NamedRow) -> sa.Update:
    """Return the statement that extends a lease, and notes an epoch that no attempt has reached before."""
    slots = slots_table.c
    is_new = slots.last_epoch < row["epoch"]
    values = {
        "lease_until": clock_of(dialect_name) + LEASE_S,
        "last_epoch": sa.case((is_new, row["epoch"]), else_=slots.last_epoch),
        "crashes": sa.case((is_new, 0), else_=slots.crashes),
        "pruned_at": row["pruned_at"],
    }
    return slots_table.update().where(slots.study_id == row["study_id"], slots.number == row["number"]).values(values)


def _slot_row(report: EpochReport, progress: SlotProgress, judgement: Judgement) -> dict[str, Any]:
    """Return what a report changes of its slot; the pruner judges an epoch only when it is first reached."""
    pruned_at = progress.pruned_at
    if report.epoch > progress.last_epoch:
        pruned_at = report.epoch if report.claim in judgement.dropped else None
    return {
        "study_id": report.claim.study_id,
        "number": report.claim.number,
        "epoch": report.epoch,
        "pruned_at": pruned_at,
    }


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
