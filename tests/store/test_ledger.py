"""The ledger: all or nothing after every interruption, and no word from an attempt that has lost its slot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hpo.errors import UserError
from hpo.store.ledger import MAX_TRIAL_CRASHES, ClaimLost
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.system import processes as liveness
from tests.rows import slow_except
from tests.store.helpers import (
    Change,
    Interruption,
    MakeSpec,
    begin,
    claim,
    everything,
    expire,
    fail_once,
    interrupted,
    only_sqlite,
    optuna_trials,
    report,
    time_zone,
    trial,
    url_of,
)


def test_a_study_that_only_optuna_knows_is_left_alone(store: Store, make_spec: MakeSpec) -> None:
    optuna.create_study(study_name="s", storage=url_of(store))
    with pytest.raises(UserError, match="holds a study 's' that hpo did not make"):
        store.studies.create(make_spec(0.1), metadata={})
    assert store.studies.get_all() == []


@only_sqlite
def test_optuna_reads_when_a_trial_has_ended_in_every_time_zone(store: Store, make_spec: MakeSpec) -> None:
    with time_zone("XYZ+7"):
        study, worker = begin(store, make_spec(0.1))
        held = claim(store, study, worker)
        report(store, held, 0.5)
        store.trials.finish(held, "complete", reason="")
        (ended,) = optuna_trials(store)
    assert ended.duration is not None
    assert 0 <= ended.duration.total_seconds() < 600


@pytest.mark.parametrize(
    "action",
    slow_except(
        ["create_study", "claim", "suggest", "report", "finish", "release", "reap"], "claim", "suggest", "report"
    ),
)
def test_an_interruption_at_any_statement_leaves_all_or_nothing(
    store: Store, make_spec: MakeSpec, change: Change, action: str
) -> None:
    study, worker = begin(store, make_spec(search={"trials": 3}))
    first = claim(store, study, worker)
    report(store, first, 0.5, 0.6)
    second = store.trials.claim(study, worker)
    assert second is not None
    if action == "reap":
        expire(store, first, change)
        expire(store, second, change)
    actions: dict[str, Callable[[], Any]] = {
        "create_study": lambda: store.studies.create(make_spec(0.1, 0.2, name="other"), metadata={}),
        "claim": lambda: store.trials.claim(study, worker),
        "suggest": lambda: store.trials.suggest(second, study.spec, attributes=lambda _: {"seed": 1, "device": "cpu"}),
        "report": lambda: store.trials.report(first, study.spec, epoch=2, metrics={"val_accuracy": 0.7}, value=0.7),
        "finish": lambda: store.trials.finish(first, "failed", reason="x", error="y", failure_key="z"),
        "release": lambda: store.trials.release(first),
        "reap": lambda: store.workers.reap(study),
    }
    before, num_interruptions = everything(store), 0
    for at in range(200):
        with suppress(Interruption), interrupted(store, at=at):
            actions[action]()
            break
        num_interruptions += 1
        assert everything(store) == before
    assert num_interruptions >= 2  # as many as a report has statements
    assert everything(store) != before


KILLED = """
import os, signal, sys
import sqlalchemy as sa
from hpo.study.records import Claim
from hpo.store.store import Store
store = Store(sys.argv[1])
study = store.studies.get("s")
sa.event.listen(store.storage.engine, "commit", lambda _: os.kill(os.getpid(), signal.SIGKILL))
if sys.argv[2] == "claim":
    store.trials.claim(study, "w")
else:
    store.trials.finish(Claim(study.study_id, 0, 1, 1, sys.argv[2]), "failed", reason="")
