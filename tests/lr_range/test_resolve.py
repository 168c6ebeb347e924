"""`lr = "auto"`: what is tested, what becomes of the study, and that a stored one is joined without testing again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hpo.analysis.answer_text import answer_lines
from hpo.analysis.range_text import position_text, range_test_lines
from hpo.api import running
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.lr_range import resolve as ranges
from hpo.lr_range.resolve import Ramp, adopt_stored_ranges, fill_in_ranges, needs_range_test
from hpo.lr_range.subprocess import range_test_in_subprocess
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.system.devices import choose_devices
from hpo.train.lr_ramp import RangeTest, run_range_test
from hpo.workers.executors import InProcess, Local

CASES = {"by": {"optimizer": {"adam": "auto", "sgd": {"low": 0.01, "high": 1.0, "log": True}}}}


def make_spec(lr: Any = "auto", *, search: Mapping[str, Any] = {}, **space: Any) -> StudySpec:
    settings = {"sampler": "random", "trials": 2, "space": {"lr": lr, **space}} | dict(search)
    data = {"name": "digits", "train_samples": 200, "validation_fraction": 0.2}
    training = {key: value for key, value in {"epochs": 1, "batch_size": 50}.items() if key not in space}
    model = {"name": "article_cnn", "width": 0.05}
    return StudySpec.from_dict({"name": "s", "search": settings, "data": data, "model": model, "training": training})


def found(low: float | None = 1e-4, high: float | None = 1e-2, **params: Any) -> Ramp:
    losses = [2.3] * 100 + [float("inf")]
    lrs = [1e-5 * 1.1**step for step in range(101)]
    test = RangeTest(
        lrs=lrs,
        losses=losses,
        falls=None,
        lowest=None,
        breaks=2e-3,
        leaps=3e-3,
        edge=2e-3,
        low=low,
        high=high,
        epochs=0.9,
    )
    return Ramp(params, test)


def study_of(spec: StudySpec, metadata: Mapping[str, Any]) -> StudyRecord:
    return StudyRecord(1, spec.name, spec, metadata, None, None, 0.0)


def values_tested(spec: StudySpec) -> list[dict[str, Any]]:
    return [dict(point) for point in ranges._values_to_test(spec)]


def test_what_a_ramp_does_not_depend_on_is_not_tested() -> None:
    spec = make_spec(seed=[0, 1, 2], schedule=["constant", "cosine"], epochs=[3, 5])
    assert values_tested(spec) == [{}]


def test_listed_values_are_tested_each_and_ranges_at_their_middle() -> None:
    spec = make_spec(optimizer=["adam", "sgd"], weight_decay={"low": 1e-6, "high": 1e-2, "log": True})
    assert values_tested(spec) == [
        {"optimizer": "adam", "weight_decay": 1e-4},
        {"optimizer": "sgd", "weight_decay": 1e-4},
    ]


def test_only_cases_that_ask_for_it_are_tested() -> None:
    spec = make_spec(CASES, optimizer=["adam", "sgd"], batch_size=[32, 64])
    assert [point["optimizer"] for point in values_tested(spec)] == ["adam", "adam"]


def test_too_many_combinations_are_refused() -> None:
    with pytest.raises(UserError, match=r"at most 8 combinations .* got 9 \(of batch_size, momentum, optimizer\)"):
        ranges._values_to_test(make_spec(batch_size=[8, 16, 32], momentum=[0.0, 0.5, 0.9], optimizer=["sgd"]))


def test_the_range_holds_those_of_all_tests_and_what_is_tried_first() -> None:
    spec = make_spec(optimizer=["adam", "sgd"], search={"try_first": [{"lr": 2.0}]})
    closed, metadata = fill_in_ranges(
        spec, [found(1.234e-4, 1e-2, optimizer="adam"), found(1e-2, 0.5, optimizer="sgd")]
    )
    assert closed.search.space["lr"] == {"low": 1.2e-4, "high": 2.0, "log": True}
    assert not needs_range_test(closed)
    assert [one["params"] for one in metadata["range_test"]] == [{"optimizer": "adam"}, {"optimizer": "sgd"}]
    json.dumps(metadata, allow_nan=False)
    assert len(metadata["range_test"][0]["lrs"]) <= ranges.MAX_STORED_POINTS


def test_cases_get_ranges_of_their_own() -> None:
    closed, _ = fill_in_ranges(make_spec(CASES, optimizer=["adam", "sgd"]), [found(1e-4, 1e-2, optimizer="adam")])
    cases = closed.search.space["lr"]["by"]["optimizer"]
    assert cases["adam"] == {"low": 1e-4, "high": 1e-2, "log": True}
    assert cases["sgd"] == {"low": 0.01, "high": 1.0, "log": True}


def test_a_network_for_which_no_rate_works_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"search\.space\.lr cannot be 'auto'.*stays finite; give low and high"):
        fill_in_ranges(make_spec(), [found(None, None)])


@pytest.mark.parametrize(("lr", "listed"), [("auto", {}), (CASES, {"optimizer": ["adam", "sgd"]})])
def test_the_same_file_again_is_the_stored_study(lr: Any, listed: dict[str, Any]) -> None:
    spec = make_spec(lr, **listed)
    closed, metadata = fill_in_ranges(spec, [found(optimizer="adam") if listed else found()])
    again = adopt_stored_ranges(spec, study_of(closed, metadata))
    assert closed.differences(again) == []
    assert adopt_stored_ranges(spec, None) == spec


def test_a_study_whose_range_was_given_is_not_joined_by_auto() -> None:
    given = make_spec({"low": 1e-4, "high": 1e-2, "log": True})
    assert needs_range_test(adopt_stored_ranges(make_spec(), study_of(given, {})))
    assert given.differences(adopt_stored_ranges(make_spec(), study_of(given, {})))


def test_the_answer_says_where_the_best_rate_is_in_the_range() -> None:
    closed, metadata = fill_in_ranges(make_spec(), [found()])
    (line,) = range_test_lines(study_of(closed, metadata), best=1e-3, params={"lr": 1e-3})
    assert "comes from a range test of 0.9 epochs: 0.0001 to 0.01 (breaks at 0.002, leaps from 0.003)" in line
    assert line.endswith("the best one is 1.0 decades above its low end and 1.0 below its high end")
    assert position_text(0.1, 1e-4, 1e-2) == "the best one, 0.1, is outside of that"
    assert range_test_lines(study_of(make_spec(), {})) == []


def test_a_study_finds_its_range_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path}/hpo.db"
    first = running.run(make_spec(), storage=storage, executor=InProcess("cpu"))
    store = Store(storage)
    study = store.studies.get("s")
    (fact,) = study.metadata["range_test"]
    lr = study.spec.search.space["lr"]
    assert (lr["low"], lr["high"]) == (float(f"{fact['low']:.2g}"), float(f"{fact['high']:.2g}"))
    assert all(lr["low"] <= trial.params["lr"] <= lr["high"] for trial in first.trials)
    assert any("comes from a range test" in line for line in answer_lines(study, first.best))
    assert first.best.as_dict()["range_test"] == [fact]

    monkeypatch.setattr(ranges, "measure_ramps", lambda *_: pytest.fail("it was tested again"))
    assert running.run(make_spec(), storage=storage, executor=Local("cpu")).trials == first.trials
    more = running.run(make_spec(search={"trials": 3}), storage=storage, executor=InProcess("cpu"))
    assert len(more.trials) == 3
    assert store.studies.get("s").spec.search.space["lr"] == lr


def test_nothing_is_written_where_the_range_test_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranges, "measure_ramps", fail)
    with pytest.raises(KeyboardInterrupt):
        running.run(make_spec(), storage=f"sqlite:///{tmp_path}/hpo.db", executor=InProcess("cpu"))
    assert not (tmp_path / "hpo.db").exists()


@pytest.mark.slow
def test_in_a_process_of_its_own_it_finds_the_same() -> None:
    (cpu,) = choose_devices("cpu")
    config = make_spec().trial_config({}, seed=0)
    told: list[int] = []
    there = range_test_in_subprocess(config, cpu, threads=1, progress=lambda done, of: told.append(done))
    here = run_range_test(config, device="cpu")
    assert told == list(range(1, len(here.lrs) + 1))
    assert there.lrs == pytest.approx(here.lrs)
    assert there.leaps == pytest.approx(here.leaps, rel=0.05)


@pytest.mark.slow
def test_a_mistake_in_that_process_is_the_same_sentence() -> None:
    (cpu,) = choose_devices("cpu")
    spec = StudySpec.from_dict({**make_spec().frozen(), "model": {"name": "torchvision:nothing"}})
    with pytest.raises(UserError, match=r"model\.name"):
        range_test_in_subprocess(spec.trial_config({}, seed=0), cpu, threads=1, progress=lambda done, of: None)
