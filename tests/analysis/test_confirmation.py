"""The best learning rates trained again: which, when, by whom, what came of it, and that nobody learns from it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytest

import hpo as api
from hpo.analysis.answer import find_best
from hpo.analysis.confirmation import Confirmation, find_confirmation
from hpo.analysis.due_trials import candidates, plan_due_trials
from hpo.analysis.text import answer_lines
from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped, UserError
from hpo.search.samplers import SAMPLERS
from hpo.search.study_views import RoundStudy
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord, TrialRecord
from hpo.workers.stages import add_due_trials

if TYPE_CHECKING:
    from tests.conftest import Hpo

MakeSpec = Callable[..., StudySpec]
WaitFor = Callable[..., Any]

RATES = [1e-4, 1e-3, 1e-2, 1e-1]


def make_study(top: int = 2, seeds: int = 3, **settings: Any) -> StudyRecord:
    search = {"sampler": "grid", "space": {"lr": RATES}}
    spec = StudySpec.from_dict({"name": "s", "search": search, "confirm": {"top": top, "seeds": seeds}, **settings})
    return StudyRecord(1, "s", spec, {"num_val": 400}, None, None, 0.0)


def make_trial(number: int, params: dict[str, Any], result: float | str, **more: Any) -> TrialRecord:
    """A trial with this value, or of this state where it did not complete."""
    state, value = ("complete", result) if isinstance(result, float) else (result, None)
    return TrialRecord(number, state, params, value, 1, None, None, None, {}, None, None, **more)


def make_trials(*rows: tuple[float, float | str]) -> list[TrialRecord]:
    """Trials of the search from (learning rate, value or state)."""
    return [make_trial(number, {"lr": lr}, result) for number, (lr, result) in enumerate(rows)]


def again(trials: list[TrialRecord], *values: list[float | str], params: list[dict[str, Any]]) -> list[TrialRecord]:
    """Trials that confirm, after `trials`: for each of `params` a value or the state of each seed."""
    rows = [
        (mine, seed, value)
        for mine, of_seeds in zip(params, values, strict=True)
        for seed, value in enumerate(of_seeds)
    ]
    return [
        make_trial(len(trials) + index, mine, value, kind="confirm", replicate=seed)
        for index, (mine, seed, value) in enumerate(rows)
    ]


def confirmed(study: StudyRecord, *values: list[float | str]) -> Confirmation:
    """The confirmation of 1e-3, 1e-2... with these values."""
    searched = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8), (1e-1, 0.4))
    params = [{"lr": rate} for rate in (1e-3, 1e-2, 1e-4)[: len(values)]]
    found = find_confirmation(study, searched + again(searched, *values, params=params), search_value=0.9)
    assert found is not None
    return found


# Which


@pytest.mark.parametrize(
    ("rows", "top", "expected"),
    [
        ([(1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8), (1e-1, "diverged")], 2, [1e-3, 1e-2]),
        ([(1e-4, 0.5), (1e-3, 0.9), (1.1e-3, 0.89), (1e-2, 0.8)], 2, [1e-3, 1e-2]),  # 1.1e-3 is no other rate
        ([(1e-4, 0.5), (1e-3, "pruned"), (1e-2, 0.8)], 3, [1e-2, 1e-4]),
        ([(1e-3, 0.9), (1e-3, 0.1), (1e-2, 0.8), (1e-4, 0.7)], 3, [1e-3, 1e-2, 1e-4]),  # 1e-3 won, whatever its mean
    ],
)
def test_the_best_different_rates_are_trained_again(
    rows: list[tuple[float, float | str]], top: int, expected: list[float]
) -> None:
    study, trials = make_study(top=top), make_trials(*rows)
    found = find_best(study, trials)
    assert found is not None
    assert [params["lr"] for params in candidates(study, trials, found)] == expected


def test_the_answers_rate_comes_first_where_any_can_be_trained_and_a_tried_one_where_not() -> None:
    rows = [(10 ** (-4 + 0.5 * n), 0.9 - 0.1 * abs(n - 2.7)) for n in range(7)]
    trials = make_trials(*rows)
    free = make_study(search={"sampler": "random", "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}}})
    listed = make_study(search={"sampler": "random", "space": {"lr": [rate for rate, _ in rows]}})
    for study in (free, listed):
        found = find_best(study, trials)
        assert found is not None
        assert found.response is not None
        first = candidates(study, trials, found)[0]["lr"]
        assert (first in [rate for rate, _ in rows]) == (study is listed)
        if study is free:
            assert first == pytest.approx(found.response.best, rel=1e-5)


def test_a_searched_seed_is_left_out_and_its_trials_count_with_their_mean() -> None:
    study = make_study(top=2, search={"sampler": "grid", "space": {"lr": RATES, "seed": [0, 1]}})
    trials = [
        make_trial(2 * index + seed, {"lr": RATES[index], "seed": seed}, value)
        for index, pair in enumerate([(0.95, 0.2), (0.8, 0.8), (0.7, 0.9), (0.1, 0.1)])
        for seed, value in enumerate(pair)
    ]
    found = find_best(study, trials)
    assert found is not None
    assert candidates(study, trials, found) == [{"lr": 1e-4}, {"lr": 1e-3}]


def test_every_rate_gets_the_same_seeds_and_the_winners_networks_are_tested() -> None:
    study = make_study(top=2, seeds=3)
    study = replace(study, metadata={**study.metadata, "has_test": True})
    trials = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8))
    found = find_best(study, trials)
    assert found is not None
    planned = plan_due_trials(study, trials, found)
    assert [(one.kind, one.params["lr"], one.replicate) for one in planned] == [
        ("confirm", rate, seed) for rate in (1e-3, 1e-2) for seed in range(3)
    ]
    trials += again(trials, [0.8, 0.7, "failed"], [0.9, 0.85, 0.95], params=[{"lr": 1e-3}, {"lr": 1e-2}])
    found = find_best(study, trials)
    assert found is not None
    assert found.confirmation is not None
    assert (found.trial, found.value, found.lr) == (1, 0.9, 1e-2)  # the trial is the search's, the rate is confirmed
    tests = plan_due_trials(study, trials, found)
    assert [(one.kind, one.params["lr"], one.tested) for one in tests] == [("test", 1e-2, n) for n in (6, 7, 8)]


# What came of it


def test_the_winner_has_the_highest_mean_and_seeds_that_diverge_come_last() -> None:
    found = confirmed(make_study(), [0.90, 0.80, 0.85], [0.90, 0.91, 0.89])
    assert found.winner.params == {"lr": 1e-2}
    assert found.winner.mean == pytest.approx(0.90)
    found = confirmed(make_study(), [0.90, 0.80, 0.85], [0.99, 0.99, "diverged"])
    assert found.winner.params == {"lr": 1e-3}
    assert found.candidates[1].num_diverged == 1
    minimized = make_study(objective={"function": "m:f", "metric": "loss", "direction": "minimize"})
    found = confirmed(minimized, [0.3, 0.3, 0.3], [0.2, 0.2, 0.2])
    assert found.winner.params == {"lr": 1e-2}
    assert found.inflation < 0  # 0.9 was worse than that


@pytest.mark.parametrize(("other", "is_worse"), [([0.80, 0.91, 0.86], True), ([0.80, 0.94, 0.87], False)])
def test_the_runner_up_is_compared_seed_by_seed(other: list[float | str], is_worse: bool) -> None:
    found = confirmed(make_study(), [0.82, 0.93, 0.89], other)  # far more from seed to seed than between the two
    assert found.runner_up is not None
    assert found.runner_up.is_worse == is_worse
    assert found.runner_up.interval[0] < found.runner_up.difference < found.runner_up.interval[1]


def test_nothing_is_said_before_all_have_ended_or_where_none_completed() -> None:
    searched = make_trials((1e-3, 0.9), (1e-2, 0.8))
    for values in ([0.8, "running"], ["failed", "failed"]):
        trials = searched + again(searched, values, params=[{"lr": 1e-3}])
        assert find_confirmation(make_study(), trials, search_value=0.9) is None
    assert find_confirmation(make_study(), searched, search_value=0.9) is None


def test_one_seed_that_completed_gives_a_mean_without_an_error() -> None:
    found = confirmed(make_study(), [0.8, "failed", "failed"])
    assert (found.value, found.standard_error, found.runner_up) == (0.8, None, None)


@pytest.mark.parametrize("num_seeds", [2, 5])
@pytest.mark.parametrize("spread", [0.0, 0.003, 0.05])
def test_the_confirmed_value_is_within_its_error_two_times_out_of_three(spread: float, num_seeds: int) -> None:
    """Also where the rates are equally good, so that the winner is the luckiest; more in `make bench-analysis`."""
    random = np.random.default_rng(0)
    within, errors, naive, verdicts = [], [], [], []
    for _ in range(400):
        truths = [0.8, 0.8 - spread, 0.8 - 2 * spread]
        values = [[*(truth + 0.01 * random.normal(size=num_seeds))] for truth in truths]
        found = confirmed(make_study(3, num_seeds), *values)
        assert found.runner_up is not None
        verdicts.append(found.runner_up.is_worse and found.runner_up.params["lr"] == 1e-3)
        truth = truths[[1e-3, 1e-2, 1e-4].index(found.winner.params["lr"])]
        assert found.standard_error is not None
        assert found.winner.mean is not None
        within.append(abs(found.value - truth) <= found.standard_error)
        errors.append(found.value - truth)
        naive.append(found.winner.mean - truth)
    assert 0.62 < statistics.fmean(within) < 0.9  # two thirds, less twice its standard error with so many
    assert statistics.fmean(verdicts) < 0.1  # the truly best one, called worse
    if spread == 0:
        assert abs(statistics.fmean(errors)) < statistics.fmean(naive) / 2


def test_the_answer_says_it() -> None:
    study = make_study()
    trials = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8))
    trials += again(trials, [0.82, 0.83, 0.84], [0.79, 0.80, 0.82], params=[{"lr": 1e-3}, {"lr": 1e-2}])
    found = find_best(study, trials)
    assert found is not None
    text = "\n".join(answer_lines(study, found))
    assert "best learning rate: 0.001, confirmed on 3 fresh seeds: val_accuracy 82." in text
    assert "the search's best trial was 7." in text
    assert "better than what was confirmed" in text
    assert "the mean of its seeds is 83.00%" in text
    assert "the runner-up, lr=0.01, really is worse" in text
    assert json.loads(json.dumps(found.as_dict()))["confirmation"]["runner_up"]["is_worse"] is True


def test_values_that_are_all_alike_are_as_uncertain_as_a_picture_and_huge_ones_no_error() -> None:
    found = confirmed(make_study(), [0.8, 0.8, 0.8], [0.8, 0.8, 0.8])
    assert found.standard_error is not None
    assert found.standard_error > 0  # there are 400 pictures
    assert found.runner_up is not None
    assert not found.runner_up.is_worse
    minimized = make_study(objective={"function": "m:f", "metric": "loss", "direction": "minimize"})
    found = confirmed(minimized, [1e300, 2e300], [3e300, 1e305])
    assert found.winner.params == {"lr": 1e-3}


def test_what_wins_may_be_another_optimizer_and_the_answer_is_all_of_that() -> None:
    space = {"optimizer": ["adam", "sgd"], "lr": {"low": 1e-5, "high": 1.0, "log": True}}
    study = make_study(search={"sampler": "random", "trials": 12, "space": space})
    rows = [("adam", 10**x, 0.9 - 0.1 * (x + 3) ** 2) for x in (-5, -4, -3.5, -3, -2.5, -2)]
    rows += [("sgd", 10**x, 0.8 - 0.1 * (x + 1) ** 2) for x in np.linspace(-5, 0, 21)]
    trials = [make_trial(n, {"optimizer": name, "lr": lr}, value) for n, (name, lr, value) in enumerate(rows)]
    params = [{"optimizer": "adam", "lr": 1e-3}, {"optimizer": "sgd", "lr": 0.1}]
    trials += again(trials, [0.6, 0.61, 0.62], [0.79, 0.8, 0.81], params=params)
    found = find_best(study, trials)
    assert found is not None
    assert found.recommended == {"optimizer": "sgd", "lr": 0.1}
    assert found.params["optimizer"] == "adam"  # of the best trial, as it was
    assert found.interval is not None
    assert found.interval[0] > 1e-2
    assert "best at" in (text := "\n".join(answer_lines(study, found)))
    assert "with optimizer=sgd" in text


def test_a_confirmation_that_failed_is_said() -> None:
    study = make_study()
    trials = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8))
    failed = again(trials, ["diverged", "diverged"], params=[{"lr": 1e-3}])
    found = find_best(study, trials + failed)
    assert found is not None
    assert "not-confirmed" in {warning.kind for warning in found.warnings}
    done = again(trials, [0.8, 0.81], params=[{"lr": 1e-3}])
    tests = [make_trial(5 + n, {"lr": 1e-3}, "failed", kind="test", replicate=n, tested=3 + n) for n in range(2)]
    found = find_best(study, trials + done + tests)
    assert found is not None
    assert {"not-confirmed", "not-tested"} & {warning.kind for warning in found.warnings} == {"not-tested"}


# In the store


def finish(store: Store, study: StudyRecord, worker: str, value: float) -> Claim | None:
    held = store.trials.claim(study, worker)
    if held is not None:
        store.trials.suggest(held, study.spec, attributes=lambda values: {})
        store.trials.report(held, study.spec, epoch=1, metrics={"val_accuracy": value}, value=value)
        store.trials.finish(held, "complete", reason="")
    return held


def run(store: Store, study: StudyRecord) -> list[Claim]:
    """All trials that there are to train, each with its learning rate as its value."""
    worker, done = store.workers.add(study.study_id, device="cpu"), []
    while add_due_trials(store, study):
        value = 0.1 * len(done) / 100
        claim = finish(store, study, worker, value)
        assert claim is not None
        done.append(claim)
    return done


def begin(store: Store, spec: StudySpec) -> StudyRecord:
    return store.studies.create(spec, metadata={"has_test": False})


def kinds(store: Store, study: StudyRecord) -> Counter[str]:
    return Counter(trial.kind for trial in store.trials.get_all(study))


def test_what_is_due_is_added_once_the_search_is_done_and_once_only(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(0.1, 0.2, 0.5, confirm={"top": 2, "seeds": 2}))
    worker = store.workers.add(study.study_id, device="cpu")
    for value in (0.3, 0.5, 0.4):
        assert add_due_trials(store, study)
        assert kinds(store, study) == {"search": 3}
        finish(store, study, worker, value)
    assert store.trials.num_left(study) == 4
    assert add_due_trials(store, study)
    assert add_due_trials(store, study)
    assert kinds(store, study) == {"search": 3, "confirm": 4}
    confirming = [finish(store, study, worker, value) for value in (0.4, 0.4, 0.45, 0.45)]
    assert not add_due_trials(store, study)
    assert store.trials.num_left(study) == 0
    assert [(claim.kind, claim.replicate) for claim in confirming if claim] == [("confirm", 0), ("confirm", 1)] * 2
    trials = store.trials.get_all(study)
    assert [trial.params["lr"] for trial in trials[3:]] == [0.2, 0.2, 0.5, 0.5]
    found = find_best(study, trials)
    assert found is not None
    assert (found.trial, found.lr) == (1, 0.5)
    assert store.problems(study) == []


FOUR_PROCESSES = """
import sys, multiprocessing
from hpo.store.store import Store
from hpo.workers.stages import add_due_trials

