"""Trials that other programs add to a study with Optuna."""

from __future__ import annotations

import threading
from typing import Any

import optuna
import pytest

from hpo.store.store import Store
from hpo.study.records import StudyRecord
from tests.store.helpers import MakeSpec, begin, claim, only_postgres, optuna_trials, report, url_of


def theirs(store: Store) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=url_of(store))


def train(store: Store, study: StudyRecord, worker: str) -> int:
    held = claim(store, study, worker)
    report(store, held, 0.5)
    store.trials.finish(held, "complete", reason="")
    return held.number


def numbers_and_rates(store: Store, study: StudyRecord) -> list[tuple[int, str, Any]]:
    return [(t.number, t.state, t.params.get("lr")) for t in store.trials.get_all(study)]


def test_an_enqueued_trial_is_trained_under_the_number_that_optuna_gave_it(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 2}))
    train(store, study, worker)
    theirs(store).enqueue_trial({"lr": 0.25})
    assert store.trials.counts(study.study_id) == {"complete": 1, "waiting": 2}
    assert [train(store, study, worker) for _ in range(2)] == [1, 2]
    assert numbers_and_rates(store, study)[1] == (1, "complete", 0.25)
    assert [t.number for t in store.trials.get_all(study)] == [t.number for t in optuna_trials(store)] == [0, 1, 2]
    assert [t.params for t in store.trials.get_all(study)] == [t.params for t in optuna_trials(store)]
    assert store.problems(study) == []


def test_a_trial_enqueued_in_a_finished_study_is_left_to_train(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 1}))
    train(store, study, worker)
    theirs(store).enqueue_trial({"lr": 0.25})
    assert store.trials.num_left(study) == 1
    assert train(store, study, worker) == 1
    assert store.trials.num_left(study) == 0


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"lr": 7.0}, "lr must be a number from 0.1 to 1"), ({"momentum": 0.9}, "each key must be one of lr")],
)
def test_an_enqueued_trial_outside_of_the_space_fails_with_a_sentence_and_keeps_its_number(
    store: Store, make_spec: MakeSpec, values: dict[str, float], reason: str
) -> None:
    study, worker = begin(store, make_spec(search={"trials": 1}))
    theirs(store).enqueue_trial(values)
    assert train(store, study, worker) == 1
    refused = store.trials.get_all(study)[0]
    assert refused.state == "failed"
    assert reason in str(refused.reason)
    store.studies.retry_failed(study)  # it is as far outside as before
    assert store.trials.num_left(study) == 0
    assert store.problems(study) == []


@only_postgres
def test_no_other_program_takes_an_enqueued_trial_while_it_gets_its_slot(
    store: Store, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, worker = begin(store, make_spec(search={"trials": 1}))
    theirs(store).enqueue_trial({"lr": 7.0})
    asked: list[int] = []

    def ask_and_tell() -> None:
        taken = theirs(store).ask()
        asked.append(taken.number)
        theirs(store).tell(taken, 0.9)

    other = threading.Thread(target=ask_and_tell)
    read = store.storage.get_trial

    def begin_other(trial_id: int) -> optuna.trial.FrozenTrial:
        if other.ident is None:
            other.start()
            other.join(timeout=2)  # it waits for the claim
        return read(trial_id)

    monkeypatch.setattr(store.storage, "get_trial", begin_other)
    assert train(store, study, worker) == 1
    other.join()
    assert (asked, store.trials.get_all(study)[0].state) == ([2], "failed")


def test_enqueued_nonsense_fails_as_a_trial_and_ends_no_worker(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 1}))
    waiting = optuna.trial.create_trial(
        state=optuna.trial.TrialState.WAITING, system_attrs={"fixed_params": "nonsense"}
    )
    theirs(store).add_trial(waiting)
    assert train(store, study, worker) == 1
    assert "enqueued: each key must be one of lr" in str(store.trials.get_all(study)[0].reason)


def test_trials_that_others_add_keep_their_numbers_from_ours(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    train(store, study, worker)
    distribution = optuna.distributions.FloatDistribution(0.1, 1.0)
    theirs(store).add_trial(optuna.create_trial(params={"lr": 0.3}, distributions={"lr": distribution}, value=0.9))
    assert train(store, study, worker) == 2
    assert numbers_and_rates(store, study) == [(0, "complete", 0.1), (2, "complete", 0.2)]
    assert store.problems(study) == ["Optuna's trial 1 of study 's' has no slot: the answer does not count it"]


def test_an_enqueued_trial_that_another_program_takes_is_not_trained_twice(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 1}))
    theirs(store).enqueue_trial({"lr": 0.25})
    store.searches.enlarge(study, 2)  # gives it a slot
    assert theirs(store).ask().number == 0
    assert store.trials.claim(study, worker) is None
    assert train(store, study, worker) == 1


@pytest.mark.parametrize("reports_again", [True, False])
def test_a_trial_that_another_program_tells_fails_and_the_study_goes_on(
    store: Store, make_spec: MakeSpec, reports_again: bool
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    held = claim(store, study, worker)
    report(store, held, 0.5)
    theirs(store).tell(0, 0.99)
    if reports_again:
        with pytest.raises(Exception, match="trial 0"):
            report(store, held, 0.6, first=2)
    else:
        store.trials.finish(held, "complete", reason="trained")
    told = store.trials.get_all(study)[0]
    assert (told.state, told.value, told.reason) == ("failed", None, "another program has ended the trial with Optuna")
    assert train(store, study, worker) == 1


@pytest.mark.parametrize("value", [5, "text", [1], {"reason": 3}, {"other": "key", "reason": "none of ours"}])
def test_user_attributes_of_other_programs_that_have_our_names_do_no_harm(
    store: Store, make_spec: MakeSpec, value: Any
) -> None:
    study, _ = begin(store, make_spec(0.1))
    ours = {"lanes": 2, "reason": "measured"}
    for name in ("hpo: lanes", "hpo device failures"):
        theirs(store).set_user_attr(name, value)
    assert store.studies.get_or_set_shared(study, "lanes", ours) == ours
    assert store.studies.get_or_set_shared(study, "lanes", {**ours, "lanes": 3}) == ours
    assert store.studies.shared_values(study) == {"lanes": ours}
    assert store.workers.device_failures(study) == {}
    assert store.workers.count_device_failure(study, device="cuda:0", host="h", reason="sick").count == 1
