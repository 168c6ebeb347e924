"""Reports: recorded together, and judged once by the pruner."""

from __future__ import annotations

import json
import math
import random
import threading

import pytest
import sqlalchemy as sa

from hpo.store.store import Store
from hpo.study.records import EpochReport
from tests.rows import slow_except
from tests.store.helpers import Change, MakeSpec, begin, claim, expire, optuna_trials, report, slow_on_postgres, trial


@slow_on_postgres
@pytest.mark.parametrize("pruner", slow_except(["median", "asha"], "asha"))
def test_a_kill_changes_nothing_in_what_the_pruner_has_said(
    store: Store, make_spec: MakeSpec, change: Change, pruner: str
) -> None:
    """It is asked once an epoch: what it let pass goes on, and what it dropped is dropped, whenever the worker died."""
    options = {"startup_trials": 2, "warmup_epochs": 0} if pruner == "median" else {"reduction_factor": 2}
    spec = make_spec(search={"trials": 12}, epochs=8, pruner={"name": pruner, **options})
    study, worker = begin(store, spec)
    passed = claim(store, study, worker)
    assert store.trials.report(passed, spec, epoch=1, metrics={}, value=0.1) == "go on"
    for _ in range(8):
        better = claim(store, study, worker)
        for epoch in range(1, 9):
            store.trials.report(better, spec, epoch=epoch, metrics={}, value=0.5 + epoch / 100, may_prune=epoch < 8)
        store.trials.finish(better, "complete", reason="")
    dropped = claim(store, study, worker)
    epochs = iter(range(1, 8))
    at = next(n for n in epochs if store.trials.report(dropped, spec, epoch=n, metrics={}, value=0.1) == "prune")
    for lost in (passed, dropped):
        expire(store, lost, change)
    store.workers.reap(study)
    again = [claim(store, study, worker) for _ in range(2)]
    assert [c.number for c in again] == [passed.number, dropped.number]
    assert store.trials.report(again[0], spec, epoch=1, metrics={}, value=0.1) == "go on"
    assert store.trials.report(again[1], spec, epoch=at, metrics={}, value=0.1) == "prune"


@slow_on_postgres
@pytest.mark.parametrize(
    "pruner", slow_except(["none", "asha", "median", "patient"], "asha")
)  # Hyperband's brackets hang on the name
def test_trials_that_report_together_are_told_what_they_are_told_one_by_one(
    store: Store, make_spec: MakeSpec, pruner: str
) -> None:
    draw = random.Random(0)
    values = {(number, epoch): draw.random() for number in range(12) for epoch in range(1, 10)}

    def verdicts(name: str, *, together: bool) -> dict[tuple[int, int], str | None]:
        spec = make_spec(search={"trials": 12}, epochs=9, name=name, pruner={"name": pruner})
        study, worker = begin(store, spec)
        told: dict[tuple[int, int], str | None] = {}
        for _ in range(2):  # two rounds of six, so that the second has complete trials to be compared with
            held = [claim(store, study, worker) for _ in range(6)]
            for epoch in range(1, 10):
                reports = [EpochReport(c, epoch, {}, values[c.number, epoch], may_prune=epoch < 9) for c in held]
                parts = [reports] if together else [[report] for report in reports]
                found = [verdict for part in parts if part for verdict in store.trials.report_all(part, spec)]
                told |= {(c.number, epoch): verdict for c, verdict in zip(held, found, strict=True)}
                for c in [c for c in held if told[c.number, epoch] == "prune" or epoch == 9]:
                    store.trials.finish(c, "pruned" if told[c.number, epoch] == "prune" else "complete", reason="")
                    held.remove(c)
        return told

    expected = verdicts("one-by-one", together=False)
    assert verdicts("together", together=True) == expected
    assert (set(expected.values()) == {"go on"}) == (pruner == "none")


