"""Suggestions: what the sampler is shown, and what is written of a trial's values, in few statements."""

from __future__ import annotations

import math
from datetime import datetime
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
from tests.store.helpers import (
    MakeSpec,
    begin,
    claim,
    everything,
    meanwhile,
    only_sqlite,
    optuna_trials,
    report,
    time_zone,
    trial,
    url_of,
)


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


def test_times_are_read_as_optunas_own_storage_reads_them_wherever_the_machine_stands(
    store: Store, make_spec: MakeSpec
) -> None:
    with time_zone("Asia/Kolkata"):
        study, worker = begin(store, make_spec(search={"trials": 2}))
        held = claim(store, study, worker)
        report(store, held, 0.5)
        store.trials.finish(held, "complete", reason="")
        claim(store, study, worker)
        theirs = RDBStorage(url_of(store)).get_all_trials(study.study_id)
        assert store.storage.get_all_trials(study.study_id) == theirs
        assert abs((theirs[0].datetime_start or datetime.min) - datetime.now()).total_seconds() < 600


def test_a_sampler_sees_a_trial_that_another_process_has_tried_again(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 9, "sampler": "tpe"}))
    store.trials.finish(claim(store, study, worker), "failed", reason="")
    other = Store(url_of(store))
    claim(other, study, worker)  # whose sampler has read the trial as failed

    def seen() -> list[tuple[TrialState, float | None]]:
        trials = other.database.cached.get_all_trials(study.study_id)
        return [(trial.state, trial.value) for trial in trials if trial.number == 0]

    store.studies.retry_failed(study)
    again = claim(store, study, worker)
    assert (again.number, seen()) == (0, [(TrialState.RUNNING, None)])
    report(store, again, 0.5)
    store.trials.finish(again, "complete", reason="")
    assert seen() == [(TrialState.COMPLETE, 0.5)]


def test_a_value_that_another_program_has_set_meanwhile_ends_no_worker(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 2, "sampler": "tpe"}))
    claimed = store.trials.claim(study, worker)
    assert claimed is not None
    theirs = RDBStorage(url_of(store))
    lr = FloatDistribution(0.1, 1.0)
    with meanwhile(store, lambda: theirs.set_trial_param(claimed.trial_id, "lr", 0.5, lr), at=1):
        values = store.trials.suggest(claimed, study.spec, attributes=lambda _: {})
    assert optuna_trials(store)[0].params == values != {"lr": 0.5}


@only_sqlite
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_trial_of_a_deleted_study_is_not_looked_for_in_the_next_one(
    store: Store, make_spec: MakeSpec, sampler: str
) -> None:
    spec = make_spec(search={"trials": 2, "sampler": sampler})
    study, worker = begin(store, spec)
    claim(store, study, worker)
    claimed = store.trials.claim(study, worker)
    assert claimed is not None
    optuna.delete_study(study_name="s", storage=url_of(store))
    assert begin(Store(url_of(store)), spec)[0].study_id == study.study_id
    with pytest.raises(KeyError, match="no trial with the id 2"):
        store.trials.suggest(claimed, spec, attributes=lambda _: {})


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