"""


@pytest.mark.parametrize("action", ["claim", "finish"])
def test_a_process_killed_inside_a_transaction_leaves_no_trace(store: Store, make_spec: MakeSpec, action: str) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    claim(store, study, worker)
    before = everything(store)
    argument = "claim" if action == "claim" else worker
    killed = subprocess.run([sys.executable, "-c", KILLED, url_of(store), argument], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert everything(store) == before
    assert claim(store, study, worker).number == 1


@pytest.mark.parametrize("sampler", slow_except(["random", "tpe", "qmc", "gp", "cmaes"], "tpe"))
@pytest.mark.parametrize("pruner", slow_except(["none", "asha"], "asha"))
def test_a_stale_claim_can_do_nothing(
    store: Store, make_spec: MakeSpec, change: Change, sampler: str, pruner: str
) -> None:
    space = {"lr": {"low": 0.1, "high": 1.0}, "momentum": {"low": 0.0, "high": 0.9}}
    search = {"trials": 13, "sampler": sampler, "space": space}
    study, worker = begin(store, make_spec(search=search, pruner={"name": pruner}, epochs=5))
    for value in range(12):  # so that the sampler has something to learn from
        done = claim(store, study, worker)
        report(store, done, value / 20)
        store.trials.finish(done, "complete", reason="")
    stale = store.trials.claim(study, worker)
    assert stale is not None
    expire(store, stale, change)
    assert store.workers.reap(study) == 1
    current = store.trials.claim(study, store.workers.add(study.study_id, device="cpu"))
    assert current is not None
    assert (current.number, current.trial_id, current.attempt) == (stale.number, stale.trial_id, 2)
    before = everything(store)
    for action in (
        lambda: store.trials.suggest(stale, study.spec, attributes=lambda _: {"seed": 1}),
        lambda: store.trials.report(stale, study.spec, epoch=1, metrics={}, value=0.5),
        lambda: store.trials.finish(stale, "complete", reason=""),
        lambda: store.trials.release(stale),
    ):
        with pytest.raises(ClaimLost):
            action()
        assert everything(store) == before
    lease = before["hpo_slots"]
    store.workers.renew([stale], worker)
    assert everything(store)["hpo_slots"] == lease
    report(store, current, 0.5)
    store.trials.finish(current, "complete", reason="")
    with pytest.raises(ClaimLost):
        store.trials.finish(current, "failed", reason="twice")


def test_a_claim_whose_lease_ran_out_unnoticed_is_still_held(store: Store, make_spec: MakeSpec, change: Change) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    expire(store, held, change)
    report(store, held, 0.5)
    assert store.workers.reap(study) == 0


def test_deaths_of_workers_count_only_while_the_trial_comes_no_further(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    """A trial of many epochs may well see three crashes."""
    study, worker = begin(store, make_spec(0.1))
    for last_epoch in range(1, 2 * MAX_TRIAL_CRASHES):
        lost = claim(store, study, worker)
        report(store, lost, *[0.5] * last_epoch)
        expire(store, lost, change)
        assert store.workers.reap(study, dead={(liveness.machine_id(), os.getpid()): "crashed"}) == 1
    assert trial(store, study).state == "waiting"


@pytest.mark.parametrize(
    ("state", "optuna_state", "value"),
    [
        ("complete", TrialState.COMPLETE, 0.6),
        ("pruned", TrialState.PRUNED, 0.6),
        ("diverged", TrialState.PRUNED, None),
        ("failed", TrialState.FAIL, None),
    ],
)
def test_how_a_trial_ended_is_told_to_optuna(
    store: Store, make_spec: MakeSpec, state: str, optuna_state: TrialState, value: float | None
) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    report(store, held, 0.5, 0.6)
    store.trials.finish(held, state, reason="because", error="Traceback" if state == "failed" else None)
    ended = trial(store, study)
    assert (ended.state, ended.reason, ended.value) == (state, "because", value)
    assert ended.error == ("Traceback" if state == "failed" else None)
    (theirs,) = optuna_trials(store)
    assert theirs.state is optuna_state
    assert theirs.user_attrs["ended"] == f"{state}: because"
    if state != "diverged":  # Optuna gives every pruned trial its last report as its value
        assert theirs.value == value


def test_any_text_that_an_exception_can_hold_is_kept(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    store.trials.finish(held, "failed", reason="no file 'caf\udce9'", error="\udce9 \x00 \N{SNOWMAN}" * 10_000)
    ended = trial(store, study)
    assert ended.reason == r"no file 'caf\udce9'"
    assert ended.error is not None
    assert ended.error.endswith("\N{SNOWMAN}")


def fail(store: Store, study: StudyRecord, worker: str, key: str) -> None:
    store.trials.finish(claim(store, study, worker), "failed", reason="", error=f"traceback of {key}", failure_key=key)


def test_three_equal_failures_stop_the_study_with_their_traceback(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(*(i / 10 for i in range(1, 9))))
    fail(store, study, worker, "a")
    fail(store, study, worker, "b")
    fail(store, study, worker, "a")
    fail(store, study, worker, "c")
    assert store.studies.get("s").stop is None
    fail(store, study, worker, "a")
    stopped = store.studies.get("s")
    assert stopped.stop == "failure"
    assert stopped.stop_reason == "3 trials failed the same way\ntraceback of a"
    store.studies.request_stop(study)
    assert store.studies.get("s") == stopped  # `hpo stop` does not hide why it had stopped already
    store.studies.start(study)
    fail(store, study, worker, "a")
    fail(store, study, worker, "a")
    assert store.studies.get("s").stop is None, "failures before the restart were counted"
    fail(store, study, worker, "a")
    assert store.studies.get("s").stop == "failure"


def test_a_database_of_optunas_alone_becomes_a_store_only_for_writing(url: str, make_spec: MakeSpec) -> None:
    optuna.create_study(study_name="theirs", storage=url)
    with pytest.raises(UserError, match="holds no study of ours; `hpo run` adds one"):
        Store(url)
    store = Store(url, create=True)
    store.studies.create(make_spec(0.1), metadata={})
    assert [study.name for study in store.studies.get_all()] == ["s"]
    assert optuna.get_all_study_names(url) == ["theirs", "s"]


@only_sqlite
def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1))
    report(store, claim(store, study, worker), 0.5)
    read_only = f"sqlite:///file:{store.url.database}?mode=ro&uri=true"
    reader = Store(read_only)
    assert reader.trials.get_all(reader.studies.get("s")) == store.trials.get_all(study)
    assert reader.folder(reader.studies.get("s")) == store.folder(store.studies.get("s"))
    with pytest.raises(UserError, match="cannot be opened for writing: it is read-only"):
        Store(read_only, create=True)


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_an_exception_is_tried_again_as_often_as_the_study_says(
    store: Store, make_spec: MakeSpec, retries: int
) -> None:
    spec = make_spec(0.1, 0.2, search={"retries": retries})
    study, worker = begin(store, spec)
    for attempt in range(1, retries + 2):
        held = claim(store, study, worker)
        assert (held.number, held.attempt) == (0, attempt)
        assert fail_once(store, held, spec) == (attempt > retries)
    ended = trial(store, study)
    assert (ended.state, ended.reason, ended.error) == ("failed", "ValueError: no luck", "Traceback")
    outcomes = [(a.attempt, a.outcome, a.error) for a in ended.attempts]
    assert outcomes[:-1] == [(n, "ValueError: no luck", "Traceback") for n in range(1, retries + 1)]
    assert outcomes[-1] == (retries + 1, "failed", "Traceback")


def test_each_attempt_is_kept_with_where_it_went_on_and_how_it_ended(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1, epochs=9))
    first = claim(store, study, worker)
    store.trials.begin(first, resumed_from=0)
    report(store, first, 0.1, 0.2)
    store.trials.note(first, "the disk was full")
    store.trials.note(first, "the disk was full")
    expire(store, first, change)
    store.workers.reap(study)
    second = claim(store, study, worker)
    store.trials.begin(second, resumed_from=1, notes=["the newest was torn"])
    assert trial(store, study).epochs == [1], "shown before it is trained again"
    store.trials.release(second)
    third = claim(store, study, worker)
    store.trials.finish(third, "pruned", reason="")
    found = [(a.attempt, a.last_epoch, a.resumed_from, a.outcome, a.note) for a in trial(store, study).attempts]
    assert found == [
        (1, 0, 0, "lost", "the disk was full"),
        (2, 2, 1, "released", "the newest was torn"),
        (3, 2, None, "pruned", None),
    ]
    assert all(a.device == "cpu" and a.ended is not None and a.ended >= a.began for a in trial(store, study).attempts)
