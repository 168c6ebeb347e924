"""A search that ends before it has had all of its trials, and the bounds that it may be given later."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.search_space import intersection_search_space

from hpo.errors import UserError
from hpo.search.proposals import values_left
from hpo.store import schema
from hpo.store.searches import _covered
from hpo.store.store import Store
from hpo.store.suggesting import BufferedStorage, sampling_study
from hpo.study.records import StudyRecord
from tests.rows import slow_except
from tests.store.helpers import MakeSpec, begin, claim, only_sqlite, report, url_of

HOUR_S = 3600.0
LIMITED = {"trials": 6, "until": "0.3 decades", "space": {"lr": {"low": 1e-4, "high": 1.0, "log": True}}}


def train(store: Store, study: StudyRecord, worker: str, count: int = 1) -> None:
    for _ in range(count):
        held = claim(store, study, worker)
        report(store, held, 0.5)
        store.trials.finish(held, "complete", reason="")


def states(store: Store, study: StudyRecord) -> list[str]:
    return [trial.state for trial in store.trials.get_all(study)]


def test_the_end_drops_what_nobody_has_begun_once_and_says_why(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search=LIMITED))
    train(store, study, worker, 2)
    held = claim(store, study, worker)
    store.trials.release(claim(store, study, worker))
    assert store.searches.progress(study) == (2, 2, 2)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: Store(url_of(store)).searches.end(study, "enough"), range(3)))
    assert states(store, study) == ["complete", "complete", "running", "waiting"]
    assert store.searches.progress(study) == (0, 2, 2)
    study = store.studies.get("s")
    assert study.search_end == "enough"
    assert study.spec.num_trials == 6
    report(store, held, 0.5)
    store.trials.finish(held, "complete", reason="")
    train(store, study, worker)  # what was given back is trained to its end
    assert store.trials.num_left(study) == 0
    assert store.problems(study) == []


def test_an_ended_search_has_more_trials_only_where_its_bounds_change(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(search=LIMITED)
    study, worker = begin(store, spec)
    train(store, study, worker, 2)
    store.searches.end(study, "enough")
    for same in (spec, make_spec(search=LIMITED | {"trials": 9})):  # by the same file, and a larger one
        study = store.studies.create(same, metadata={})
        assert len(states(store, study)) == 2
        assert study.search_end == "enough"
    with pytest.raises(UserError, match=r"--trials must be at least 2, .* got 1"):
        store.searches.enlarge(study, 1)
    with pytest.raises(UserError, match=r"search\.until must be .* got 'soon'"):
        store.searches.enlarge(study, until="soon")
    store.searches.enlarge(study, until="0.1 decades")
    stricter = store.studies.get("s")
    assert stricter.search_end is None
    assert stricter.spec.search.until == "0.1 decades"
    assert len(states(store, stricter)) == 9
    store.searches.end(study, "a worker that knows the former goal")
    assert store.studies.get("s").search_end is None
    store.searches.end(stricter, "enough")
    store.searches.enlarge(study, 4)  # whoever asks for so many wants them, whatever the limits say
    study = store.studies.get("s")
    assert study.spec.search.limits == (None, None)
    assert states(store, study) == ["complete", "complete", "waiting", "waiting"]
    train(store, study, worker, 2)
    assert store.problems(study) == []


@only_sqlite
def test_a_grid_that_ended_goes_on_with_the_points_it_lacks(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"sampler": "grid", "hours": 1.0, "space": {"lr": [0.1, 0.2, 0.5]}}))
    train(store, study, worker)
    store.searches.end(study, "enough")
    with pytest.raises(UserError, match="--trials cannot enlarge a grid; study 's' has 3 points"):
        store.searches.enlarge(study, 4)
    store.searches.enlarge(study, 3)
    train(store, study, worker, 2)
    assert [trial.params["lr"] for trial in store.trials.get_all(study)] == [0.1, 0.2, 0.5]


def test_values_that_are_left_follow_those_that_were_given(make_spec: MakeSpec) -> None:
    space = {"lr": {"low": 1e-4, "high": 1.0, "log": True}}
    spec = make_spec(search={"trials": 9, "space": space, "try_first": [{"lr": 0.5}]})
    every = values_left(spec, [])
    assert every[0] == {"lr": 0.5}
    assert every[-1] == {}
    assert values_left(spec, every[:2]) == every[2:]


def shift(store: Store, number: int, *, began: float, ended: float | None, outcome: str | None) -> None:
    table = schema.attempts_table
    changed = {"began_at": began, "ended_at": ended, "outcome": outcome}
    with store.storage.engine.begin() as connection:
        connection.execute(table.update().where(table.c.number == number).values(changed))


def test_time_in_training_leaves_out_pauses_and_counts_workers_at_once_once(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 5}))
    train(store, study, worker, 4)
    claim(store, study, worker)
    with store.storage.engine.begin() as connection:  # the last sign of life: the worker was killed at 20 h
        connection.execute(schema.workers_table.update().values(seen_at=20 * HOUR_S))
    shift(store, 0, began=0.0, ended=2 * HOUR_S, outcome="complete")
    shift(store, 1, began=1 * HOUR_S, ended=3 * HOUR_S, outcome="released")  # at the same time, then a pause
    shift(store, 2, began=9 * HOUR_S, ended=10 * HOUR_S, outcome="complete")
    shift(store, 3, began=19 * HOUR_S, ended=50 * HOUR_S, outcome="lost")  # found dead a day later
    shift(store, 4, began=19.5 * HOUR_S, ended=None, outcome=None)
    assert store.searches.hours_in_training(study) == pytest.approx(5.0)
    with store.storage.engine.begin() as connection:
        connection.execute(sa.delete(schema.workers_table))
    assert store.searches.hours_in_training(study) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("spans", "covered"),
    [([], 0.0), ([(0, 1), (5, 6)], 2.0), ([(5, 6), (0, 9), (1, 2)], 9.0), ([(0, 2), (1, 3)], 3.0), ([(2, 1)], 0.0)],
)
def test_what_spans_cover(spans: Any, covered: float) -> None:
    assert _covered(spans) == covered


SAMPLERS_THAT_LEARN = ["tpe", "gp", "cmaes", "qmc"]


@only_sqlite
@pytest.mark.parametrize("sampler", slow_except(SAMPLERS_THAT_LEARN, "tpe"))
def test_a_widened_search_keeps_its_trials_and_its_sampler_learns_from_all_of_them(
    store: Store, make_spec: MakeSpec, sampler: str
) -> None:
    space = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}, "momentum": {"low": 0.0, "high": 0.9}}
    study, worker = begin(store, make_spec(search={"sampler": sampler, "trials": 8, "space": space}))
    for _ in range(8):
        held = claim(store, study, worker)
        report(store, held, store.trials.get_all(study)[held.number].params["lr"])  # the higher, the better
        store.trials.finish(held, "complete", reason="")
    before = store.trials.get_all(study)
    store.searches.enlarge(study, widening={"lr": (1e-4, 10.0)})
    study = store.studies.get("s")
    assert (study.spec.search.space["lr"], study.spec.num_trials) == ({"low": 1e-4, "high": 10.0, "log": True}, 20)
    assert store.trials.get_all(study)[:8] == before
    rates = []
    for _ in range(12):
        held = claim(store, study, worker)
        rates.append(store.trials.get_all(study)[held.number].params["lr"])
        report(store, held, rates[-1])
        store.trials.finish(held, "complete", reason="")
    assert any(1e-4 <= lr < 1e-3 for lr in rates)
    assert any(0.1 < lr <= 10 for lr in rates)
    seen = sampling_study(BufferedStorage(store.storage, study.spec, held), study.spec, number=20)
    # A parameter whose range differs between trials is none that they have in common.
    assert intersection_search_space(seen.get_trials(deepcopy=False)).keys() == {"lr", "momentum"}
    assert store.problems(study) == []


@only_sqlite
def test_a_search_is_widened_in_training_and_after_an_early_end_and_claims_ask_for_the_new_range(
    store: Store, make_spec: MakeSpec
) -> None:
    study, worker = begin(store, make_spec(search=LIMITED))
    held = claim(store, study, worker)
    store.searches.end(study, "enough")
    store.searches.enlarge(study, 3, widening={"lr": (1e-5, 1.0)})
    assert store.searches.is_outdated(study)
    assert store.trials.claim(study, worker) is None  # by who knows the former range
    store.searches.grow(study, (1e-6, 1.0))  # so has no say in it, either
    report(store, held, 0.5)
    store.trials.finish(held, "complete", reason="")
    study = store.studies.get("s")
    assert (study.search_end, study.spec.search.limits) == (None, (None, None))
    assert study.spec.search.space["lr"]["low"] == 1e-5
    train(store, study, worker, 2)
    lrs = [trial.params["lr"] for trial in store.trials.get_all(study)]
    assert 1e-5 <= lrs[1] < 1e-4
    assert store.trials.num_left(study) == 0
    assert store.problems(study) == []


@only_sqlite
def test_the_last_trial_of_a_search_that_may_grow_is_begun_only_by_who_has_seen_that_it_should_not(
    store: Store, make_spec: MakeSpec
) -> None:
    study, worker = begin(store, make_spec(search={"trials": 2, "grow": True, "space": LIMITED["space"]}))
    held = store.trials.claim(study, worker, may_begin_last=False)
    assert held is not None
    assert store.trials.claim(study, worker, may_begin_last=False) is None
    store.trials.release(held)  # what was begun is anybody's
    assert store.trials.claim(study, worker, may_begin_last=False) is not None
    last = store.trials.claim(study, worker, may_begin_last=True)
    assert last is not None
    assert last.number == 1
