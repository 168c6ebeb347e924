"""Trials in the lanes of an engine: alone or together, in turns, and shared among workers."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.answer_text import answer_lines
from hpo.analysis.trials import value_of
from hpo.api import exporting, reading
from hpo.config.study_spec import StudySpec
from hpo.store import schema
from hpo.store.store import Store
from hpo.store.trials import Trials
from hpo.study.records import StudyRecord
from tests.workers.training import SEVERAL, curves_of, engine_study, work


def test_the_engine_reports_every_epoch_of_every_trial(store: Store) -> None:
    trials = work(store, engine_study(store, 1e-3, 1e30))
    assert [trial.state for trial in trials] == ["complete", "diverged"]
    assert trials[0].epochs == [1, 2]
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"} <= trials[0].curves.keys()
    assert trials[0].value == trials[0].curves["val_accuracy"][-1]
    assert trials[1].value is None


def test_trials_in_lanes_end_as_they_do_one_at_a_time(store: Store) -> None:
    studies = {lanes: engine_study(store, *SEVERAL, epochs=3, lanes=lanes, name=f"in-{lanes}") for lanes in (1, 3)}
    found = {lanes: work(store, study) for lanes, study in studies.items()}
    for single, stacked in zip(found[1], found[3], strict=True):
        assert (stacked.state, stacked.epochs, stacked.attempt) == (single.state, single.epochs, 1)
        for name in ("train_loss", "val_loss", "val_accuracy", "lr"):
            pairs = zip(stacked.curves[name], single.curves[name], strict=True)
            assert all(one == pytest.approx(other, rel=1e-3) for one, other in pairs if None not in (one, other))
    (agreed,) = store.studies.shared_values(studies[3]).values()
    assert agreed["reason"] == "3 trials at once on the CPU: engine.lanes = 3"


@pytest.mark.parametrize(("metric", "sign"), [("val_loss", -1), ("macro_f1", 1)])
def test_the_search_follows_its_metric(store: Store, metric: str, sign: int) -> None:
    settings = engine_study(store, 1e-4, 3e-3, 1e30, metric=metric, loss="bce", name="unused").spec.frozen()
    settings |= {"name": "metric", "confirm": {"top": 1, "seeds": 2}}
    study = store.studies.create(StudySpec.from_dict(settings), metadata={"num_classes": 10, "num_val": 288})
    trials = work(store, study)
    *searched, dead = [trial for trial in trials if trial.kind == "search"]
    assert dead.state == "diverged"
    assert [trial.value for trial in searched] == [trial.curves[metric][-1] for trial in searched]
    values = [sign * value_of(trial) for trial in searched]
    best, value = store.trials.best(study, 1)[0]
    assert (best, sign * value) == (values.index(max(values)), max(values))
    confirmed = [trial for trial in trials if trial.kind == "confirm"]
    equal = {trial.params["lr"] for trial, own in zip(searched, values, strict=True) if own == max(values)}
    assert {trial.params["lr"] for trial in confirmed} <= equal
    answer = find_best(study, trials)
    assert answer is not None
    lines = "\n".join(answer_lines(study, answer))
    assert {"val_loss": "validation loss", "macro_f1": "validation macro F1"}[metric] in lines


def test_a_lane_is_filled_again_while_others_train(store: Store) -> None:
    """Check that the third trial takes the lane of the second, which diverges, before the first has ended."""
    pruner = {"name": "threshold", "upper": 1.0, "lower": 0.0, "warmup_epochs": 0}
    study = engine_study(store, 1e-3, 1e30, 1e-4, epochs=4, lanes=2, pruner=pruner)
    trials = work(store, study)
    assert [trial.state for trial in trials] == ["complete", "diverged", "complete"]
    assert trials[2].started is not None
    assert trials[0].ended is not None
    assert trials[2].started < trials[0].ended


@pytest.mark.usefixtures("prompt_reports")
def test_trials_in_lanes_go_on_bit_for_bit(store: Store) -> None:
    """Check it whatever is in the other lanes: a worker with more lanes resumes the interrupted study."""
    expected = work(store, engine_study(store, *SEVERAL, epochs=4, lanes=2, name="whole"))
    study = engine_study(store, *SEVERAL, epochs=4, lanes=2, name="cut")
    work(store, study, should_stop=lambda: sum(len(trial.epochs) for trial in store.trials.get_all(study)) >= 3)
    assert {trial.state for trial in store.trials.get_all(study)} >= {"waiting"}
    study = store.studies.create(StudySpec.from_dict(study.spec.frozen() | {"engine": {"lanes": 4}}), metadata={})
    found = work(store, study)
    assert curves_of(found) == curves_of(expected)
    assert max(trial.attempt for trial in found) == 2
    assert {attempt.resumed_from for trial in found for attempt in trial.attempts[1:]} <= {1, 2}


def test_memory_that_runs_out_beside_others_is_nobodys_failure(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hpo.train.engines.stack import TrialStack

    step, most = TrialStack.step, []

    def step_in_little_memory(self: Any, *batch: Any) -> Any:
        if len(self) > 2:
            raise torch.OutOfMemoryError("out of memory")
        most.append(len(self))
        return step(self, *batch)

    monkeypatch.setattr("hpo.train.engines.planning._rate", lambda *_, **__: 1.0)
    monkeypatch.setattr(TrialStack, "step", step_in_little_memory)
    trials = work(store, engine_study(store, 1e-4, 3e-4, 1e-3, 3e-3, lanes=4))
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert {attempt.outcome for trial in trials for attempt in trial.attempts} == {"complete", "released"}
    assert max(most) == 2


def test_trials_that_cannot_be_stacked_with_each_other_are_not(store: Store) -> None:
    settings = {
        "name": "kinds",
        "search": {"sampler": "grid", "space": {"lr": [1e-3], "batch_size": [25, 50]}},
        "model": {"name": "article_cnn", "width": 0.05},
        "data": {"name": "digits", "train_samples": 200, "validation_fraction": 0.2},
        "training": {"epochs": 1},
    }
    study = store.studies.create(StudySpec.from_dict(settings), metadata={})
    assert [trial.state for trial in work(store, study)] == ["complete", "complete"]
    assert store.studies.shared_values(study) == {}  # the plan follows from this space, and was not measured


def test_an_exported_trial_is_trained_as_it_was(store: Store) -> None:
    study = engine_study(store, 1e-3, 3e-3, lanes=2)
    url = store.url.render_as_string(hide_password=False)
    trials = work(store, study)
    settings = exporting.export("digits", storage=url)
    best = reading.best("digits", storage=url)
    again = work(store, store.studies.create(StudySpec.from_dict(settings), metadata={}))
    assert curves_of(again) == curves_of([trials[best.trial]])


def test_a_suspect_trains_alone(store: Store) -> None:
    """Check that it trains alone for an epoch: a crash with several trials does not tell which one caused it."""
    study = engine_study(store, 1e-4, 3e-4, 1e-3, lanes=3)
    worker_id = store.workers.add(study.study_id, device="cpu")
    held = [store.trials.claim(study, worker_id, num_held=num_held) for num_held in range(2)]
    assert None not in held
    with store.database.transaction() as connection:  # as after a crash that its supervisor saw
        connection.execute(schema.slots_table.update().where(schema.slots_table.c.number < 2).values(crashes=1))
    for claim in held:
        assert claim is not None
        store.trials.release(claim)
    store.workers.remove(worker_id)
    running_at: dict[tuple[int, int], list[int]] = {}  # the trials in training when a trial's epoch was reported
    report_all = Trials.report_all

    def noting(self: Trials, reports: Any, spec: StudySpec) -> Any:
        running = [trial.number for trial in store.trials.get_all(study) if trial.state == "running"]
        running_at.update({(report.claim.number, report.epoch): running for report in reports})
        return report_all(self, reports, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "report_all", noting)
        trials = work(store, study)
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert (running_at[0, 1], running_at[1, 1]) == ([0], [1])
    assert running_at[0, 2] == [0, 2]


def test_workers_share_what_is_left(store: Store) -> None:
    """Check that of two workers neither takes more than two of four trials, however many lanes it has."""
    study = engine_study(store, 1e-4, 3e-4, 1e-3, 3e-3, lanes=4)
    store.workers.add(study.study_id, device="cpu")  # the other one, which has claimed nothing yet
    most = 0

    def watching() -> bool:
        nonlocal most
        most = max(most, store.trials.counts(study.study_id).get("running", 0))
        return False

    trials = work(store, study, should_stop=watching)
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert most == 2


def rounds(store: Store, study: StudyRecord) -> list[list[int]]:
    """Run a worker; return after each report how many epochs each trial has reported, waiting ones left out."""
    seen: list[list[int]] = []
    report_all = Trials.report_all

    def noting(self: Trials, *args: Any) -> Any:
        verdict = report_all(self, *args)
        seen.append([max(trial.epochs, default=0) for trial in store.trials.get_all(study) if trial.state != "waiting"])
        return verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "report_all", noting)
        work(store, study)
    return seen


def test_trials_take_turns_where_the_pruner_compares_them_early(store: Store) -> None:
    asha = {"name": "asha", "min_epochs": 2, "reduction_factor": 4}
    study = engine_study(store, *SEVERAL[:3], epochs=3, lanes="auto", name="turns", pruner=asha)
    assert rounds(store, study)[:4] == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]]
    (agreed,) = store.studies.shared_values(study).values()
    assert agreed["reason"].startswith("3 trials in turns on the CPU: ")
    median = engine_study(store, *SEVERAL[:3], epochs=2, lanes="auto", name="one-by-one", pruner={"name": "median"})
    assert rounds(store, median)[:3] == [[1], [2], [2, 1]]


@pytest.mark.usefixtures("prompt_reports")
def test_trials_that_take_turns_are_all_saved_when_the_worker_leaves(store: Store) -> None:
    """Check that those that trained an epoch since they were last saved are saved too: no epoch is trained twice."""
    settings: dict[str, Any] = {"lanes": "auto", "pruner": {"name": "asha", "min_epochs": 3}, "checkpoint_epochs": 3}
    expected = work(store, engine_study(store, *SEVERAL[:3], epochs=3, name="whole", **settings))
    study = engine_study(store, *SEVERAL[:3], epochs=3, name="cut", **settings)
    work(store, study, should_stop=lambda: sum(len(trial.epochs) for trial in store.trials.get_all(study)) >= 5)
    assert [trial.epochs for trial in store.trials.get_all(study)] == [[1, 2], [1, 2], [1]]
    found = work(store, study)
    assert [trial.attempts[-1].resumed_from for trial in found] == [2, 2, 1]
    assert curves_of(found) == curves_of(expected)


def test_workers_whose_trials_take_turns_share_them(store: Store) -> None:
    """Check that two workers take four each of the eight trials that are compared at once."""
    lrs = [1e-4 * (number + 1) for number in range(12)]
    study = engine_study(store, *lrs, epochs=1, lanes="auto", pruner={"name": "asha"})
    store.workers.add(study.study_id, device="cpu")
    seen = rounds(store, study)
    assert len(seen[0]) == 4


def test_what_the_first_worker_chose_holds_for_all(store: Store) -> None:
    study = engine_study(store, 1e-4)
    store.storage.set_study_user_attr(study.study_id, "owner", "somebody")  # with Optuna's own tools
    eight, two = {"lanes": 8, "reason": "by a rule"}, {"lanes": 2, "reason": "measured"}
    assert store.studies.get_or_set_shared(study, "lanes auto on the CPU", eight) == eight
    assert store.studies.get_or_set_shared(study, "lanes auto on the CPU", two) == eight
    assert store.studies.get_or_set_shared(study, "lanes auto on some GPU", two) == two
    assert store.studies.shared_values(study) == {"lanes auto on the CPU": eight, "lanes auto on some GPU": two}


@pytest.mark.usefixtures("prompt_reports")
def test_a_race_is_run_alike_one_at_a_time_in_lanes_and_after_a_stop(store: Store) -> None:
    """Check that trials resume where they waited: of five rates ten epochs are trained, and none of them twice."""

    def race(name: str, lanes: int) -> StudyRecord:
        settings = engine_study(store, 1e-3, name=f"like-{name}", lanes=lanes, epochs=5).spec.frozen()
        space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}
        search = {"sampler": "race", "space": space, "trainings": 2.0}
        spec = StudySpec.from_dict(settings | {"name": name, "search": search})
        return store.studies.create(spec, metadata={})

    def num_epochs(study: StudyRecord) -> int:
        return sum(len(trial.epochs) for trial in store.trials.get_all(study))

    alone = work(store, race("alone", 1))
    assert sorted(len(trial.epochs) for trial in alone if trial.state != "diverged")[-2:] == [2, 5]
    assert sum(len(trial.epochs) for trial in alone) == 10
    again = [(attempt.last_epoch, attempt.resumed_from) for trial in alone for attempt in trial.attempts]
    assert all(last_epoch == resumed_from for last_epoch, resumed_from in again)
    cut = race("cut", 1)
    work(store, cut, should_stop=lambda: num_epochs(cut) >= 6)
    assert num_epochs(cut) < 10
    assert curves_of(work(store, cut)) == curves_of(alone)
    for single, stacked in zip(alone, work(store, race("lanes", 4)), strict=True):
        assert (stacked.state, stacked.epochs) == (single.state, single.epochs)
