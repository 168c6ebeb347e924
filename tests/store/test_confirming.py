"""The seeds of a confirmation: claimed one after the other, as far as the race over seeds needs them."""

from __future__ import annotations

import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.due_trials import plan_due_trials
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord
from hpo.workers.stages import add_due_trials
from tests.store.helpers import MakeSpec, begin, report, slow_on_postgres

CONFIRM = {"top": 3, "seeds": 5}
NOISE = [0.0, 0.003, -0.002, 0.001, 0.002]


def claim(store: Store, study: StudyRecord, worker: str) -> Claim | None:
    held = store.trials.claim(study, worker)
    if held is not None:
        store.trials.suggest(held, study.spec, attributes=lambda _: {})
    return held


def finish(store: Store, study: StudyRecord, held: Claim, *, apart: float) -> None:
    """End a trial with a value by which three rates are so far apart on each seed."""
    lr = store.trials.get_all(study)[held.number].params["lr"]
    luck = NOISE[(held.replicate or 0) % 5] * (1 + 10 * lr)
    report(store, held, 0.5 + apart * lr + luck)
    store.trials.finish(held, "complete", reason="")


def seeds_of(store: Store, study: StudyRecord) -> dict[float, list[int | None]]:
    """Return the seeds of each rate that confirms."""
    seeds: dict[float, list[int | None]] = {}
    for trial in store.trials.get_all(study):
        if trial.kind == "confirm":
            seeds.setdefault(trial.params["lr"], []).append(trial.replicate)
    return seeds


def confirm(store: Store, study: StudyRecord, *workers: str, apart: float) -> list[int]:
    """Train all that is left, every worker with one trial at a time, and return how many trials each round had."""
    rounds = []
    while add_due_trials(store, study):
        held = [claimed for worker in workers if (claimed := claim(store, study, worker)) is not None]
        for claimed in reversed(held):
            finish(store, study, claimed, apart=apart)
        if held:
            rounds.append(len(held))
    return rounds


@slow_on_postgres
@pytest.mark.parametrize(
    ("apart", "expected"),
    [
        (10.0, {0.5: [0, 1, 2], 0.2: [0, 1, 2], 0.1: [0, 1, 2]}),  # clearly apart: three seeds each
        (0.0, {0.5: [0, 1, 2, 3, 4], 0.2: [0, 1, 2, 3, 4], 0.1: [0, 1, 2, 3, 4]}),
    ],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_values_decide_how_many_seeds_there_are_whoever_trains_them(
    store: Store, make_spec: MakeSpec, apart: float, expected: dict[float, list[int]], num_workers: int
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.5, confirm=CONFIRM))
    others = [store.workers.add(study.study_id, device="cpu") for _ in range(num_workers - 1)]
    confirm(store, study, worker, *others, apart=apart)
    assert seeds_of(store, study) == expected
    assert store.trials.num_left(study) == 0
    assert store.problems(study) == []


def test_no_seed_is_begun_before_the_one_before_it_has_ended_and_none_that_is_not_needed(
    store: Store, make_spec: MakeSpec
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.5, confirm=CONFIRM))
    for _ in range(3):
        add_due_trials(store, study)
        held = claim(store, study, worker)
        assert held is not None
        finish(store, study, held, apart=0.0)
    add_due_trials(store, study)
    first = [held for _ in range(12) if (held := claim(store, study, worker)) is not None]
    assert [held.replicate for held in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # all that is certain to be needed
    for held in first[:-1]:
        finish(store, study, held, apart=0.0)
    assert claim(store, study, worker) is None
    store.trials.release(first[-1])  # such as by a kill
    again = claim(store, study, worker)
    assert again is not None
    assert again.number == first[-1].number
    assert claim(store, study, worker) is None
    finish(store, study, again, apart=0.0)
    second = [held for _ in range(4) if (held := claim(store, study, worker)) is not None]
    assert [held.replicate for held in second] == [3, 3, 3]
    assert store.trials.most_at_once(study) == 9


@slow_on_postgres
def test_an_enlarged_search_is_confirmed_anew_by_a_race_over_further_seeds(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(search={"trials": 3}, confirm={"top": 2, "seeds": 4})
    study, worker = begin(store, spec)
    confirm(store, study, worker, apart=10.0)
    before = seeds_of(store, study)
    store.searches.enlarge(study, 5)
    study = store.studies.get("s")
    confirm(store, study, worker, apart=10.0)
    trials = store.trials.get_all(study)
    assert len({tuple(seeds) for seeds in before.values()}) == 1
    later = [trial.replicate for trial in trials[3 + 2 * 3 + 2 :]]
    assert later == [3, 3, 4, 4, 5, 5]
    assert store.problems(study) == []


@slow_on_postgres
def test_a_confirmation_whose_seeds_an_earlier_version_added_rate_by_rate_is_raced_like_any_other(
    store: Store, make_spec: MakeSpec
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.5, confirm=CONFIRM))
    while (held := claim(store, study, worker)) is not None:
        finish(store, study, held, apart=10.0)
    trials = store.trials.get_all(study)
    answer = find_best(study, trials)
    assert answer is not None
    planned = sorted(plan_due_trials(study, trials, answer), key=lambda trial: trial.params["lr"], reverse=True)
    assert [trial.replicate for trial in planned[:5]] == [0, 1, 2, 3, 4]
    store.studies.add_planned(study, planned, after=len(trials))
    confirm(store, study, worker, apart=10.0)
    assert store.problems(study) == []
    assert seeds_of(store, study) == {0.5: [0, 1, 2], 0.2: [0, 1, 2], 0.1: [0, 1, 2]}
