"""Sampling a trial's values: how the sampler sees the study, and where its notes wait for the transaction."""

from __future__ import annotations

from typing import Any, cast

import optuna
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage

from hpo.config.study_spec import StudySpec
from hpo.search import proposals, samplers


class BufferedStorage:
    """A storage that keeps what a sampler notes on trials until `write`; the sampler works outside any transaction."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._notes: list[tuple[int, str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep an attribute of a trial."""
        self._notes.append((trial_id, key, value))

    def write(self) -> None:
        """Write the attributes that were kept to the storage."""
        for note in self._notes:
            self._storage.set_trial_system_attr(*note)
        self._notes.clear()


def sampling_study(storage: BufferedStorage, spec: StudySpec, *, number: int) -> optuna.Study:
    """Return the study as its sampler sees it for the trial of this number."""
    make_view = samplers.SAMPLERS[spec.search.sampler].study_view()
    sampler = samplers.build_sampler(spec, number=number)
    # Without the study's pruner: Hyperband would show the sampler the trials of one bracket alone.
    study = make_view(spec.name, cast(BaseStorage, storage), sampler, NopPruner())
    study.ranges = proposals.searched_ranges(spec)
    study.get_trials(deepcopy=False)  # the cache refuses parameters of a trial that it has not seen
    return study
