"""Suggestions: what the sampler is shown, and what is written of a trial's values, in few statements."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from hpo.store.ledger import ENDED_ELSEWHERE, ClaimLost
from hpo.store.store import Store
from tests.rows import slow_except
from tests.store.helpers import MakeSpec, begin, claim, everything, optuna_trials, report, trial, url_of


def test_trials_are_read_by_one_statement_as_optunas_own_storage_reads_them(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 3}))
    report(store, claim(store, study, worker), 0.5, math.inf, math.nan, -math.inf)
    distributions = {
        "z": FloatDistribution(0.0, 1.0),
        "optimizer": CategoricalDistribution(["adam", "sgd"]),
        "batch": IntDistribution(1, 64, log=True),
    }
    for state, value in ((TrialState.COMPLETE, math.inf), (TrialState.PRUNED, None), (TrialState.FAIL, None)):
        crafted = create_trial(
            state=state,
            value=value,
            params={"z": 0.25, "optimizer": "sgd", "batch": 8},
            distributions=distributions,
            user_attrs={"text": "é", "list": [1, None]},
            system_attrs={"object": {"a": 1.5}},
        )
        store.storage.create_new_trial(study.study_id, crafted)
    theirs = RDBStorage(url_of(store))
    statements = list[str]()
    sa.event.listen(store.storage.engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
    ours = store.storage.get_all_trials(study.study_id)
    assert len(statements) == 1
    expected = theirs.get_all_trials(study.study_id)
    assert str(ours) == str(expected)  # nan differs from nan; the order of parameters counts
    assert [trial.state for trial in ours] == [
        TrialState.RUNNING,
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
    ]
    ids = [trial._trial_id for trial in ours]
    assert [str(store.storage.get_trial(of)) for of in ids] == [str(theirs.get_trial(of)) for of in ids]
    named = store.storage._get_trials(study.study_id, None, {ids[0]}, ids[2])
    assert [trial.number for trial in named] == [0, 3]
    assert store.storage._get_trials(study.study_id, (TrialState.PRUNED,), set(), -1) == [ours[2]]
    assert store.storage._get_trials(study.study_id, None, set(), ids[3]) == []
    with pytest.raises(KeyError):
        store.storage.get_trial(ids[3] + 1)
    with pytest.raises(KeyError):
        store.storage.get_all_trials(study.study_id + 1)


@pytest.mark.parametrize("sampler", slow_except(["tpe", "random", "gp", "cmaes"], "tpe", "random"))
def test_a_suggestion_is_three_statements_and_writes_what_optuna_writes(
    store: Store, make_spec: MakeSpec, sampler: str
) -> None:
    space = {"lr": {"low": 1e-4, "high": 1.0, "log": True}, "momentum": {"low": 0.0, "high": 0.9}}
    study, worker = begin(store, make_spec(search={"trials": 9, "sampler": sampler, "space": space}))
    for number in range(8):
        held = claim(store, study, worker)
        report(store, held, number / 10)
        store.trials.finish(held, "complete", reason="")
    claimed = store.trials.claim(study, worker)
    assert claimed is not None
    engine, statements = store.storage.engine, list[str]()
    sa.event.listen(engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
    values = store.trials.suggest(claimed, study.spec, attributes=lambda values: {"seed": 1, "host": "here"})
    if engine.dialect.name == "postgresql":
        assert len(statements) == 3, statements
    assert store.trials.suggest(claimed, study.spec, attributes=lambda _: {}) == values, "they are drawn once"
    written = optuna_trials(store)[claimed.number]
    assert (written.params, written.user_attrs) == (values, {"seed": 1, "host": "here"})
    assert trial(store, study, claimed.number).params == values
    assert ("tpe:relative_params" in str(written.system_attrs)) == (sampler == "tpe")
    drawn = optuna.load_study(study_name="s", storage=url_of(store)).ask(fixed_distributions=written.distributions)
    assert drawn.params.keys() == values.keys(), "another program can go on in the study"


def test_no_value_is_written_to_a_trial_that_another_program_has_ended(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 2}))
    claimed = store.trials.claim(study, worker)
    assert claimed is not None
    store.storage.set_trial_state_values(claimed.trial_id, TrialState.FAIL)

    def params() -> Any:
        return everything(store)["trial_params"]

    before = params()
    with pytest.raises(ClaimLost):
        store.trials.suggest(claimed, study.spec, attributes=lambda _: {"seed": 1})
    assert params() == before == []
    assert (trial(store, study).state, trial(store, study).reason) == ("failed", ENDED_ELSEWHERE)
