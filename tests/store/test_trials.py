"""Trials: how they are read, which are the best, and that their values are those of the study's space."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from hpo.errors import UserError
from hpo.store import schema
from hpo.store.store import Store
from tests.rows import slow_except
from tests.store.helpers import Change, MakeSpec, begin, claim, report, url_of


def test_the_latest_trials_are_those_that_began_last(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(*(number / 100 for number in range(1, 7))))
    for num_begun in range(5):
        trials = store.trials.get_all(study)
        for count in range(1, 8):
            last = max(num_begun, count)
            assert store.trials.get_all(study, latest=count) == trials[max(last - count, 0) : last]
        held = claim(store, study, worker)
        report(store, held, 0.1, 0.2)
        store.trials.finish(held, "complete", reason="")


def test_trials_are_read_by_as_many_statements_as_one_and_without_optunas_copy_of_their_curves(
    store: Store, make_spec: MakeSpec
) -> None:
    statements, sent = list[str](), list[int]()
    study, worker = begin(store, make_spec(0.1, 0.2, 0.3))
    sa.event.listen(store.storage.engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
    for _ in range(3):
        held = claim(store, study, worker)
        report(store, held, 0.1, 0.2)
        statements.clear()
        assert store.trials.get_all(study)[held.number].curves == {"val_accuracy": [0.1, 0.2]}
        reading = [statement for statement in statements if statement.startswith("SELECT")]
        assert not any(schema.intermediate_values.name in statement for statement in reading)
        sent.append(len(reading))
    assert sent == [7, 7, 7]


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


@pytest.mark.parametrize("kind", ["confirm", "test"])
def test_a_store_names_no_code_for_a_trial_that_does_not_search(
    store: Store, make_spec: MakeSpec, change: Change, kind: str
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    crafted = create_trial(
        state=TrialState.RUNNING,
        params={"lr": 0.1, "model.name": "os:system"},
        distributions={"lr": FloatDistribution(0.1, 0.2), "model.name": CategoricalDistribution(["os:system"])},
    )
    trial_id = store.storage.create_new_trial(study.study_id, crafted)
    first = schema.slots_table.c.number == 0
    crafted_slot = {"kind": kind, "replicate": 0, "trial_id": trial_id, "attempt": 1}
    change(store, schema.slots_table.update().where(first).values(crafted_slot))
    claimed = store.trials.claim(study, worker)
    assert claimed is not None
    with pytest.raises(UserError, match=r"^the store gives a trial model.name = 'os:system', which is not in search"):
        store.trials.suggest(claimed, study.spec, attributes=lambda _: {})


@pytest.mark.parametrize(("given", "taken"), [({"lr": 7.0}, False), ({"model.name": "os:system"}, True)])
def test_a_store_gives_a_trial_that_searches_only_values_of_the_space(
    store: Store, make_spec: MakeSpec, change: Change, given: dict[str, object], taken: bool
) -> None:
    study, worker = begin(store, make_spec())
    change(store, schema.slots_table.update().values(given=json.dumps(given)))
    claimed = store.trials.claim(study, worker)
    assert claimed is not None
    refused = nullcontext() if taken else pytest.raises(UserError, match=r"^the store gives a trial lr = 7\.0, which")
    with refused:
        values = store.trials.suggest(claimed, study.spec, attributes=lambda _: {})
        assert values.keys() == {"lr"}
        assert 0.1 <= values["lr"] <= 1.0
