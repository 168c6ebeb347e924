"""The rows of a study's trials: its slots, the epochs that they reported, and the attempts at them."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.store.schema import attempts_table, epochs_table, labelled, select_all, slots_table, workers_table
from hpo.study.records import Attempt, read_attempt

Reports = list[tuple[int, dict[str, float | None]]]  # of one trial, in order: epoch and metrics


def read_rows(connection: Connection, study_id: int) -> tuple[list[Any], dict[int, Reports], dict[int, list[Attempt]]]:
    """Return the rows of the study's slots in order, and their reports and attempts by the slot's number."""
    rows = list(
        connection.execute(
            select_all(slots_table).where(slots_table.c.study_id == study_id).order_by(slots_table.c.number)
        )
    )
    reports, latest = _reports(connection, study_id)
    tries = _attempts(connection, study_id)
    for row in rows:  # a trial that has just been begun again has the epochs up to the one that it resumed from
        if row.state == "running" and latest.get(row.number) not in (None, row.attempt):
            kept = next((a.resumed_from or 0 for a in tries.get(row.number, []) if a.attempt == row.attempt), 0)
            reports[row.number] = [report for report in reports[row.number] if report[0] <= kept]
    return rows, reports, tries


def _reports(connection: Connection, study_id: int) -> tuple[dict[int, Reports], dict[int, int]]:
    """Return the reports of each slot, and the attempt that reported last."""
    reports: dict[int, Reports] = {}
    latest: dict[int, int] = {}
    query = (
        select_all(epochs_table)
        .where(epochs_table.c.study_id == study_id)
        .order_by(epochs_table.c.number, epochs_table.c.epoch)
    )
    for row in connection.execute(query):
        reports.setdefault(row.number, []).append((row.epoch, json.loads(row.metrics)))
        latest[row.number] = row.attempt
    return reports, latest


def _attempts(connection: Connection, study_id: int) -> dict[int, list[Attempt]]:
    found: dict[int, list[Attempt]] = {}
    query = (
        sa.select(*labelled(attempts_table), workers_table.c.host, workers_table.c.device)
        .outerjoin(workers_table, workers_table.c.worker_id == attempts_table.c.worker_id)
        .where(attempts_table.c.study_id == study_id)
        .order_by(attempts_table.c.number, attempts_table.c.attempt)
    )
    for row in connection.execute(query):
        found.setdefault(row.number, []).append(read_attempt(row))
    return found