def ask(url, barrier):
    store = Store(url)
    study = store.studies.get("s")
    barrier.wait()
    add_due_trials(store, study)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [context.Process(target=ask, args=(sys.argv[1], barrier)) for _ in range(4)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    sys.exit(max(process.exitcode for process in processes))
"""


def test_processes_that_ask_at_the_same_time_add_it_once(
    store: Store, url: str, make_spec: MakeSpec, tmp_path: Path
) -> None:
    study = begin(store, make_spec(0.1, 0.2, 0.5, confirm={"top": 2, "seeds": 3}))
    worker = store.workers.add(study.study_id, device="cpu")
    for value in (0.3, 0.5, 0.4):
        finish(store, study, worker, value)
    script = tmp_path / "ask.py"
    script.write_text(FOUR_PROCESSES)
    subprocess.run([sys.executable, str(script), url], check=True)
    assert kinds(store, study) == {"search": 3, "confirm": 6}


def test_a_larger_search_is_confirmed_anew(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(search={"trials": 3}, confirm={"top": 1, "seeds": 2}))
    assert [claim.number for claim in run(store, study)] == [0, 1, 2, 3, 4]
    store.studies.enlarge(study, 5)
    study = store.studies.get(study.name)
    assert store.trials.num_left(study) == 2
    assert [claim.number for claim in run(store, study)] == [5, 6, 7, 8]
    assert [trial.kind[0] for trial in store.trials.get_all(study)] == list("sssccsscc")
    assert study.spec.num_trials == 5
    found = find_best(study, store.trials.get_all(study))
    assert found is not None
    assert found.confirmation is not None
    assert found.confirmation.winner.trials == [7, 8]
    with pytest.raises(UserError, match="--trials must be at least 5"):
        store.studies.enlarge(study, 4)


def test_enlarging_takes_back_what_nobody_has_begun_to_confirm(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(search={"trials": 3}, confirm={"top": 1, "seeds": 3}))
    worker = store.workers.add(study.study_id, device="cpu")
    for value in (0.1, 0.3, 0.2, 0.25):
        assert add_due_trials(store, study)
        finish(store, study, worker, value)
    store.studies.enlarge(study, 5)
    study = store.studies.get("s")
    assert [trial.kind[0] for trial in store.trials.get_all(study)] == list("ssscss")
    run(store, study)
    trials = store.trials.get_all(study)
    assert [trial.kind[0] for trial in trials] == list("ssscssccc")
    assert [trial.replicate for trial in trials if trial.kind == "confirm"] == [0, 1, 2, 3]  # each a seed of its own
    assert store.problems(study) == []


@pytest.mark.parametrize(
    "lr", [{"low": 0.00123456789, "high": 0.123456789, "log": True}, {"low": 1 / 3e5, "high": 1 / 3, "log": True}]
)
def test_an_end_of_the_range_with_many_digits_is_confirmed(
    store: Store, make_spec: MakeSpec, lr: dict[str, Any]
) -> None:
    study = begin(store, make_spec(search={"trials": 8, "space": {"lr": lr}}, confirm={"top": 1, "seeds": 2}))
    worker = store.workers.add(study.study_id, device="cpu")
    while add_due_trials(store, study):
        held = store.trials.claim(study, worker)
        assert held is not None
        value = store.trials.suggest(held, study.spec, attributes=lambda values: {})["lr"]  # the higher, the better
        store.trials.report(held, study.spec, epoch=1, metrics={"val_accuracy": value}, value=value)
        store.trials.finish(held, "complete", reason="")
    assert kinds(store, study) == {"search": 8, "confirm": 2}


def test_it_can_be_added_to_a_finished_study_and_not_changed(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(0.1, 0.2))
    run(store, study)
    study = begin(store, make_spec(0.1, 0.2, confirm={"top": 1, "seeds": 2}))
    assert store.trials.num_left(study) == 2
    with pytest.raises(UserError, match=r"confirm\.seeds: 2 in the study, 3 here"):
        begin(store, make_spec(0.1, 0.2, confirm={"top": 1, "seeds": 3}))
    with pytest.raises(UserError, match=r"confirm\.top: 1 in the study, None here"):
        begin(store, make_spec(0.1, 0.2))


def test_nothing_to_confirm_is_the_end(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(0.1, confirm={"top": 1, "seeds": 2}))
    worker = store.workers.add(study.study_id, device="cpu")
    held = store.trials.claim(study, worker)
    assert held is not None
    store.trials.finish(held, "failed", reason="")
    assert not add_due_trials(store, study)
    assert store.trials.num_left(study) == 0


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_no_sampler_and_no_pruner_is_shown_what_confirms(tmp_path: Path, make_spec: MakeSpec, sampler: str) -> None:
    store = Store(f"sqlite:///{tmp_path}/hpo.db", create=True)
    space = {"lr": {"low": 0.1, "high": 1.0}, "momentum": {"low": 0.0, "high": 0.9}}
    search = {"sampler": sampler, "trials": 4, "space": space}
    study = begin(store, make_spec(search=search, confirm={"top": 2, "seeds": 2}))
    run(store, study)
    assert len(store.trials.get_all(study)) == 8
    for shown in (SAMPLERS[sampler].study_view(), RoundStudy):
        numbers = [trial.number for trial in shown(study.name, store.storage).get_trials(deepcopy=False)]
        assert numbers == [0, 1, 2, 3]
    assert len(optuna.load_study(study_name="s", storage=store.storage).trials) == 8  # the dashboard shows them
    store.studies.enlarge(study, 6)
    run(store, store.studies.get("s"))


def test_cases_and_lists_are_confirmed_as_they_are(store: Store, make_spec: MakeSpec) -> None:
    settings = {
        "name": "s",
        "search": {
            "sampler": "random",
            "trials": 6,
            "space": {
                "optimizer": ["adam", "sgd"],
                "lr": {"by": {"optimizer": {"adam": {"low": 1e-4, "high": 1e-2, "log": True}, "sgd": [0.1, 0.2]}}},
                "batch_size": {"low": 16, "high": 64},
                "seed": [1, 2],
            },
        },
        "confirm": {"top": 3, "seeds": 2},
    }
    study = begin(store, StudySpec.from_dict(settings))
    run(store, study)
    trials = store.trials.get_all(study)
    for trial in trials[6:]:
        assert {key: trial.params[key] for key in ("optimizer", "batch_size", "lr")} == trial.params
    assert store.problems(study) == []


# Trained

SAME = """
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=1 - abs(trial.params["lr"] - 0.2) + trial.seed % 97 / 1e5):
            return
