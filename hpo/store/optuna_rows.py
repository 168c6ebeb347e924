"""Rows of trials in Optuna's tables, as its own calls write them, for statements that write them with ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from hpo.store.database import upsert
from hpo.store.schema import optuna_trials, trial_params, trial_system_attributes, trial_user_attributes


def utc_now() -> datetime:
    """Return the present as Optuna stores it: in UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def add_trial(connection: Connection, study_id: int, *, number: int) -> int:
    """Add a trial that is in training, and return its id; the caller has locked the study, which lacks this number."""
    row = {"study_id": study_id, "number": number, "state": TrialState.RUNNING, "datetime_start": utc_now()}
    key = connection.execute(optuna_trials.insert().values(row)).inserted_primary_key
    assert key is not None
    return int(key[0])


def descriptions(
    connection: Connection,
    trial_id: int,
    *,
    params: Mapping[str, Any] = {},
    distributions: Mapping[str, BaseDistribution] = {},
    user_attrs: Mapping[str, Any] = {},
    system_attrs: Mapping[str, Any] = {},
) -> list[sa.Insert]:
    """Return the statements that set parameters and attributes of a trial; a parameter must be new."""
    statements: list[sa.Insert] = []
    if params:
        rows = [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": distributions[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(distributions[name]),
            }
            for name, value in params.items()
        ]
        statements.append(trial_params.insert().values(rows))
    for table, attributes in ((trial_user_attributes, user_attrs), (trial_system_attributes, system_attrs)):
        if attributes:
            rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(attributes[key])} for key in attributes]
            statements.append(upsert(connection, table, rows, ["trial_id", "key"]))
    return statements
