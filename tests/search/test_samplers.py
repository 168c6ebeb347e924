"""Samplers and pruners as tables: each does what the study file says, through Optuna, on a real store."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import sqlite3
import tomllib
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import cmaes
import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, TPESampler

from hpo.config.study_spec import StudySpec
from hpo.search import proposals, pruners, samplers
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from tests.rows import slow_except

RANGES = {"lr": {"low": 1e-5, "high": 1.0, "log": True}, "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True}}


def make_study(tmp_path: Path, name: str = "s", **sections: Any) -> tuple[Store, StudyRecord]:
    store = Store(f"sqlite:///{tmp_path}/{name}.db", create=True)
    sections.setdefault("search", {"space": RANGES})
    return store, store.studies.create(StudySpec.from_dict({"name": name, **sections}), metadata={})


def run_trials(store: Store, study: StudyRecord, count: int, accuracy: Any, *, epochs: int = 1) -> list[dict[str, Any]]:
    """Claim and end trials one after the other; `accuracy(values, epoch)` is None for a trial that diverges."""
    worker, ended = store.workers.add(study.study_id, device="cpu"), []
    for _ in range(count):
        claim = store.trials.claim(study, worker)
        assert claim is not None
        values = store.trials.suggest(claim, study.spec, attributes=lambda values: {})
        state = "complete"
        for epoch in range(1, epochs + 1):
            value = accuracy(values, epoch)
            verdict = store.trials.report(
                claim,
                study.spec,
                epoch=epoch,
                metrics={},
                value=0.1 if value is None else value,
                may_prune=value is not None and epoch < epochs,
            )
            if value is None:
                state = "diverged"
                break
            if verdict == "prune":
                state = "pruned"
                break
        store.trials.finish(claim, state, reason="test")
        ended.append({**values, "state": state, "epochs": epoch})
    return ended


def peak(values: dict[str, Any], epoch: int = 1) -> float:
    """Return an accuracy that is best at a learning rate of 1e-3."""
    return 0.9 - 0.1 * abs(math.log10(values["lr"]) + 3)


DRAWING = sorted(set(samplers.SAMPLERS) - {"grid", "race"})  # the rates of a race are in tests/search/test_race.py


@pytest.mark.parametrize("sampler", DRAWING)
def test_every_sampler_draws_from_the_space_the_same_for_the_same_seed_and_other_values_for_another(
    sampler: str, tmp_path: Path
) -> None:
    def draw(name: str, seed: int) -> list[float]:
        settings = {"sampler": sampler, "trials": 6, "space": RANGES, "seed": seed}
        store, study = make_study(tmp_path, name, search=settings)
        drawn = run_trials(store, study, 6, peak)
        assert store.trials.claim(study, "worker") is None, "the budget is exact"
        assert all(1e-6 <= values["weight_decay"] <= 1e-2 for values in drawn)
        return [values["lr"] for values in drawn]

    first = draw("a", 0)
    assert len(set(first)) == 6, "no learning rate is drawn twice"
    assert all(1e-5 <= lr <= 1.0 for lr in first)
    assert draw("b", 0) == first
    assert not set(draw("c", 1)) & set(first)


def test_a_study_that_is_interrupted_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    settings = {
        "sampler": "tpe",
        "trials": 8,
        "space": RANGES,
    }  # three of them are spread, and the sampler is asked then
    whole = run_trials(*make_study(tmp_path, "whole", search=settings), 8, peak)
    store, study = make_study(tmp_path, "cut", search=settings)
    half = run_trials(store, study, 5, peak)
    store = Store(f"sqlite:///{tmp_path}/cut.db")
    assert half + run_trials(store, store.studies.get("cut"), 3, peak) == whole


def test_sobol_points_are_the_sequence_whichever_worker_draws_them(tmp_path: Path) -> None:
    """From the second trial on (Optuna draws the first at random) any 2^k points fill the range evenly."""
    _, study = make_study(tmp_path, search={"sampler": "qmc", "trials": 17, "space": {"lr": RANGES["lr"]}})
    workers = itertools.cycle([Store(f"sqlite:///{tmp_path}/s.db") for _ in range(3)])
    drawn = [run_trials(next(workers), study, 1, peak)[0]["lr"] for _ in range(17)][1:]
    bins = [int((math.log10(lr) + 5) / 5 * 16) for lr in drawn]
    assert sorted(bins) == list(range(16))


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_a_sampler_that_learns_stays_away_from_where_trials_diverge(sampler: str, tmp_path: Path) -> None:
    """Everything above 1e-2, two fifths of the range, diverges; the last third of 18 trials should rarely go there."""
    store, study = make_study(tmp_path, search={"sampler": sampler, "trials": 18, "space": RANGES})
    ended = run_trials(store, study, 18, lambda values, _: None if values["lr"] > 1e-2 else peak(values))
    late = [values["state"] == "diverged" for values in ended[12:]]
    assert sum(late) <= 1


# --- CMA-ES, whose state must never be in the store ---

CMAES = {"sampler": "cmaes", "trials": 40, "space": RANGES}


@pytest.fixture(params=["ours", "optuna"])
def cmaes_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use our CMA-ES or Optuna's own, which does what ours must not: it shows that the test would see that."""
    if request.param == "optuna":
        monkeypatch.setattr("hpo.search.cmaes.ReplayedCmaEsSampler", CmaEsSampler)
    return str(request.param)