"""


def test_a_loop_of_ones_own_is_confirmed_on_fresh_seeds_that_the_rates_share(hpo: Hpo, make_spec: MakeSpec) -> None:
    hpo.write(make_spec(0.1, 0.2, 0.4, pruner={"name": "median"}, confirm={"top": 2, "seeds": 2}), SAME)
    exit_code, output = hpo.run("run", "study.toml", "--devices", "cpu", "--workers", "2")
    assert exit_code == 0, output
    assert "the search is done; trained again on fresh seeds: lr=0.2; lr=0.1" in output
    trials = Store(hpo.url).trials.get_all(Store(hpo.url).studies.get("s"))
    seeds = [trial.attributes["seed"] for trial in trials]
    assert seeds[3:5] == seeds[5:7]
    assert len(set(seeds)) == 5
    assert hpo.here("best", "s")[1].startswith("best learning rate: 0.2, confirmed on 2 fresh seeds")
    exit_code, output = hpo.here("run", "study.toml", "--devices", "cpu")
    assert exit_code == 0
    assert len(Store(hpo.url).trials.get_all(Store(hpo.url).studies.get("s"))) == 7
    assert hpo.here("export", "s", "--output", "best.toml")[0] == 0
    assert StudySpec.from_toml(hpo.folder / "best.toml").search.space["seed"] == [seeds[3]]


SLOW = SAME.replace("        if", "        import time; time.sleep(0.1)\n        if")


def test_a_study_that_is_killed_while_it_is_confirmed_goes_on_to_the_same_counts(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor
) -> None:
    hpo.write(make_spec(0.1, 0.2, 0.4, confirm={"top": 2, "seeds": 3}), SLOW)

    def num_confirmed() -> int:
        if not (hpo.folder / "hpo.db").exists():
            return 0
        with_study = [study for study in Store(hpo.url, create=True).studies.get_all() if study.name == "s"]
        trials = Store(hpo.url).trials.get_all(with_study[0]) if with_study else []
        return sum(trial.kind == "confirm" and trial.state == "complete" for trial in trials)

    for wanted in (1, 4):
        process = hpo.start("run", "study.toml", "--devices", "cpu", "--workers", "2")
        wait_for(lambda wanted=wanted: num_confirmed() >= wanted)
        for pid in [process.pid, *hpo.worker_pids()]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    exit_code, output = hpo.run("run", "study.toml", "--devices", "cpu")
    assert exit_code == 0, output
    trials = Store(hpo.url).trials.get_all(Store(hpo.url).studies.get("s"))
    assert Counter((trial.kind, trial.state) for trial in trials) == {
        ("search", "complete"): 3,
        ("confirm", "complete"): 6,
    }


# The test set

PICTURES = """
import json, os, pathlib
import torch
from torch.utils.data import Dataset

