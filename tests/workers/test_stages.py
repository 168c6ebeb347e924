"""The confirmation of a search and its test: added once, trained by workers, and shown to no sampler."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest

import hpo as api
from hpo.analysis.answer import find_best
from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped, UserError
from hpo.search.samplers import SAMPLERS
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord, TrialRecord
from hpo.workers.stages import add_due_trials
from tests.store.helpers import meanwhile

if TYPE_CHECKING:
    from tests.conftest import Hpo


MakeSpec = Callable[..., StudySpec]
WaitFor = Callable[..., Any]


def finish(store: Store, study: StudyRecord, worker: str, value: float) -> Claim | None:
    held = store.trials.claim(study, worker)
    if held is not None:
        store.trials.suggest(held, study.spec, attributes=lambda values: {})
        store.trials.report(held, study.spec, epoch=1, metrics={"val_accuracy": value}, value=value)
        store.trials.finish(held, "complete", reason="")
    return held


def run(store: Store, study: StudyRecord) -> list[Claim]:
    """Train all trials, those that become due too, and return their claims."""
    worker = store.workers.add(study.study_id, device="cpu")
    done: list[Claim] = []
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
    confirming = [finish(store, study, worker, value) for value in (0.4, 0.45, 0.4, 0.45)]
    assert not add_due_trials(store, study)
    assert store.trials.num_left(study) == 0
    assert [(claim.kind, claim.replicate) for claim in confirming if claim] == [
        ("confirm", seed) for seed in (0, 0, 1, 1)
    ]
    trials = store.trials.get_all(study)
    assert [trial.params["lr"] for trial in trials[3:]] == [0.2, 0.5, 0.2, 0.5]
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


@pytest.mark.slow
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
    store.searches.enlarge(study, 5)
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
        store.searches.enlarge(study, 4)


def test_a_trial_that_was_enqueued_in_vain_is_no_reason_to_confirm_again(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(0.1, 0.2, 0.5, confirm={"top": 2, "seeds": 2}))
    worker = store.workers.add(study.study_id, device="cpu")
    theirs = optuna.load_study(study_name="s", storage=store.storage)
    for value in (0.3, 0.5, 0.4):
        add_due_trials(store, study)
        finish(store, study, worker, value)
    assert add_due_trials(store, study)
    for num_refused in (1, 2):  # before a trial of the confirmation has begun, and after its end
        theirs.enqueue_trial({"lr": 7.0})
        assert finish(store, study, worker, 0.4) is None or run(store, study)
        assert kinds(store, study) == {"search": 3 + num_refused, "confirm": 4}
        assert store.trials.num_left(study) == 0


def test_enlarging_takes_back_what_nobody_has_begun_to_confirm(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(search={"trials": 3}, confirm={"top": 1, "seeds": 3}))
    worker = store.workers.add(study.study_id, device="cpu")
    for value in (0.1, 0.3, 0.2, 0.25):
        assert add_due_trials(store, study)
        finish(store, study, worker, value)
    store.searches.enlarge(study, 5)
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
    with pytest.raises(UserError, match=r"confirm\.top: 1 in the study, not set here"):
        begin(store, make_spec(0.1, 0.2))


def test_nothing_to_confirm_is_the_end(store: Store, make_spec: MakeSpec) -> None:
    study = begin(store, make_spec(0.1, confirm={"top": 1, "seeds": 2}))
    worker = store.workers.add(study.study_id, device="cpu")
    held = store.trials.claim(study, worker)
    assert held is not None
    store.trials.finish(held, "failed", reason="")
    assert not add_due_trials(store, study)
    assert store.trials.num_left(study) == 0


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("grid", "race")])
def test_no_sampler_is_shown_what_confirms(tmp_path: Path, make_spec: MakeSpec, sampler: str) -> None:
    store = Store(f"sqlite:///{tmp_path}/hpo.db", create=True)
    space = {"lr": {"low": 0.1, "high": 1.0}, "momentum": {"low": 0.0, "high": 0.9}}
    search = {"sampler": sampler, "trials": 4, "space": space}
    study = begin(store, make_spec(search=search, confirm={"top": 2, "seeds": 2}))
    run(store, study)
    assert len(store.trials.get_all(study)) == 8
    shown = SAMPLERS[sampler].study_view()(study.name, store.storage).get_trials(deepcopy=False)
    assert [trial.number for trial in shown] == [0, 1, 2, 3]
    assert len(optuna.load_study(study_name="s", storage=store.storage).trials) == 8  # the dashboard shows them
    store.searches.enlarge(study, 6)
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


SAME = """
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=1 - abs(trial.params["lr"] - 0.2) + trial.seed % 97 / 1e5):
            return
