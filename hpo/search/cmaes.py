"""CMA-ES (Hansen, arXiv:1604.00772) through Optuna's sampler, with its state replayed and never kept in the store.

Optuna pickles its optimizer into the trials of a study and unpickles what it finds there: whoever can write to the
store could run code on every worker. The optimizer's state follows from the trials alone. So each trial gets a fresh
optimizer (all start at the same mean and step size, whatever their seed), which is told one generation after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from optuna.samplers import CmaEsSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial


class ReplayedCmaEsSampler(CmaEsSampler):
    """Optuna's CMA-ES without its pickles; one sampler is used for one trial, from one thread.

    A generation consists of the first of its trials to complete. Trials that complete once it is full change nothing,
    so that every worker tells the same generation.
    """

    _completed: Sequence[FrozenTrial] = ()

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> None:
        self._completed = completed_trials  # Optuna calls `_init_optimizer` next, as nothing is restored

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        optimizer: Any = super()._init_optimizer(trans, direction)
        generations = defaultdict(list)
        for trial in sorted(self._completed, key=lambda trial: (trial.datetime_complete or datetime.max, trial.number)):
            generations[trial.system_attrs.get(self._attr_key_generation)].append(trial)
        sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        while len(full := generations[optimizer.generation]) >= optimizer.population_size:
            generation = full[: optimizer.population_size]
            optimizer.tell([(trans.transform(trial.params), sign * trial.values[0]) for trial in generation])
        return optimizer

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        return {}  # Optuna would write these to the store when it tells a generation