def pictures(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator) + 150 * labels[:, None, None, None]
    return images.to(torch.uint8), labels

class Test(Dataset):
    '''A test part that notes that it is read, or raises.'''

    def __init__(self, raises):
        self.raises, (self.images, self.labels) = raises, pictures(20, 1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.raises:
            raise RuntimeError("the test set is not to be read")
        with open(pathlib.Path(__file__).parent / "reads", "a") as file:
            file.write("x")
        return self.images[index], int(self.labels[index])

def make(raises=False):
    return pictures(80, 0), Test(raises)

def network(channels, num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 64, num_classes))
"""


def picture_study(folder: Path, *, raises: bool, confirm: bool) -> StudySpec:
    name = f"own_pictures_{os.urandom(4).hex()}"
    (folder / f"{name}.py").write_text(PICTURES)
    settings: dict[str, Any] = {
        "name": "s",
        "search": {"sampler": "grid", "space": {"lr": [1e-3, 3e-3]}},
        "model": {"name": f"{name}:network"},
        "data": {"name": f"{name}:make", "raises": raises},
        "training": {"epochs": 2, "batch_size": 16},
    }
    return StudySpec.from_dict(settings | ({"confirm": {"top": 2, "seeds": 2}} if confirm else {}))


def run_here(spec: StudySpec, folder: Path) -> api.Result:
    return api.run(spec, storage=f"sqlite:///{folder}/hpo.db", executor=api.InProcess("cpu"), code_folder=folder)


def test_the_test_set_is_not_touched_before_the_winner_is_chosen(tmp_path: Path) -> None:
    spec = picture_study(tmp_path, raises=True, confirm=False)
    assert run_here(spec, tmp_path).best.confirmation is None
    spec = StudySpec.from_dict(spec.frozen() | {"confirm": {"top": 2, "seeds": 2}})
    result = run_here(spec, tmp_path)
    assert Counter((trial.kind, trial.state) for trial in result.trials) == {
        ("search", "complete"): 2, ("confirm", "complete"): 4, ("test", "failed"): 2,
    }  # fmt: skip
    assert {trial.kind for trial in result.trials if trial.error and "not to be read" in trial.error} == {"test"}
    assert result.best.confirmation is not None
    assert result.best.confirmation.test_value is None


def test_the_winners_networks_are_measured_on_it_once_and_not_trained_again(tmp_path: Path) -> None:
    result = run_here(picture_study(tmp_path, raises=False, confirm=True), tmp_path)
    tests = [trial for trial in result.trials if trial.kind == "test"]
    found = result.best.confirmation
    assert found is not None
    assert [trial.tested for trial in tests] == list(found.winner.trials)
    for trial in tests:
        (attempt,) = trial.attempts
        assert attempt.resumed_from == 2
        assert trial.tested is not None
        assert trial.curves["val_accuracy"] == result.trials[trial.tested].curves["val_accuracy"]
        assert trial.curves["test_accuracy"][0] is None
    assert found.test_value == statistics.fmean([trial.curves["test_accuracy"][-1] or 0 for trial in tests])
    reads = len((tmp_path / "reads").read_text())
    assert reads <= 2 * 20 + 1  # its labels, its pictures, and one for their shape; not again for the second network
    kept = {path.name for path in tmp_path.glob("hpo_files/*/checkpoints/*")}
    assert kept in ({"000000"}, {"000001"})  # the best of the search; of those that confirm, nothing once tested


def test_where_no_checkpoint_is_found_the_winner_is_trained_again_to_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.workers.checkpoints import StudyCheckpoints

    spec = picture_study(tmp_path, raises=False, confirm=True)
    there = run_here(spec, tmp_path)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    original = StudyCheckpoints._folder
    monkeypatch.setattr(
        StudyCheckpoints, "_folder",
        lambda self, number: original(self, number + 1000 * next(COUNTER)),
    )  # fmt: skip
    module = next(tmp_path.glob("own_pictures_*.py"))
    (elsewhere / module.name).write_text(module.read_text())
    here = run_here(spec, elsewhere)
    assert there.best.confirmation is not None
    assert here.best.confirmation is not None
    assert here.best.confirmation.test_value == there.best.confirmation.test_value
    tests = [trial for trial in here.trials if trial.kind == "test"]
    assert all("finds no checkpoint of trial" in (trial.attempts[0].note or "") for trial in tests)


COUNTER = itertools.count(1)


def test_a_study_none_of_whose_trials_completed_says_so(tmp_path: Path, make_spec: MakeSpec) -> None:
    # Not loop.py: a module that was imported stays, for every later test of this process.
    (tmp_path / "loop_of_nan.py").write_text("def train(trial):\n    trial.report(1, val_accuracy=float('nan'))\n")
    spec = make_spec(0.1, 0.2, objective={"function": "loop_of_nan:train"}, confirm={"top": 1, "seeds": 2})
    with pytest.raises(StudyStopped, match="has no complete trial"):
        run_here(spec, tmp_path)


# What a user may write


@pytest.mark.parametrize(
    ("confirm", "message"),
    [
        ({"top": 0}, "confirm.top must be at least 1, got 0"),
        ({"seeds": 1}, "confirm.seeds must be between 2 and 1,000, got 1"),
        ({"tops": 3}, "confirm.tops"),
    ],
)
def test_mistakes_are_one_sentence(make_spec: MakeSpec, confirm: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_spec(0.1, confirm=confirm)
