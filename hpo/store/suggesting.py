"""Sampling a trial's values: how the sampler sees the study, and where what it sets waits to be written at once."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, cast

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.config.study_spec import StudySpec
from hpo.search import proposals, samplers
from hpo.store.database import JoinedStorage
from hpo.store.ledger import extend_lease
from hpo.store.optuna_rows import TrialRows, set_rows, trial_rows
from hpo.study.records import Claim


class BufferedStorage:
    """The storage of one trial's sampler: it reads the study's trials once, and keeps what is set of its own one.

    So the sampler works outside any transaction, and all that it sets is written by the statement that writes the
    attributes of ours. What it asks of the study itself, such as a counter, goes to the storage.
    """

    def __init__(self, storage: JoinedStorage, spec: StudySpec, claim: Claim) -> None:
        """Buffer the trial of a claim."""
        self._storage = storage
        self._claim = claim
        self._direction = StudyDirection[spec.direction.upper()]
        self._reads_study = samplers.SAMPLERS[spec.search.sampler].reads_trials
        self._trials: list[FrozenTrial] | None = None
        self._params: dict[str, tuple[float, BaseDistribution]] = {}
        self._notes: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of the study; there is one."""
        return self._claim.study_id

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return the direction."""
        return [self._direction]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Collection[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials as they were when they were first asked for; they must not be changed."""
        if self._trials is None:
            self._trials = self._storage.cached.get_all_trials(study_id, deepcopy=False)
        return [trial for trial in self._trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial, which the caller may change."""
        if not self._reads_study:
            return self._storage.get_trial(trial_id)
        trials = self.get_all_trials(self._claim.study_id)
        found = next((trial for trial in trials if trial._trial_id == trial_id), None)
        return self._storage.get_trial(trial_id) if found is None else copy.deepcopy(found)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """Return the attributes of a trial, with those that were kept."""
        return {**self.get_trial(trial_id).system_attrs, **self._notes}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep an attribute of the trial."""
        assert trial_id == self._claim.trial_id
        self._notes[key] = value

    def set_trial_param(self, trial_id: int, name: str, internal_value: float, distribution: BaseDistribution) -> None:
        """Keep a parameter of the trial."""
        self._params[name] = (internal_value, distribution)

    def rows(self, attributes: Mapping[str, Any]) -> TrialRows:
        """Return the rows of what was kept, and of attributes of the trial for everyone to see."""
        return trial_rows(self._params, attributes, self._notes)


def sampling_study(storage: BufferedStorage, spec: StudySpec, *, number: int) -> optuna.Study:
    """Return the study as its sampler sees it for the trial of this number."""
    make_view = samplers.SAMPLERS[spec.search.sampler].study_view()
    sampler = samplers.build_sampler(spec, number=number)
    # Without the study's pruner: Hyperband would show the sampler the trials of one bracket alone.
    study = make_view(spec.name, cast(BaseStorage, storage), sampler, NopPruner())
    study.ranges = proposals.searched_ranges(spec)
    return study


def choose_values(storage: BufferedStorage, spec: StudySpec, claim: Claim) -> dict[str, Any]:
    """Return the values of a trial: those that it has or was given, or, of the search, that the sampler draws now.

    Raises:
        UserError: The store has given it values that are not in the space.
    """
    if claim.kind == "search":
        study = sampling_study(storage, spec, number=claim.number)
        values = proposals.suggest(optuna.Trial(study, claim.trial_id), spec)
    else:
        values = proposals.values_from_optuna(storage.get_trial(claim.trial_id).params)
    proposals.check_values(spec, values)
    return values


def build_suggestion(dialect_name: str, *shape: int) -> list[sa.Insert | sa.Update]:
    """Return the statements that write `TrialRows` of a shape to the trial of the claim "of", and extend its lease."""
    return [*set_rows(dialect_name, sa.bindparam("of_trial_id"), *shape), extend_lease(dialect_name)]
