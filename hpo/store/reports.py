"""The record of an epoch that a trial reports, in our tables and in Optuna's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.store.conditions import is_slot
from hpo.store.database import Database
from hpo.store.schema import epochs_table, intermediate_values, slots_table
from hpo.study.records import Claim, EpochReport


def record_epoch(database: Database, connection: Connection, report: EpochReport) -> tuple[int, int | None]:
    """Writes an epoch to our tables and Optuna's; returns how far the slot had come, and where it was pruned."""
    claim, epoch = report.claim, report.epoch
    of_slot = sa.select(slots_table.c.last_epoch, slots_table.c.pruned_at).where(is_slot(claim))
    last_epoch, pruned_at = connection.execute(of_slot).one()
    _replace_epoch(connection, claim, epoch, report.metrics)
    theirs = intermediate_values.c
    later = (theirs.trial_id == claim.trial_id) & (theirs.step > epoch)
    connection.execute(intermediate_values.delete().where(later))
    database.cached.set_trial_intermediate_value(claim.trial_id, epoch, report.value)
    return last_epoch, pruned_at


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
