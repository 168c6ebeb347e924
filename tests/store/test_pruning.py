"""The pruner's look: what Optuna's own pruner says of a study of its own, whatever the order of reports."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.config.study_spec import StudySpec
from hpo.search.pruners import PRUNERS, build_pruner, may_prune_after
from hpo.store.store import Store
from hpo.study.records import Claim, EpochReport
from tests.rows import slow_except
from tests.store.helpers import MakeSpec, begin, claim, slow_on_postgres

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "median": {"startup_trials": 2},
    "percentile": {"percentile": 30.0, "startup_trials": 1},
    "asha": {"reduction_factor": 2},
    "hyperband": {"reduction_factor": 2},
    "patient": {"patience": 1},
    "threshold": {"lower": 0.2, "warmup_epochs": 0},
}
EPOCHS = 8


class OptunaStudy:
    """The same trials in a study of Optuna's own."""

    def __init__(self, spec: StudySpec) -> None:
        self._study = optuna.create_study(
            study_name=spec.name,
            direction=StudyDirection[spec.direction.upper()],
            pruner=build_pruner(spec),
        )
        self._trials: list[optuna.Trial] = []

    def begin(self) -> None:
        self._trials.append(self._study.ask())

    def report(self, number: int, epoch: int, value: float, *, may_prune: bool) -> bool:
        self._trials[number].report(value, epoch)
        return may_prune and self._trials[number].should_prune()

    def end(self, number: int, state: TrialState, value: float | None = None) -> None:
        self._study.tell(number, value, state=state)


def _schedule(seed: int) -> Iterator[tuple[str, float, float]]:
    """Yield what is done to which trial, both by a draw, and a value."""
    draw = random.Random(seed)
    for _ in range(160):
        kind = draw.choices(["begin", "report", "fail"], [2, 12, 0.3])[0]
        value = draw.choices([draw.random(), 0.5, math.nan, math.inf, -math.inf], [20, 3, 1, 0.3, 0.3])[0]
        yield kind, draw.random(), value


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy", "ignore::RuntimeWarning:optuna")  # of what is no number
@slow_on_postgres
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pruner", slow_except(sorted(PRUNERS), "asha", "hyperband", "median"))
def test_every_pruner_says_what_it_says_of_a_study_of_optunas_own(
    store: Store, make_spec: MakeSpec, pruner: str, seed: int
) -> None:
    spec = make_spec(search={"trials": 60}, epochs=EPOCHS, pruner={"name": pruner, **OPTIONS[pruner]})
    study, worker = begin(store, spec)
    theirs = OptunaStudy(spec)
    held: dict[int, tuple[Claim, int]] = {}  # by number: the claim and the epochs reported
    last: dict[int, float] = {}
    told = []
    for kind, which, value in _schedule(seed):
        if kind == "begin" or not held:
            claimed = claim(store, study, worker)
            held[claimed.number] = (claimed, 0)
            theirs.begin()
            continue
        number = sorted(held)[int(which * len(held))]
        claimed, epoch = held[number]
        if kind == "fail":
            del held[number]
            store.trials.finish(claimed, "failed", reason="")
            theirs.end(number, TrialState.FAIL)
            continue
        epoch, last[number] = epoch + 1, value
        held[number] = claimed, epoch
        may_prune = epoch < EPOCHS and may_prune_after(epoch, spec)
        verdict = store.trials.report(claimed, spec, epoch=epoch, metrics={}, value=value, may_prune=may_prune)
        told.append(verdict == "prune")
        assert told[-1] == theirs.report(number, epoch, value, may_prune=may_prune), (number, epoch)
        if told[-1]:
            del held[number]
            store.trials.finish(claimed, "pruned", reason="")
            theirs.end(number, TrialState.PRUNED)
        elif epoch == EPOCHS:
            del held[number]
            is_finite = math.isfinite(value)
            store.trials.finish(claimed, "complete" if is_finite else "failed", reason="")
            theirs.end(number, *((TrialState.COMPLETE, value) if is_finite else (TrialState.FAIL,)))
    assert any(told) == (pruner != "none")


def test_trials_that_have_ended_are_read_once(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(search={"trials": 20}, epochs=EPOCHS, pruner={"name": "median", "startup_trials": 0})
    study, worker = begin(store, spec)
    num_rows = list[int]()

    def after(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT") and "trial_intermediate_values" in statement and "pruned_at" in statement:
            num_rows.append(cursor.rowcount)

    sa.event.listen(store.storage.engine, "after_cursor_execute", after)
    for _ in range(6):
        claimed = claim(store, study, worker)
        for epoch in range(1, EPOCHS + 1):
            assert store.trials.report(claimed, spec, epoch=epoch, metrics={}, value=0.5) == "go on"
        store.trials.finish(claimed, "complete", reason="")
    assert len(num_rows) == 6 * EPOCHS
    if store.storage.engine.dialect.name == "postgresql":  # SQLite does not say
        assert max(num_rows) == 1 + EPOCHS + 1  # the slot; the trial that has ended since; what is judged


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_no_trial_that_confirms_is_compared(store: Store, make_spec: MakeSpec, pruner: str) -> None:
    spec = make_spec(0.1, 0.2, epochs=EPOCHS, pruner={"name": pruner}, confirm={"top": 1, "seeds": 2})
    study, worker = begin(store, spec)
    held = [claim(store, study, worker) for _ in range(2)]
    storage = store.storage
    storage.cached.set_trial_user_attr(held[1].trial_id, "kind", "confirm")
    reports = [EpochReport(held[0], 1, {}, 0.5, may_prune=True)]
    assert store.trials.report_all(reports, spec) == ["go on"]
    assert [trial.number for trial in storage.compared_trials[study.study_id].values()] == [0]


def test_a_trial_is_judged_by_what_its_last_attempt_reported(store: Store, make_spec: MakeSpec) -> None:
    pruner = {"name": "median", "startup_trials": 1, "warmup_epochs": 4}
    spec = make_spec(search={"trials": 2}, epochs=EPOCHS, pruner=pruner)
    study, worker = begin(store, spec)

    def report(claimed: Claim, first: int, *values: float) -> list[str]:
        return [
            store.trials.report(claimed, spec, epoch=epoch, metrics={}, value=value)
            for epoch, value in enumerate(values, start=first)
        ]

    complete = claim(store, study, worker)
    report(complete, 1, *[0.5] * EPOCHS)
    store.trials.finish(complete, "complete", reason="")
    first = claim(store, study, worker)
    assert report(first, 1, 0.4, 0.4, 0.9, 0.9) == ["go on"] * 4
    store.trials.release(first)
    second = claim(store, study, worker)
    assert (second.number, second.attempt) == (first.number, 2)
    store.trials.begin(second, resumed_from=2)
    assert report(second, 3, 0.1, 0.1, 0.1) == ["go on", "go on", "prune"]
