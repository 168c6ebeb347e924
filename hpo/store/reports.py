"""The reports of epochs: recorded in our tables and in Optuna's, and judged by the pruner."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search import pruners
from hpo.search.study_views import RoundStudy
from hpo.store.conditions import is_slot
from hpo.store.database import Database
from hpo.store.ledger import Verdict
from hpo.store.racing import Race, read_race
from hpo.store.schema import epochs_table, intermediate_values, slots_table, studies_table
from hpo.study.records import Claim, EpochReport


class SlotProgress(NamedTuple):
    """How far a slot had come before a report."""

    last_epoch: int
    pruned_at: int | None


def record_epoch(database: Database, connection: Connection, report: EpochReport) -> SlotProgress:
    """Write an epoch to our tables and Optuna's, and return how far the slot had come before."""
    claim, epoch = report.claim, report.epoch
    columns = (slots_table.c.last_epoch, slots_table.c.pruned_at)
    progress = SlotProgress(*connection.execute(sa.select(*columns).where(is_slot(claim))).one())
    _replace_epoch(connection, claim, epoch, report.metrics)
    theirs = intermediate_values.c
    later = (theirs.trial_id == claim.trial_id) & (theirs.step > epoch)
    connection.execute(intermediate_values.delete().where(later))
    database.cached.set_trial_intermediate_value(claim.trial_id, epoch, report.value)
    return progress


def judge_epochs(
    database: Database,
    connection: Connection,
    reports: Sequence[EpochReport],
    progress: Mapping[Claim, SlotProgress],
    spec: StudySpec,
) -> dict[Claim, Verdict]:
    """Return how the trials go on whose reports were recorded, and record the pruner's verdict on each new epoch."""
    if not progress:
        return {}  # all claims are lost; the study may be gone, too
    study_id = reports[0].claim.study_id
    stop = sa.select(studies_table.c.stop).where(studies_table.c.study_id == study_id)
    is_stopping = connection.execute(stop).scalar_one() is not None
    is_at_rung = any(report.may_prune for report in reports)
    race = read_race(database, connection, study_id, spec) if is_at_rung else Race()
    judge: RoundStudy | None = None  # is made where it is needed
    verdicts: dict[Claim, Verdict] = {}
    for report in reports:
        claim = report.claim
        if claim not in progress:
            continue
        is_pruned = progress[claim].pruned_at == report.epoch
        if report.epoch > progress[claim].last_epoch:
            if report.may_prune:
                judge = judge or RoundStudy(spec.name, database.cached, pruner=pruners.build_pruner(spec))
                is_pruned = judge.should_prune(claim.trial_id)
            reached = {"last_epoch": report.epoch, "crashes": 0, "pruned_at": report.epoch if is_pruned else None}
            connection.execute(slots_table.update().where(is_slot(claim)).values(reached))
        if is_pruned and report.may_prune:
            verdicts[claim] = "prune"
        elif is_stopping:
            verdicts[claim] = "stop"
        else:
            verdicts[claim] = "wait" if report.may_prune and claim.number in race.held_back else "go on"
    return verdicts


def _replace_epoch(connection: Connection, claim: Claim, epoch: int, metrics: Mapping[str, float]) -> None:
    same_or_later = (
        (epochs_table.c.study_id == claim.study_id)
        & (epochs_table.c.number == claim.number)
        & (epochs_table.c.epoch >= epoch)
    )
    connection.execute(epochs_table.delete().where(same_or_later))
    finite = {key: number if math.isfinite(number) else None for key, number in metrics.items()}
    connection.execute(
        epochs_table.insert().values(
            study_id=claim.study_id,
            number=claim.number,
            epoch=epoch,
            attempt=claim.attempt,
            metrics=json.dumps(finite),
        )
    )
