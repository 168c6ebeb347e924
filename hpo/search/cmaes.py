"""CMA-ES (Hansen, arXiv:1604.00772) through Optuna's sampler, whose state is told again and never kept in the store.

Optuna pickles its optimizer into the trials of a study and unpickles what it finds there: whoever can write to the
store could run code on every worker. What the optimizer has learnt follows from the trials alone, so it is made anew
for each trial (all begin at the same mean and step size, whatever their seed) and told one generation after the other.
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

    A generation is told with the first of its trials to complete: those that complete once it is full change nothing,
    and every worker tells it alike.
    """

    _completed: Sequence[FrozenTrial] = ()

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> None:
        self._completed = completed_trials  # for `_init_optimizer`: Optuna calls it next, as nothing is restored

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        optimizer: Any = super()._init_optimizer(trans, direction)
        generations = defaultdict(list)
        for trial in sorted(self._completed, key=lambda trial: (trial.datetime_complete or datetime.max, trial.number)):
            generations[trial.system_attrs.get(self._attr_key_generation)].append(trial)
        sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        while len(full := generations[optimizer.generation]) >= optimizer.population_size:
            told = full[: optimizer.population_size]
            optimizer.tell([(trans.transform(trial.params), sign * trial.values[0]) for trial in told])
        return optimizer

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        return {}  # what Optuna would write to the store, where it tells a generation itself