def test_a_lost_trial_does_not_keep_those_that_report_with_it_from_theirs(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    spec = make_spec(0.1, 0.2, 0.3)
    study, worker = begin(store, spec)
    held = [claim(store, study, worker) for _ in range(3)]
    expire(store, held[1], change)
    store.workers.reap(study)
    reports = [EpochReport(c, 1, {"val_accuracy": 0.5}, 0.5) for c in reversed(held)]
    assert store.trials.report_all(reports, spec) == ["go on", None, "go on"]
    assert [list(trial.epochs) for trial in store.trials.get_all(study)] == [[1], [], [1]]


@slow_on_postgres
def test_reports_and_the_heartbeat_do_not_wait_for_each_other(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(*(0.1 * number for number in range(1, 9)), epochs=60)
    study, worker = begin(store, spec)
    held = [claim(store, study, worker) for _ in range(8)]
    ended = threading.Event()
    failed: list[Exception] = []

    def beat() -> None:
        try:
            while not ended.is_set():
                store.workers.renew(random.sample(held, len(held)), worker)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        for epoch in range(1, 41):
            assert (
                store.trials.report_all([EpochReport(c, epoch, {}, 0.5) for c in random.sample(held, 8)], spec)
                == ["go on"] * 8
            )
    finally:
        ended.set()
        thread.join()
    assert failed == []


def test_a_stop_does_not_keep_the_pruner_from_its_word(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(0.1, 0.2, epochs=9, pruner={"name": "threshold", "lower": 0.5, "warmup_epochs": 0})
    study, worker = begin(store, spec)
    bad, good = claim(store, study, worker), claim(store, study, worker)
    store.studies.request_stop(study)
    assert store.trials.report(bad, spec, epoch=1, metrics={}, value=0.1) == "prune"
    assert store.trials.report(good, spec, epoch=1, metrics={}, value=0.9) == "stop"


def test_a_report_replaces_this_and_later_epochs_of_earlier_attempts(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, epochs=9))
    first = claim(store, study, worker)
    report(store, first, 0.1, 0.2, 0.3, 0.4)
    store.trials.release(first)
    second = claim(store, study, worker)
    report(store, second, 0.25, first=2)
    assert (trial(store, study).epochs, trial(store, study).curves["val_accuracy"]) == ([1, 2], [0.1, 0.25])
    assert optuna_trials(store)[0].intermediate_values == {1: 0.1, 2: 0.25}
    store.trials.finish(second, "complete", reason="it stopped earlier this time")
    assert trial(store, study).value == optuna_trials(store)[0].value == 0.25


def test_numbers_that_are_not_finite_are_null_in_json(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    metrics = {"val_accuracy": math.nan, "train_loss": math.inf, "other": 1.0}
    store.trials.report(held, study.spec, epoch=1, metrics=metrics, value=math.nan)
    store.trials.finish(held, "diverged", reason="nan")
    ended = trial(store, study)
    assert ended.curves == {"val_accuracy": [None], "train_loss": [None], "other": [1.0]}
    assert ended.value is None
    json.dumps(dict(ended.curves), allow_nan=False)


@pytest.mark.parametrize("num_lanes", [1, 4])
@pytest.mark.parametrize("pruner", ["none", "asha"])
def test_to_postgres_a_report_of_any_number_of_trials_is_two_statements_with_a_look_and_an_end_three(
    store: Store, make_spec: MakeSpec, num_lanes: int, pruner: str
) -> None:
    spec = make_spec(search={"trials": 4}, pruner={"name": pruner}, epochs=9)
    study, worker = begin(store, spec)
    claims = [claim(store, study, worker) for _ in range(num_lanes)]
    engine, statements = store.storage.engine, list[str]()

    def report_all(epoch: int) -> None:
        reports = [EpochReport(claimed, epoch, {"val_accuracy": 0.5}, 0.5, may_prune=True) for claimed in claims]
        assert store.trials.report_all(reports, spec) == ["go on"] * num_lanes

    report_all(1)
    sa.event.listen(engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
    report_all(3)
    num_of_report = len(statements)
    store.trials.finish(claims[0], "complete", reason="")
    num_of_end = len(statements) - num_of_report
    if engine.dialect.name == "postgresql":
        assert (num_of_report, num_of_end) == (2, 3), statements
    else:  # where a statement is no round trip
        # Those that write, the pruner's note included, are made once for each trial.
        assert num_of_report == 2 + (5 + int(pruner != "none")) * num_lanes
        assert num_of_end == 8
