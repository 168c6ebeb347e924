"""Rows of trials in Optuna's tables, as its own calls write them, for statements that write them with ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection

from hpo.store.database import upsert
from hpo.store.schema import optuna_trials, trial_params, trial_system_attributes, trial_user_attributes


def utc_now() -> datetime:
    """Return the present as Optuna stores it: in UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def add_trial(connection: Connection, study_id: int, trial: FrozenTrial, *, number: int) -> tuple[int, list[sa.Insert]]:
    """Add a trial that is in training; the caller has locked the study, which lacks this number.

    Returns:
        Its id, and the statements that set its parameters and attributes.
    """
    row = {"study_id": study_id, "number": number, "state": TrialState.RUNNING, "datetime_start": utc_now()}
    key = connection.execute(optuna_trials.insert().values(row)).inserted_primary_key
    assert key is not None
    trial_id = int(key[0])
    params = {name: (kind.to_internal_repr(trial.params[name]), kind) for name, kind in trial.distributions.items()}
    return trial_id, [
        *set_params(trial_id, params),
        *set_attributes(connection, trial_user_attributes, trial_id, trial.user_attrs),
        *set_attributes(connection, trial_system_attributes, trial_id, trial.system_attrs),
    ]


def set_params(trial_id: int, params: Mapping[str, tuple[float, BaseDistribution]]) -> list[sa.Insert]:
    """Return the statements, one or none, that set parameters that a trial lacks, given as Optuna keeps them."""
    rows = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": value,
            "distribution_json": distribution_to_json(distribution),
        }
        for name, (value, distribution) in params.items()
    ]
    return [trial_params.insert().values(rows)] if rows else []


def set_attributes(
    connection: Connection, table: sa.Table, trial_id: int, attributes: Mapping[str, Any]
) -> list[sa.Insert]:
    """Return the statements, one or none, that set attributes of a trial in the table of one kind of them."""
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    return [upsert(connection, table, rows, ["trial_id", "key"])] if rows else []
