"""Judging: the trials that a pruner compares, as it sees them; Optuna's own pruner decides."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


def bare_trial(trial_id: int, number: int, state: TrialState) -> FrozenTrial:
    """Return a trial of Optuna's that has neither parameters nor values yet."""
    return FrozenTrial(
        number,
        state,
        None,
        None,
        None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=trial_id,
    )


class ComparedTrials:
    """A storage for Optuna's pruners: the trials that they compare, and the notes that they make on them.

    Attributes:
        notes: The attributes that pruners have set, by trial and key.
    """

    def __init__(self, trials: Mapping[int, FrozenTrial], *, direction: str) -> None:
        """Show `trials`, by their ids, as those of a study that is optimized in a direction."""
        self._trials = dict(trials)
        self._direction = StudyDirection[direction.upper()]
        self.notes: dict[tuple[int, str], Any] = {}

    def should_prune(self, study_name: str, pruner: BasePruner, trial_id: int) -> bool:
        """Return whether the pruner stops a trial now; it sees what it has noted on others before."""
        study = optuna.Study(study_name, cast(BaseStorage, self), pruner=pruner)
        return bool(pruner.prune(study, copy.copy(self._trials[trial_id])))

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return an id; there is one study."""
        return 0

    def get_study_directions(self, study_id: int) -> Sequence[StudyDirection]:
        """Return the direction."""
        return [self._direction]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Collection[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials in the order of their numbers."""
        trials = sorted(self._trials.values(), key=lambda trial: trial.number)
        return [trial for trial in trials if states is None or trial.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Note an attribute of a trial; a list of trials that was read before does not change."""
        noted = copy.copy(self._trials[trial_id])
        noted._system_attrs = {**noted.system_attrs, key: value}
        self._trials[trial_id] = noted
        self.notes[trial_id, key] = value