def diverging_peak(values: dict[str, Any], epoch: int) -> float | None:
    return None if values["lr"] > 1e-2 else peak(values)


def test_cmaes_proposes_what_optunas_own_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(seed: int) -> SimpleNamespace:  # Optuna draws once more from it where it makes an optimizer
        return SimpleNamespace(rng=SimpleNamespace(randint=lambda low, high: seed % high))

    monkeypatch.setattr("optuna.samplers._cmaes.LazyRandomState", seeded)
    ours = run_trials(*make_study(tmp_path, "ours", search=CMAES), 22, diverging_peak)  # three populations of six
    monkeypatch.setattr("hpo.search.cmaes.ReplayedCmaEsSampler", CmaEsSampler)
    assert ours == run_trials(*make_study(tmp_path, "optuna", search=CMAES), 22, diverging_peak)
    assert {"complete", "diverged"} == {trial["state"] for trial in ours}


@pytest.mark.slow
def test_cmaes_is_told_alike_by_every_worker_and_a_generation_that_is_full_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine workers at once, populations of six: of each generation three trials or more complete too late."""
    told: dict[int, list[np.ndarray]] = {}
    ask = cmaes.CMA.ask

    def spied(optimizer: cmaes.CMA) -> np.ndarray:
        state = np.append(optimizer._C.ravel(), [*optimizer.mean, optimizer._sigma])
        told.setdefault(optimizer.generation, []).append(state)
        solution: np.ndarray = ask(optimizer)
        return solution

    monkeypatch.setattr(cmaes.CMA, "ask", spied)
    _, study = make_study(tmp_path, search={**CMAES, "trials": 60})
    stores = [Store(f"sqlite:///{tmp_path}/s.db") for _ in range(9)]
    workers = [store.workers.add(study.study_id, device="cpu") for store in stores]
    running: dict[int, tuple[Any, dict[str, Any]]] = {}

    def begin(i: int) -> None:
        claim = stores[i].trials.claim(study, workers[i])
        assert claim is not None
        running[i] = (claim, stores[i].trials.suggest(claim, study.spec, attributes=lambda values: {}))

    def end(i: int) -> None:
        claim, values = running.pop(i)
        stores[i].trials.report(claim, study.spec, epoch=1, metrics={}, value=peak(values), may_prune=False)
        stores[i].trials.finish(claim, "complete", reason="test")

    for i in range(9):
        begin(i)
    for i in np.random.RandomState(0).permutation(np.repeat(np.arange(9), 5)):
        end(int(i))
        begin(int(i))
    assert max(told) >= 3, "generations that were told"
    assert all(len(states) > 1 and (np.stack(states) == states[0]).all() for states in told.values())


def test_no_pickle_of_cmaes_is_in_the_store(cmaes_of: str, tmp_path: Path) -> None:
    run_trials(*make_study(tmp_path, search=CMAES), 12, peak)
    with sqlite3.connect(tmp_path / "s.db") as connection:
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        fields = [field for table in tables for row in connection.execute(f"select * from {table}") for field in row]
    found = [field for field in fields if "optimizer:" in str(field) or is_pickle(field)]
    assert bool(found) == (cmaes_of == "optuna")


def is_pickle(field: object) -> bool:
    if isinstance(field, bytes):
        return True  # there is nothing binary in our tables, nor in Optuna's
    try:
        start = bytes.fromhex(str(field).strip('"'))[:2]
    except ValueError:
        return False
    return start in [pickle.PROTO + bytes([protocol]) for protocol in range(6)]  # ids are hexadecimal, too


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_somebody_planted_in_the_store_is_not_loaded(cmaes_of: str, tmp_path: Path) -> None:
    store, study = make_study(tmp_path, search=CMAES)
    run_trials(store, study, 10, peak)
    planted = json.dumps(pickle.dumps(Touch(tmp_path / "executed")).hex())
    with sqlite3.connect(tmp_path / "s.db") as connection:
        connection.execute("delete from trial_system_attributes where key like '%optimizer%'")
        for prefix in ("cma:", "sepcma:", "cmawm:"):
            key = f"{prefix}optimizer:0"
            connection.execute(
                "insert into trial_system_attributes (trial_id, key, value_json) select trial_id, ?, ? from trials",
                (key, planted),
            )
            connection.execute(
                "insert into study_system_attributes (study_id, key, value_json) select study_id, ?, ? from studies",
                (key, planted),
            )
    store = Store(f"sqlite:///{tmp_path}/s.db")  # a worker that has not read the trials yet
    try:
        run_trials(store, store.studies.get("s"), 3, peak)
    except AttributeError:
        assert cmaes_of == "optuna"  # what it unpickled is no optimizer
    assert (tmp_path / "executed").exists() == (cmaes_of == "optuna")


def test_random_search_is_drawn_evenly_on_the_scale_of_the_range(tmp_path: Path) -> None:
    space = {"lr": RANGES["lr"]}
    store, study = make_study(tmp_path, search={"sampler": "random", "trials": 40, "seed": 1, "space": space})
    halves = [math.log10(values["lr"]) > -2.5 for values in run_trials(store, study, 40, peak)]
    assert 10 <= sum(halves) <= 30  # 20, within 3.2 standard deviations; on a linear scale all but one would be


def test_what_is_to_be_tried_first_is_tried_first_and_the_rest_of_it_sampled(tmp_path: Path) -> None:
    first = [{"lr": 0.5, "weight_decay": 1e-4}, {"lr": 0.25}]
    store, study = make_study(tmp_path, search={"sampler": "tpe", "trials": 4, "space": RANGES, "try_first": first})
    drawn = run_trials(store, study, 4, peak)
    assert (drawn[0]["lr"], drawn[0]["weight_decay"], drawn[1]["lr"]) == (0.5, 1e-4, 0.25)
    assert 1e-6 <= drawn[1]["weight_decay"] <= 1e-2


def test_a_value_to_try_first_is_the_one_of_the_list() -> None:
    space = {"lr": [0.1], "batch_size": [16, 32]}
    search = {"sampler": "tpe", "trials": 3, "space": space, "try_first": [{"batch_size": 32.0}]}
    (value,) = proposals.fixed_values(StudySpec.from_dict({"name": "s", "search": search}))[0].values()
    assert (value, type(value)) == (32, int)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_sampler_that_learns_begins_with_points_that_leave_no_gap(sampler: str) -> None:
    space = {
        "lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "batch_size": {"low": 16, "high": 23},
        "data.flip": [True, False],
    }
    for seed in range(5):
        search = {"sampler": sampler, "trials": 24, "space": space, "seed": seed}
        fixed: list[dict[str, Any]] = [*proposals.fixed_values(StudySpec.from_dict({"name": "s", "search": search}))]
        first = fixed[:8]
        assert fixed[8:] == [{}] * 16
        assert sorted(math.floor(2 * (math.log10(point["lr"]) + 5)) for point in first) == list(range(8))
        assert sorted(point["batch_size"] for point in first) == list(range(16, 24))
        assert [point["data.flip"] for point in first].count(True) == 4


def test_a_spread_begins_after_what_is_to_be_tried_first_and_fits_every_kind_of_parameter(tmp_path: Path) -> None:
    lr = {"by": {"optimizer": {"adam": {"low": 1e-5, "high": 1e-1, "log": True}, "sgd": [0.1, 1]}}}
    space = {"lr": lr, "optimizer": ["adam", "sgd", "adagrad"], "weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1}}
    first = {"lr": 1e-3, "optimizer": "adam"}
    store, study = make_study(
        tmp_path,
        search={"sampler": "tpe", "trials": 12, "space": space, "try_first": [first]},
        training={"lr": 1e-2},
    )
    given = proposals.fixed_values(study.spec)
    assert given[0] == first
    assert 0 < [len(point) for point in given].count(0) < 10
    drawn = run_trials(store, study, 12, lambda values, epoch: 0.5)
    for point, values in zip(given, drawn, strict=True):
        assert values.items() >= point.items()
        assert values["weight_decay"] in (0.0, 0.1, 0.2, pytest.approx(0.3))
        assert ("lr" in values) == (values["optimizer"] != "adagrad")


def test_tpe_learns_from_what_trials_in_training_report(tmp_path: Path) -> None:
    """None of eight has ended; where they report most is where it goes next, in most of four studies."""
    space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}
    proposed = []
    for seed in range(4):
        spec = {"sampler": "tpe", "trials": 24, "space": space, "seed": seed}
        store, study = make_study(tmp_path, f"s{seed}", search=spec, training={"epochs": 9})
        worker = store.workers.add(study.study_id, device="cpu")
        for _ in range(9):
            claim = store.trials.claim(study, worker)
            assert claim is not None
            lr = store.trials.suggest(claim, study.spec, attributes=lambda values: {})["lr"]
            store.trials.report(claim, study.spec, epoch=1, metrics={}, value=0.9 if lr < 1e-4 else 0.1)
        proposed.append(lr)
    assert sum(lr < 1e-4 for lr in proposed) >= 3  # a quarter of the range


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
@pytest.mark.parametrize("pruner", ["asha", "hyperband"])
def test_a_sampler_is_shown_what_is_known_whatever_the_pruner(
    sampler: str, pruner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: dict[str, type[BaseSampler]] = {"tpe": TPESampler, "gp": GPSampler, "cmaes": CmaEsSampler}
    kind = kinds[sampler]
    shown: list[list[str]] = []
    infer = kind.infer_relative_search_space

    def noting(self: Any, study: Any, trial: Any) -> Any:
        shown.append([known.state.name for known in study.get_trials(deepcopy=False)])
        return infer(self, study, trial)

    monkeypatch.setattr(kind, "infer_relative_search_space", noting)
    monkeypatch.setattr(proposals, "_spread_points", lambda *_: [])  # where a trial is given, no sampler is asked
    store, study = make_study(
        tmp_path, search={"sampler": sampler, "trials": 24, "space": RANGES}, pruner={"name": pruner}
    )
    run_trials(store, study, 2, lambda values, epoch: None)
    worker = store.workers.add(study.study_id, device="cpu")
    for _ in range(2):
        claim = store.trials.claim(study, worker)
        assert claim is not None
        store.trials.suggest(claim, study.spec, attributes=lambda values: {})
        store.trials.report(claim, study.spec, epoch=1, metrics={}, value=0.5)
    known, training = {"tpe": ("PRUNED", "PRUNED")}.get(sampler, ("COMPLETE", "RUNNING"))
    assert shown[-1] == [known, known, training, "RUNNING"]


def test_who_take_turns_begin_spread() -> None:
    search_ = {"sampler": "tpe", "trials": 10, "space": RANGES}
    num_given = {
        pruner: [len(point) for point in proposals.fixed_values(make_spec(search_, pruner))].count(2)
        for pruner in ("none", "asha", "hyperband")
    }
    assert num_given == {"none": 4, "asha": 8, "hyperband": 8}


def make_spec(settings: dict[str, Any], pruner: str) -> StudySpec:
    return StudySpec.from_dict({"name": "s", "search": settings, "pruner": {"name": pruner}})


def test_a_grid_is_claimed_point_by_point_under_true_axes(tmp_path: Path) -> None:
    space: dict[str, list[Any]] = {"optimizer": ["adam", "sgd"], "lr": [1e-1, 1e-3, 3e-4]}
    store, study = make_study(tmp_path, search={"sampler": "grid", "space": space})
    drawn = [(values["optimizer"], values["lr"]) for values in run_trials(store, study, 6, peak)]
    assert drawn == list(itertools.product(*space.values()))
    distribution = optuna.load_study(study_name="s", storage=store.storage).trials[0].distributions["lr"]
    assert distribution == optuna.distributions.FloatDistribution(3e-4, 1e-1, log=True)


def test_a_parameter_with_cases_has_its_own_range_for_each(tmp_path: Path) -> None:
    text = """
    sampler = "tpe"
    trials = 12
    [space]
    optimizer = ["adam", "sgd"]
    lr.by.optimizer = { adam = { low = 1e-4, high = 1e-3, log = true }, sgd = { low = 0.1, high = 1.0, log = true } }
    """
    store, study = make_study(tmp_path, search=tomllib.loads(text))
    drawn = run_trials(store, study, 12, peak)
    for values in drawn:
        low, high = (1e-4, 1e-3) if values["optimizer"] == "adam" else (0.1, 1.0)
        assert low <= values["lr"] <= high
    assert {values["optimizer"] for values in drawn} == {"adam", "sgd"}
    assert store.trials.get_all(study)[0].params.keys() == {"optimizer", "lr"}


# A good trial first, then ever worse ones: (options, epoch at which a hopeless trial is dropped)
PRUNING: dict[str, tuple[dict[str, Any], int | None]] = {
    "none": ({}, None),
    "median": ({"startup_trials": 3, "warmup_epochs": 2}, 2),
    "percentile": ({"percentile": 25.0, "startup_trials": 3, "warmup_epochs": 4}, 4),
    "asha": ({"min_epochs": 2, "reduction_factor": 2}, 2),
    "hyperband": ({"min_epochs": 2, "reduction_factor": 4}, 2),
    "patient": ({"patience": 3}, 5),
    "threshold": ({"lower": 0.2, "warmup_epochs": 3}, 3),
}


def make_pruned_study(tmp_path: Path, pruner: str) -> tuple[Store, StudyRecord]:
    search_settings = {"sampler": "random", "trials": 40, "space": {"lr": RANGES["lr"]}}
    settings = {"name": pruner, **PRUNING[pruner][0]}
    return make_study(tmp_path, search=search_settings, pruner=settings, training={"epochs": 8})


@pytest.mark.parametrize("pruner", slow_except(sorted(pruners.PRUNERS), "asha", "median", "threshold"))
def test_every_pruner_drops_a_hopeless_trial_when_its_options_say_so_and_not_before(
    pruner: str, tmp_path: Path
) -> None:
    expected = PRUNING[pruner][1]
    store, study = make_pruned_study(tmp_path, pruner)
    run_trials(store, study, 6, lambda values, epoch: 0.5 + 0.05 * epoch, epochs=8)
    hopeless = run_trials(store, study, 12, lambda values, epoch: 0.1 - 0.01 * epoch, epochs=8)
    dropped = [trial["epochs"] for trial in hopeless if trial["state"] == "pruned"]
    if expected is None:
        assert dropped == []
    else:
        assert min(dropped, default=None) == expected
        assert len(dropped) >= 6


@pytest.mark.parametrize("pruner", slow_except(sorted(pruners.PRUNERS), "asha", "median"))
def test_no_pruner_drops_a_trial_that_leads(pruner: str, tmp_path: Path) -> None:
    store, study = make_pruned_study(tmp_path, pruner)
    leading = itertools.count()
    ended = run_trials(store, study, 6, lambda values, epoch: 0.3 + 0.001 * next(leading), epochs=8)
    assert [trial["state"] for trial in ended] == ["complete"] * 6


@pytest.mark.parametrize("pruner", slow_except(sorted(pruners.PRUNERS), "hyperband"))
def test_a_pruner_drops_trials_only_after_epochs_at_which_it_is_said_to_judge(pruner: str, tmp_path: Path) -> None:
    store, study = make_pruned_study(tmp_path, pruner)
    random = Random(0)
    ended = run_trials(store, study, 14, lambda values, epoch: random.random(), epochs=8)
    dropped = {trial["epochs"] for trial in ended if trial["state"] == "pruned"}
    assert (not dropped) == (pruner == "none")
    assert all(pruners.may_prune_after(epoch, study.spec) for epoch in dropped)
