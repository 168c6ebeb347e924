"""Optuna's trials, read by one statement whatever they have; Optuna's own storage makes six, through its ORM."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialValueModel
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Connection

from hpo.store.schema import (
    intermediate_values,
    optuna_trials,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    union_of,
)

# Under these names the parts of a trial share columns; those that are not numbers or texts have their own.
TRIAL_PARTS: dict[str, tuple[sa.Table, dict[str, str]]] = {
    "trial": (
        optuna_trials,
        {"place": "number", "state": "state", "began": "datetime_start", "ended": "datetime_complete"},
    ),
    "param": (
        trial_params,
        {"place": "param_id", "name": "param_name", "number": "param_value", "json": "distribution_json"},
    ),
    "value": (trial_values, {"place": "objective", "number": "value", "value_type": "value_type"}),
    "user": (trial_user_attributes, {"name": "key", "json": "value_json"}),
    "system": (trial_system_attributes, {"name": "key", "json": "value_json"}),
    "intermediate": (
        intermediate_values,
        {"place": "step", "number": "intermediate_value", "intermediate_type": "intermediate_value_type"},
    ),
}


def read_frozen_trials(connection: Connection, condition: sa.ColumnElement[bool]) -> list[FrozenTrial]:
    """Return the trials of Optuna's for which a condition on their table holds, in the order of their ids.

    Each is what Optuna's own storage makes of its rows; what it raises for damaged ones is raised here, too.
    """
    chosen = sa.select(sa.select(optuna_trials.c.trial_id).where(condition).cte("chosen").c.trial_id)
    queries = {
        part: sa.select(table.c.trial_id, *(table.c[column].label(name) for name, column in columns.items())).where(
            table.c.trial_id.in_(chosen)
        )
        for part, (table, columns) in TRIAL_PARTS.items()
    }
    parts: dict[int, dict[str, list[Any]]] = {}
    for row in connection.execute(union_of(queries)):
        parts.setdefault(row.trial_id, defaultdict(list))[row.part].append(row)
    return [_frozen_trial(trial_id, parts[trial_id]) for trial_id in sorted(parts) if parts[trial_id]["trial"]]


def _frozen_trial(trial_id: int, parts: dict[str, list[Any]]) -> FrozenTrial:
    (trial,) = parts["trial"]
    params = sorted(parts["param"], key=lambda row: row.place)  # in the order in which they were drawn
    distributions = {row.name: read_distribution(row.json) for row in params}
    values: list[float] = [0.0 for _ in parts["value"]]
    for row in parts["value"]:
        values[row.place] = TrialValueModel.stored_repr_to_value(row.number, row.value_type)
    return FrozenTrial(
        number=trial.place,
        state=trial.state,
        value=None,
        values=values or None,
        datetime_start=_local_time(trial.began),
        datetime_complete=_local_time(trial.ended),
        params={row.name: distributions[row.name].to_external_repr(row.number) for row in params},
        distributions=distributions,
        user_attrs={row.name: json.loads(row.json) for row in parts["user"]},
        system_attrs={row.name: json.loads(row.json) for row in parts["system"]},
        intermediate_values={
            row.place: TrialIntermediateValueModel.stored_repr_to_intermediate_value(row.number, row.intermediate_type)
            for row in sorted(parts["intermediate"], key=lambda row: row.place)
        },
        trial_id=trial_id,
    )


def _local_time(utc: datetime | None) -> datetime | None:
    """Return a time as Optuna shows it, in this machine's zone and without saying so; its tables have it in UTC."""
    return utc and utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


@functools.lru_cache(maxsize=1000)
def read_distribution(text: str) -> BaseDistribution:
    """Return the distribution of a JSON text: those of a study's trials are the same few."""
    return json_to_distribution(text)
