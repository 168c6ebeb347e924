"""Reading trials: the best ones."""

from __future__ import annotations

import math

import optuna
import pytest

from hpo.store.store import Store
from tests.rows import slow_except
from tests.store.helpers import MakeSpec, begin, claim, report, url_of


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("last", slow_except([math.inf, -math.inf, math.nan, 1e30, -1e30], math.nan, 1e30))
def test_a_diverged_trial_is_never_best(store: Store, make_spec: MakeSpec, direction: str, last: float) -> None:
    objective = {"function": "loop:train", "direction": direction}
    study, worker = begin(store, make_spec(0.1, 0.2, objective=objective))
    diverged, good = claim(store, study, worker), claim(store, study, worker)
    report(store, diverged, last)
    store.trials.finish(diverged, "diverged", reason="")
    report(store, good, 0.5)
    store.trials.finish(good, "complete", reason="")
    assert optuna.load_study(study_name="s", storage=url_of(store)).best_trial.number == good.number


def test_the_best_trials_are_the_complete_ones_in_the_studys_direction(store: Store, make_spec: MakeSpec) -> None:
    for name, direction, expected in (("up", "maximize", [3, 1, 0]), ("down", "minimize", [0, 1, 3])):
        objective = {"function": "loop:train", "direction": direction}
        study, worker = begin(store, make_spec(0.1, 0.2, 0.3, 0.4, 0.5, name=name, objective=objective))
        for value, state in ((0.1, "complete"), (0.5, "complete"), (0.9, "pruned"), (0.7, "complete")):
            held = claim(store, study, worker)
            report(store, held, value)
            store.trials.finish(held, state, reason="")
        assert [number for number, _ in store.trials.best(study, 9)] == expected
        assert store.trials.best(study, 1) == [(expected[0], 0.7 if name == "up" else 0.1)]
        assert store.trials.best(study, 0) == []
        assert store.trials.ended_numbers(study) == {0, 1, 2, 3}
