"""Rows of trials in Optuna's tables, as its own calls write them, for statements that write them with ours."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection

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
    statements: list[sa.Insert] = []
    if trial.params:
        rows = [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": trial.distributions[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(trial.distributions[name]),
            }
            for name, value in trial.params.items()
        ]
        statements.append(trial_params.insert().values(rows))
    for table, attributes in (
        (trial_user_attributes, trial.user_attrs),
        (trial_system_attributes, trial.system_attrs),
    ):
        if attributes:
            rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(attributes[key])} for key in attributes]
            statements.append(table.insert().values(rows))
    return trial_id, statements