"""


def test_a_loop_of_ones_own_is_confirmed_on_fresh_seeds_that_the_rates_share(hpo: Hpo, make_spec: MakeSpec) -> None:
    hpo.write(make_spec(0.1, 0.2, 0.4, pruner={"name": "median"}, confirm={"top": 2, "seeds": 2}), SAME)
    exit_code, output = hpo.here("run", "study.toml", "--devices", "cpu", "--workers", "2")
    assert exit_code == 0, output
    assert "the search is done; training again on fresh seeds: lr=0.2; lr=0.1" in output
    trials = Store(hpo.url).trials.get_all(Store(hpo.url).studies.get("s"))
    seeds = [trial.attributes["seed"] for trial in trials]
    assert (seeds[3], seeds[5]) == (seeds[4], seeds[6])
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
    store = Store(hpo.url, create=True)  # once: to make tables takes SQLite's lock, again and again the only one

    def num_confirmed() -> int:
        with_study = [study for study in store.studies.get_all() if study.name == "s"]
        trials = store.trials.get_all(with_study[0]) if with_study else []
        return sum(trial.kind == "confirm" and trial.state == "complete" for trial in trials)

    process = hpo.start("run", "study.toml", "--devices", "cpu", "--workers", "2")
    wait_for(lambda: num_confirmed() >= 2)
    for pid in [process.pid, *hpo.worker_pids()]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    exit_code, output = hpo.here("run", "study.toml", "--devices", "cpu")
    assert exit_code == 0, output
    trials = Store(hpo.url).trials.get_all(Store(hpo.url).studies.get("s"))
    assert Counter((trial.kind, trial.state) for trial in trials) == {
        ("search", "complete"): 3,
        ("confirm", "complete"): 6,
    }


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


def test_a_test_set_is_read_only_where_it_will_be_measured_and_refused_before_training(tmp_path: Path) -> None:
    spec = picture_study(tmp_path, raises=True, confirm=False)
    assert run_here(spec, tmp_path).best.confirmation is None
    spec = StudySpec.from_dict(spec.frozen() | {"confirm": {"top": 2, "seeds": 2}})
    with pytest.raises(UserError, match="the test set is not to be read"):
        run_here(spec, tmp_path)


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
    # Its labels, its images, and one for their shape: before training, to see that all can be read, and to measure it.
    assert reads <= 2 * (2 * 20 + 1)  # not again for the second network
    kept = {int(path.name) for path in tmp_path.glob("hpo_files/*/checkpoints/*")}
    by_rate: dict[tuple[str, float], list[TrialRecord]] = {}
    for trial in result.trials:
        if trial.kind != "test":
            key = (trial.kind, 0.0 if trial.kind == "search" else trial.params["lr"])
            by_rate.setdefault(key, []).append(trial)
    # The best of the search and of each confirmed rate, whose weights can be exported.
    assert kept == {max(trials, key=lambda trial: trial.value or 0.0).number for trials in by_rate.values()}


@pytest.mark.slow
def test_where_no_checkpoint_is_found_the_winner_is_trained_again_to_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.workers.checkpoints import StudyCheckpoints

    spec = picture_study(tmp_path, raises=False, confirm=True)
    there = run_here(spec, tmp_path)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    original = StudyCheckpoints._folder
    monkeypatch.setattr(
        StudyCheckpoints,
        "_folder",
        lambda self, number: original(self, number + 1000 * next(COUNTER)),
    )
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


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("question", ["left", "at once", "due"])
def test_a_study_whose_confirmation_another_worker_adds_meanwhile_never_looks_finished(
    store: Store, make_spec: MakeSpec, question: str
) -> None:
    other = Store(store.url.render_as_string(hide_password=False))
    for at in range(8):
        study = begin(store, make_spec(0.1, 0.2, name=f"s{at}", confirm={"top": 1, "seeds": 2}))
        worker = store.workers.add(study.study_id, device="cpu")
        for value in (0.3, 0.5):
            finish(store, study, worker, value)
        with meanwhile(store, partial(add_due_trials, other, study), at=at):
            if question == "left":
                assert store.trials.num_left(study) == 2
            elif question == "at once":
                assert store.trials.most_at_once(study) == 2
            else:
                assert add_due_trials(store, study)
