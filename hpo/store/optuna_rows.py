"""Rows of trials in Optuna's tables, as its own calls write them, for statements that write them with ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from hpo.store.database import upsert
from hpo.store.prepared import named_rows, row_values
from hpo.store.schema import optuna_trials, trial_params, trial_system_attributes, trial_user_attributes

TrialId = sa.ColumnElement[int]
PARAM = ("param_name", "param_value", "distribution_json")
ATTRIBUTE = ("key", "value_json")


class TrialRows(NamedTuple):
    """Rows of a trial, without its id: parameters that it lacks, and attributes."""

    params: list[dict[str, Any]]
    user: list[dict[str, Any]]
    system: list[dict[str, Any]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many of each there are, for `set_rows`."""
        return len(self.params), len(self.user), len(self.system)

    @property
    def values(self) -> dict[str, Any]:
        """The values by the names that `set_rows` gives them."""
        return row_values("param", self.params) | row_values("user", self.user) | row_values("system", self.system)


def utc_now() -> datetime:
    """Return the present as Optuna stores it: in UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def trial_rows(
    params: Mapping[str, tuple[float, BaseDistribution]], user: Mapping[str, Any], system: Mapping[str, Any]
) -> TrialRows:
    """Return the rows of parameters, given by the number that Optuna keeps of each, and of attributes."""
    return TrialRows(
        [
            {"param_name": name, "param_value": value, "distribution_json": distribution_to_json(distribution)}
            for name, (value, distribution) in params.items()
        ],
        *([{"key": key, "value_json": json.dumps(of[key])} for key in of] for of in (user, system)),
    )


def rows_of(trial: FrozenTrial) -> TrialRows:
    """Return the rows of all that a new trial has."""
    params = {name: (kind.to_internal_repr(trial.params[name]), kind) for name, kind in trial.distributions.items()}
    return trial_rows(params, trial.user_attrs, trial.system_attrs)


def insert_trial() -> Any:
    """Return the statement that adds a trial in training: `new_number` of the study `of_study_id`, begun at `utc`.

    It returns the trial's id. The study is locked, and lacks this number.
    """
    row = {
        "study_id": sa.bindparam("of_study_id"),
        "number": sa.bindparam("new_number"),
        "state": TrialState.RUNNING,
        "datetime_start": sa.bindparam("utc"),
    }
    return optuna_trials.insert().values(row).returning(optuna_trials.c.trial_id)


def set_rows(dialect_name: str, trial_id: TrialId, num_params: int, num_user: int, num_system: int) -> list[sa.Insert]:
    """Return the statements that write `TrialRows` of a shape to a trial.

    A parameter that another program has set meanwhile is replaced, too: in SQLite two programs that ask for an enqueued
    trial at the same moment may both get it.
    """
    return [
        upsert(dialect_name, table, {"trial_id": trial_id, **row}, ["trial_id", columns[0]])
        for name, table, columns, count in (
            ("param", trial_params, PARAM, num_params),
            ("user", trial_user_attributes, ATTRIBUTE, num_user),
            ("system", trial_system_attributes, ATTRIBUTE, num_system),
        )
        for row in named_rows(name, columns, count)
    ]
