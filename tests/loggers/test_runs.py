"""Runs follow from the store alone: a trial that has not changed is the same run, whoever looks at it and when."""

from __future__ import annotations

from dataclasses import replace

from hpo.analysis.answer import find_best
from hpo.loggers.runs import ANSWER, Point, Run, make_runs
from hpo.study.records import Attempt, StudyRecord, TrialRecord
from tests.analysis.examples import SEARCHED, complete, make_study, make_trials, numbered, reporting


def attempt(number: int, began: float) -> Attempt:
    return Attempt(number, "worker", "host", "cpu", began, None, 0, None, None, None, None)


def study_named(uid: str = "1234abcd", **metadata: str) -> StudyRecord:
    study = make_study(**SEARCHED)
    return replace(study, metadata={**study.metadata, "uid": uid, **metadata})


def runs_of(study: StudyRecord, trials: list[TrialRecord]) -> dict[str, Run]:
    return {run.name: run for run in make_runs(study, trials, find_best(study, trials))}


def test_a_trial_is_a_run_with_its_finite_points_at_their_times_and_its_value() -> None:
    (trial,) = reporting((0.1, [0.5, None]), state="complete")
    curves = {**trial.curves, "seconds": [2.0, 3.0]}
    trial = replace(trial, curves=curves, value=0.75, attempts=[attempt(1, 100.0), attempt(2, 150.0)], ended=200.0)
    run = runs_of(study_named(), [trial])["trial-0"]
    assert (run.run_id, run.study, run.params, run.began, run.ended) == (
        "s-1234abcd-trial-0",
        "s",
        {"lr": 0.1},
        100,
        200,
    )
    assert run.points == [
        Point("val_accuracy", 1, 0.5, 102.0),
        Point("seconds", 1, 2.0, 102.0),
        Point("seconds", 2, 3.0, 105.0),
        Point("value", 2, 0.75, 105.0),
    ]


def test_a_run_stays_what_it_is_in_a_copy_of_the_study_and_changes_with_its_trial() -> None:
    (trial,) = reporting((0.1, [0.5, 0.6]))
    run, in_a_copy = (
        runs_of(study, [trial])["trial-0"] for study in (study_named(), study_named("9" * 8, origin="1234abcd"))
    )
    assert in_a_copy.run_id == run.run_id
    assert in_a_copy.digest == run.digest
    assert runs_of(study_named(), [replace(trial, state="pruned", value=0.6)])["trial-0"].digest != run.digest
    assert runs_of(study_named("9" * 8), [trial])["trial-0"].run_id != run.run_id


def test_trials_that_have_not_begun_are_no_runs() -> None:
    waiting, stopped = make_trials((0.1, "waiting"), (0.2, "waiting"))
    assert runs_of(study_named(), [replace(waiting, attempt=0), stopped]).keys() == {"trial-1"}


def test_the_answer_is_a_run_while_nothing_is_in_training_and_marks_the_rate_that_no_trial_has_had() -> None:
    trials = numbered(*complete())
    study = study_named()
    best = find_best(study, trials)
    assert best is not None
    found = runs_of(study, trials)
    answer = found[ANSWER]
    assert answer.is_recommended
    assert answer.params == best.recommended
    assert {point.metric for point in answer.points} == {"value", "lr_low", "lr_high"}
    assert answer.text.startswith("best learning rate")
    marked = [run.name for run in found.values() if run.is_recommended]
    assert marked == [f"trial-{t.number}" for t in trials if best.is_recommended(t.params)] + [ANSWER]
    assert ANSWER not in runs_of(study, [*trials, replace(trials[0], number=16, state="running", value=None)])
