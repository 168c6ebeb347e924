"""The store: what is on disk after every call, every interruption and every race, as Optuna and we both read it."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store import database, schema
from hpo.store.ledger import LEASE_S, MAX_TRIAL_CRASHES, OUT_OF_MEMORY, ClaimLost
from hpo.store.retry import StoreFailed, is_outage
from hpo.store.store import Store
from hpo.study.records import Claim, EpochReport, StudyRecord, TrialRecord
from hpo.system import processes as liveness
from tests.rows import slow_except

if TYPE_CHECKING:
    from tests.conftest import Postgres

MakeSpec = Callable[..., StudySpec]
Change = Callable[..., None]

only_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
only_postgres = pytest.mark.parametrize("url", ["postgres"], indirect=True)
slow_on_postgres = pytest.mark.parametrize("url", slow_except(["sqlite", "postgres"], "sqlite"), indirect=True)
LONG_AGO = 1e9  # an instant in 2001


ANY_SPEC = StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}})  # where none is looked at


def begin(store: Store, spec: StudySpec) -> tuple[StudyRecord, str]:
    study = store.studies.create(spec, metadata={})
    return study, store.workers.add(study.study_id, device="cpu")


def claim(store: Store, study: StudyRecord, worker_id: str) -> Claim:
    """A claim whose parameters are chosen, as a worker has it before it trains."""
    claimed = store.trials.claim(study, worker_id)
    assert claimed is not None
    store.trials.suggest(claimed, study.spec, attributes=lambda _: {})
    return claimed


def report(store: Store, claimed: Claim, *values: float, first: int = 1) -> None:
    for epoch, value in enumerate(values, start=first):
        store.trials.report(
            claimed, ANY_SPEC, epoch=epoch, metrics={"val_accuracy": value}, value=value, may_prune=False
        )


def trial(store: Store, study: StudyRecord, number: int = 0) -> TrialRecord:
    return store.trials.get_all(study)[number]


def url_of(store: Store) -> str:
    return store.url.render_as_string(hide_password=False)


def optuna_trials(store: Store, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    """As any tool of Optuna's reads them from the database."""
    return optuna.load_study(study_name=name, storage=url_of(store)).trials


def everything(store: Store) -> dict[str, list[Any]]:
    """Every row of every table."""
    with store.storage.engine.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        return {table: sorted(map(str, connection.exec_driver_sql(f"SELECT * FROM {table}"))) for table in tables}


def expire(store: Store, claimed: Claim, change: Change) -> None:
    change(
        store,
        schema.slots_table.update().where(schema.slots_table.c.number == claimed.number).values(lease_until=LONG_AGO),
    )


def end_worker_process(store: Store, worker_id: str, change: Change) -> None:
    """The worker's row as a process leaves it that was killed: its pid is nobody's any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    change(
        store,
        schema.workers_table.update().where(schema.workers_table.c.worker_id == worker_id).values(pid=process.pid),
    )


def move_elsewhere(store: Store, worker_id: str, change: Change) -> None:
    change(
        store,
        schema.workers_table.update().where(schema.workers_table.c.worker_id == worker_id).values(machine="elsewhere"),
    )


# Studies


def test_a_created_study_is_read_back_with_its_spec_and_facts(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(0.1, 0.2, pruner={"name": "median"})
    store.studies.create(spec, metadata={"num_val": 7})
    study = Store(url_of(store)).studies.get("s")
    assert (study.spec, study.metadata["num_val"], study.stop) == (spec, 7, None)
    assert store.trials.counts(study.study_id) == {"waiting": 2}


def test_joining_the_same_spec_gives_the_same_study_and_changes_no_slot(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    claim(store, study, worker)
    assert store.studies.create(make_spec(0.1, 0.2), metadata={}).study_id == study.study_id
    assert store.trials.counts(study.study_id) == {"running": 1, "waiting": 1}


def test_joining_with_other_settings_is_refused_with_each_difference_and_nothing_written(
    store: Store, make_spec: MakeSpec
) -> None:
    store.studies.create(make_spec(0.1, 0.2), metadata={})
    before = everything(store)
    with pytest.raises(UserError, match=r"training\.epochs: 3 in the study, 5 here") as refusal:
        store.studies.create(make_spec(0.1, 0.2, epochs=5, pruner={"name": "asha"}), metadata={})
    assert "pruner.name: 'none' in the study, 'asha' here" in str(refusal.value)
    assert everything(store) == before


def test_an_unknown_study_is_refused_with_the_names_of_the_others(store: Store, make_spec: MakeSpec) -> None:
    for name in ("b", "a"):
        store.studies.create(make_spec(0.1, name=name), metadata={})
    with pytest.raises(UserError, match=r"no study 'c' in .*; there are: a, b$"):
        store.studies.get("c")
    assert sorted(study.name for study in store.studies.get_all()) == ["a", "b"]


def test_a_study_that_only_optuna_knows_is_left_alone(store: Store, make_spec: MakeSpec) -> None:
    optuna.create_study(study_name="s", storage=url_of(store))
    with pytest.raises(UserError, match="holds a study 's' that hpo did not make"):
        store.studies.create(make_spec(0.1), metadata={})
    assert store.studies.get_all() == []


def test_enlarging_adds_waiting_slots_and_keeps_what_was_trained(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 2}))
    done = claim(store, study, worker)
    report(store, done, 0.5)
    store.trials.finish(done, "complete", reason="")
    store.studies.enlarge(study, 4)
    study = store.studies.get("s")
    assert study.spec.num_trials == 4
    assert [t.state for t in store.trials.get_all(study)] == ["complete", "waiting", "waiting", "waiting"]
    with pytest.raises(UserError, match=r"at least 4.* got 3"):
        store.studies.enlarge(study, 3)
    grid = store.studies.create(make_spec(0.1, name="grid"), metadata={})
    with pytest.raises(UserError, match="cannot enlarge a grid"):
        store.studies.enlarge(grid, 4)


def test_a_stopped_study_gives_no_slot_until_it_is_started_again(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    held = claim(store, study, worker)
    store.studies.request_stop(study)
    assert store.studies.is_stopping(study.study_id)
    assert store.trials.claim(study, worker) is None
    report(store, held, 0.5)  # who holds a slot may still end it
    store.trials.finish(held, "complete", reason="")
    store.studies.start(study)
    assert not store.studies.is_stopping(study.study_id)
    assert store.trials.claim(study, worker) is not None


# Claims


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_slots_are_optuna_trials_of_the_same_number(store: Store, make_spec: MakeSpec, sampler: str) -> None:
    lrs = (0.3, 0.1, 0.2)
    spec = make_spec(*lrs) if sampler == "grid" else make_spec(search={"trials": 3})
    study, worker = begin(store, spec)
    claims = [claim(store, study, worker) for _ in range(3)]
    assert store.trials.claim(study, worker) is None
    theirs = optuna_trials(store)
    assert [(t.number, t._trial_id, t.state) for t in theirs] == [
        (c.number, c.trial_id, TrialState.RUNNING) for c in claims
    ]
    assert [t.params for t in theirs] == [t.params for t in store.trials.get_all(study)]
    if sampler == "grid":
        assert tuple(t.params["lr"] for t in theirs) == lrs


def test_eight_threads_share_out_every_slot_once(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 40, "sampler": "tpe"}))

    def work(_: int) -> list[int]:
        numbers = []
        while (claimed := store.trials.claim(study, worker)) is not None:
            store.trials.suggest(claimed, study.spec, attributes=lambda _: {"pid": 1})
            report(store, claimed, 0.5)
            store.trials.finish(claimed, "complete", reason="")
            numbers.append(claimed.number)
        return numbers

    with ThreadPoolExecutor(8) as pool:
        numbers = sorted(number for found in pool.map(work, range(8)) for number in found)
    assert numbers == list(range(40))
    assert [t.number for t in optuna_trials(store)] == numbers
    assert store.trials.counts(study.study_id) == {"complete": 40}


EIGHT_PROCESSES = """
import json, os, sys, traceback
from hpo.config.study_spec import StudySpec
from hpo.store.store import Store

def work():
    store = Store(sys.argv[1], create=True)
    study = store.studies.create(StudySpec.from_dict(json.loads(sys.argv[2])), metadata={})
    worker = store.workers.add(study.study_id, device="cpu")
    while (claim := store.trials.claim(study, worker)) is not None:
        lr = store.trials.suggest(claim, study.spec, attributes=lambda _: {})["lr"]
        store.trials.report(claim, study.spec, epoch=1, metrics={"val_accuracy": lr}, value=lr)
        store.trials.finish(claim, "complete", reason="")
        os.write(1, f"{claim.number} {lr}\\n".encode())

gate, gate_holder = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        os.close(gate_holder)
        os.read(gate, 1)  # until the parent has closed its end
        try:
            work()
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)
os.close(gate_holder)
for _ in range(8):
    os.wait()
"""


@slow_on_postgres
def test_eight_processes_create_one_study_and_train_each_grid_point_once(url: str, make_spec: MakeSpec) -> None:
    lrs = [index / 100 for index in range(1, 41)]
    ended = subprocess.run(
        [sys.executable, "-c", EIGHT_PROCESSES, url, json.dumps(make_spec(*lrs).frozen())],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert ended.stderr == ""
    pairs = [line.split() for line in ended.stdout.splitlines()]
    assert sorted((int(number), float(lr)) for number, lr in pairs) == list(enumerate(lrs))
    assert [t.params["lr"] for t in optuna_trials(Store(url))] == lrs


class Interruption(Exception):
    pass


@contextmanager
def interrupted(store: Store, *, at: int) -> Iterator[None]:
    """Raises before the statement of this index that this store sends to its database."""
    count = 0

    def before(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal count
        count += 1
        if count - 1 == at:
            raise Interruption(statement)

    engine = store.storage.engine
    sa.event.listen(engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", before)


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
    assert num_interruptions >= 3
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


@pytest.mark.parametrize("sampler", slow_except(["grid", "random", "tpe", "qmc"], "grid", "tpe"))
def test_a_trial_whose_worker_died_before_its_values_were_chosen_gets_the_same_ones(
    url: str, make_spec: MakeSpec, sampler: str
) -> None:
    def spec(name: str) -> StudySpec:
        if sampler == "grid":
            return make_spec(0.1, name=name)
        space = {"lr": {"low": 0.1, "high": 1.0}, "momentum": {"low": 0.0, "high": 0.9}}
        return make_spec(name=name, search={"trials": 1, "sampler": sampler, "space": space})

    undisturbed, _ = begin(Store(url, create=True), spec("undisturbed"))
    expected = claim(Store(url), undisturbed, "w")
    study, _ = begin(Store(url), spec("s"))
    lost = Store(url).trials.claim(study, "w")  # a store of its own: another process
    assert lost is not None
    first = Store(url)
    with suppress(Interruption), interrupted(first, at=20):
        first.trials.suggest(lost, study.spec, attributes=lambda _: {"seed": 1})
    Store(url).trials.release(lost)
    again = claim(Store(url), study, "w")
    assert (again.trial_id, again.attempt) == (lost.trial_id, 2)
    assert expected.number == again.number
    assert trial(Store(url), study).params == trial(Store(url), undisturbed).params


# A claim that was lost


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


# Reaping


def test_the_slot_of_a_dead_process_of_this_machine_is_freed_at_once(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    lost = claim(store, study, worker)
    kept = claim(store, study, store.workers.add(study.study_id, device="cpu"))
    assert store.workers.reap(study) == 0
    end_worker_process(store, worker, change)
    assert [row.alive for row in store.workers.get_all(study)] == [False, True]
    assert store.workers.reap(study) == 1
    assert [row.worker_id for row in store.workers.get_all(study)] == [kept.worker_id]
    assert [(t.number, t.state) for t in store.trials.get_all(study)] == [
        (lost.number, "waiting"),
        (kept.number, "running"),
    ]


def test_the_slot_of_a_worker_elsewhere_is_freed_when_its_lease_runs_out(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    move_elsewhere(store, worker, change)
    end_worker_process(store, worker, change)  # a pid of another machine says nothing here
    assert store.workers.reap(study) == 0
    change(store, schema.workers_table.update().values(seen_at=LONG_AGO))
    report(store, held, 0.5)  # it reports, so its lease is fresh whatever its heartbeat does
    assert store.workers.reap(study) == 0
    expire(store, held, change)
    assert store.workers.reap(study) == 1
    assert [row.alive for row in store.workers.get_all(study)] == [False]


def test_a_worker_elsewhere_that_was_given_up_works_on_when_it_comes_back(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    study, worker = begin(store, make_spec(0.1))
    lost = claim(store, study, worker)
    move_elsewhere(store, worker, change)
    expire(store, lost, change)
    change(store, schema.workers_table.update().values(seen_at=LONG_AGO))
    assert store.workers.reap(study) == 1
    again = claim(store, study, worker)
    assert store.workers.reap(study) == 0
    store.workers.renew([again], worker)
    assert store.workers.reap(study) == 0
    assert [row.alive for row in store.workers.get_all(study)] == [True]


def test_a_worker_that_left_without_its_slot_does_not_keep_it(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1))
    claim(store, study, worker)
    store.workers.remove(worker)
    assert store.workers.reap(study) == 1


def test_a_trial_that_keeps_killing_its_workers_fails(store: Store, make_spec: MakeSpec, change: Change) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    for attempt in range(1, MAX_TRIAL_CRASHES + 1):
        lost = claim(store, study, worker)
        assert (lost.number, lost.attempt) == (0, attempt)
        expire(store, lost, change)
        assert store.workers.reap(study, dead={(liveness.machine_id(), os.getpid()): "crashed"}) == 1
    ended = trial(store, study)
    assert (ended.state, ended.reason) == ("failed", f"its worker died {MAX_TRIAL_CRASHES} times")
    assert optuna_trials(store)[0].state is TrialState.FAIL
    assert claim(store, study, worker).number == 1


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


def test_deaths_that_no_supervisor_saw_do_not_count(store: Store, make_spec: MakeSpec, change: Change) -> None:
    """Power cuts, and kills of everything at once, are no fault of the trial."""
    study, worker = begin(store, make_spec(0.1))
    for _ in range(2 * MAX_TRIAL_CRASHES):
        expire(store, claim(store, study, worker), change)
        assert store.workers.reap(study, dead={(liveness.machine_id(), os.getpid() + 1): "crashed"}) == 1
    assert trial(store, study).state == "waiting"


def test_three_trials_that_kill_their_workers_stop_the_study(store: Store, make_spec: MakeSpec, change: Change) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.3, 0.4))
    for _ in range(3 * MAX_TRIAL_CRASHES):
        expire(store, claim(store, study, worker), change)
        store.workers.reap(study, dead={(liveness.machine_id(), os.getpid()): "crashed"})
    stopped = store.studies.get("s")
    assert stopped.stop == "failure"
    assert "3 trials failed the same way" in str(stopped.stop_reason)
    assert store.trials.claim(study, worker) is None


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


def test_a_round_of_reports_reads_the_study_once(
    store: Store, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(
        *(0.1 * number for number in range(1, 9)), epochs=9, pruner={"name": "median", "startup_trials": 0}
    )
    study, worker = begin(store, spec)
    held = [claim(store, study, worker) for _ in range(8)]
    reads: list[int] = []
    get_all_trials = type(store.database.cached).get_all_trials
    monkeypatch.setattr(
        type(store.database.cached),
        "get_all_trials",
        lambda *args, **rest: reads.append(0) or get_all_trials(*args, **rest),
    )
    for epoch in (1, 2, 3):
        store.trials.report_all([EpochReport(c, epoch, {}, 0.5) for c in held], spec)
    assert len(reads) == 3


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


def test_a_process_is_told_from_a_later_one_of_the_same_pid_whatever_the_clock_does() -> None:
    started = liveness.process_start_s()
    assert liveness.is_running(os.getpid(), started=started)
    assert not liveness.is_running(os.getpid(), started=started - 60)
    # Counted from the boot of the machine: a clock that is set would shift every time of day.
    uptime_s = float(Path("/proc/uptime").read_text().split()[0]) if Path("/proc/uptime").exists() else started
    assert 0 <= started <= uptime_s


# Reports and ends


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


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("last", slow_except([math.inf, -math.inf, math.nan, 1e30, -1e30], math.nan, 1e30))
def test_a_diverged_trial_is_never_best(store: Store, make_spec: MakeSpec, direction: str, last: float) -> None:
    objective = {"function": "loop:train", "direction": direction}
    study, worker = begin(store, make_spec(0.1, 0.2, objective=objective))
    diverged, good = claim(store, study, worker), claim(store, study, worker)
    report(store, diverged, last)
    store.trials.finish(diverged, "diverged", reason="")
    report(store, good, 0.5)
    store.trials.finish(good, "complete", reason="")
    assert optuna.load_study(study_name="s", storage=url_of(store)).best_trial.number == good.number


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


@slow_on_postgres
def test_optuna_reads_the_file_while_workers_write(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 30, "sampler": "tpe"}, pruner={"name": "median"}))

    def work() -> None:
        writer = Store(url_of(store))
        while (claimed := writer.trials.claim(study, worker)) is not None:
            value = writer.trials.suggest(claimed, study.spec, attributes=lambda _: {})["lr"]
            report(writer, claimed, value / 2, value)
            writer.trials.finish(claimed, "complete", reason="")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        theirs = optuna.load_study(study_name="s", storage=url_of(store))
        for t in theirs.get_trials(states=(TrialState.COMPLETE,)):
            assert t.value == t.params["lr"] == t.intermediate_values[2]
        numbers = [t.number for t in theirs.trials]
        assert numbers == list(range(len(numbers)))
    theirs = optuna.load_study(study_name="s", storage=url_of(store))
    assert theirs.metric_names == ["val_accuracy"]
    assert Counter(t.state for t in theirs.trials) == {TrialState.COMPLETE: 30}


# Opening


@pytest.mark.parametrize("name", ["hpo.db", "a b.db", "{x} #é.db"])
def test_any_file_name_will_do(tmp_path: Path, make_spec: MakeSpec, name: str) -> None:
    store = Store(f"sqlite:///{tmp_path}/{name}", create=True)
    study, worker = begin(store, make_spec(0.1))
    claim(store, study, worker)
    assert (tmp_path / name).exists()
    assert store.folder(store.studies.get("s")).parent == tmp_path / "hpo_files"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("postgres", "must be a URL"),
        ("mysql://user:secret@host/db", "must be an SQLite or Postgres URL .*got mysql://user:\\*\\*\\*@host/db"),
        ("postgresql://user:secret@host/db", r"must name the driver, as postgresql\+psycopg:.*user:\*\*\*@host/db"),
        ("postgresql+psycopg2://host/db", "must name the driver"),
        ("postgresql+psycopg://user@host", "must name a database"),
        ("postgresql+psycopg://host/db?password=secret", "must not hold a password in its query"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
    ],
)
def test_what_is_no_url_of_a_store_is_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Store(given)


@pytest.mark.parametrize("form", ["sqlite:///{}/hpo.db", "sqlite:///file:{}/hpo.db?uri=true"])
def test_a_store_that_is_absent_is_not_made_by_reading(tmp_path: Path, form: str) -> None:
    with pytest.raises(UserError, match=r"there is no store at .*hpo.db; `hpo run` makes one"):
        Store(form.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the folder {tmp_path}/absent does not exist"):
        Store(f"sqlite:///{tmp_path}/absent/hpo.db", create=True)


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a database, but long enough to be looked at" * 10, "cannot be opened.* it is not a database"),
        (None, "is no store of ours nor of Optuna's; its tables: people"),
        ("newer", "has schema version 99, and this hpo knows up to 3: upgrade hpo"),
        ("directory", "cannot be opened"),
    ],
)
def test_a_database_that_is_not_ours_is_refused_and_not_written_to(
    tmp_path: Path, create: bool, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "hpo.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "directory":
        path.mkdir()
    elif content == "newer":
        Store(f"sqlite:///{path}", create=True)
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE hpo_meta SET value = '99'")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE people (name)")
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError, match=message):
        Store(f"sqlite:///{path}", create=create)
    assert (path.read_bytes() if path.is_file() else None) == before


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


@only_sqlite
def test_a_store_that_another_process_has_locked_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "OPEN_TIMEOUT_S", 0.1)
    connection = sqlite3.connect(store.url.database or "")
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="cannot be opened for writing: it is locked by another process"):
        Store(url_of(store), create=True)
    assert Store(url_of(store)).studies.get_all() == []  # a writer does not keep readers out
    connection.close()


def test_times_are_the_databases(store: Store) -> None:
    with store.storage.engine.connect() as connection:
        query = "strftime('%s', 'now')" if connection.dialect.name == "sqlite" else "extract(epoch from now())"
        expected = float(connection.exec_driver_sql(f"SELECT {query}").scalar_one())
        assert store.database.now(connection) == pytest.approx(expected, abs=LEASE_S / 10)


# Retries by cause


def fail_once(store: Store, claimed: Claim, spec: StudySpec, key: str = "ValueError here") -> bool:
    return store.trials.fail(claimed, spec, reason="ValueError: no luck", error="Traceback", failure_key=key)


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


def test_what_ran_out_of_memory_is_tried_once_more_alone_on_its_device(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    spec = make_spec(0.1, 0.2, 0.3, search={"retries": 5})
    study, first = begin(store, spec)
    second = store.workers.add(study.study_id, device="cpu")
    other_device = store.workers.add(study.study_id, device="cuda:1")
    elsewhere = store.workers.add(study.study_id, device="cpu")
    move_elsewhere(store, elsewhere, change)

    hungry = claim(store, study, first)
    beside = claim(store, study, second)
    assert not fail_once(store, hungry, spec, key=OUT_OF_MEMORY)
    third = claim(store, study, first)
    assert third.number == 2, "those that fit come first"
    store.trials.finish(third, "diverged", reason="")
    assert store.trials.claim(study, first) is None, "it was begun beside another trial"
    store.trials.finish(beside, "diverged", reason="")
    alone = claim(store, study, first)
    assert (alone.number, alone.attempt) == (0, 2)

    change(store, schema.slots_table.update().where(schema.slots_table.c.number == 2).values(state="waiting"))
    assert store.trials.claim(study, second) is None, "another trial was begun beside it"
    for worker in (other_device, elsewhere):
        held = store.trials.claim(study, worker)
        assert held is not None
        store.trials.release(held)
    assert fail_once(store, alone, spec, key=OUT_OF_MEMORY), "it was tried a third time"
    assert trial(store, study).state == "failed"


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


def test_the_best_trials_are_the_complete_ones_in_the_studys_direction(store: Store, make_spec: MakeSpec) -> None:
    for name, direction, expected in (("up", "maximize", [3, 1, 0]), ("down", "minimize", [0, 1, 3])):
        objective = {"function": "loop:train", "direction": direction}
        study, worker = begin(store, make_spec(0.1, 0.2, 0.3, 0.4, 0.5, name=name, objective=objective))
        for value, state in ((0.1, "complete"), (0.5, "complete"), (0.9, "pruned"), (0.7, "complete")):
            held = claim(store, study, worker)
            report(store, held, value)
            store.trials.finish(held, state, reason="")
        assert [number for number, _ in store.trials.best(study, 9)] == expected
        assert store.trials.best(study, 1) == [(expected[0], 0.7 if name == "up" else 0.1)]
        assert store.trials.best(study, 0) == []
        assert store.trials.ended_numbers(study) == {0, 1, 2, 3}


# Leases against stalled workers


@only_postgres
def test_a_slot_that_is_being_reported_on_is_not_freed(store: Store, make_spec: MakeSpec, change: Change) -> None:
    """Its lease may have run out while the worker waited for the database."""
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)
    expire(store, held, change)
    with store.storage.engine.begin() as reporting:
        reporting.execute(schema.slots_table.update().values(last_epoch=1))
        assert Store(url_of(store)).workers.reap(study) == 0
    assert store.workers.reap(study) == 1


@only_postgres
def test_a_client_that_stops_in_the_middle_of_a_transaction_blocks_nobody_for_long(
    store: Store, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    monkeypatch.setattr(database, "ABANDONED_S", 1)
    stopped = Store(url_of(store))
    transaction = stopped.database.transaction()
    connection = transaction.__enter__()
    connection.execute(sa.select(schema.studies_table).with_for_update())
    assert store.trials.claim(study, worker) is not None  # waits until the server has ended the other one
    with pytest.raises(sa.exc.DBAPIError, match="idle-in-transaction") as ended:
        connection.execute(sa.select(schema.studies_table))
    assert is_outage(ended.value)
    with pytest.raises(StoreFailed):
        transaction.__exit__(None, None, None)


# A database that goes away


@pytest.mark.parametrize("url", ["stoppable_postgres"], indirect=True)
def test_a_restarted_server_is_waited_for_and_nothing_is_lost(
    store: Store, make_spec: MakeSpec, stoppable_postgres: Postgres
) -> None:
    study, worker = begin(store, make_spec(0.1))
    patient = Store(url_of(store)).retrying(for_s=600)
    held = claim(patient, study, worker)
    stoppable_postgres.stop()
    try:
        with pytest.raises(StoreFailed):
            store.trials.report(held, ANY_SPEC, epoch=1, metrics={}, value=0.5)
        with pytest.raises(database.Unreachable, match="cannot be opened"):
            Store(url_of(store))
        reporting = threading.Thread(target=lambda: report(patient, held, 0.5, 0.6))
        reporting.start()
        reporting.join(timeout=0.5)
        assert reporting.is_alive()
    finally:
        stoppable_postgres.start()
    reporting.join(timeout=180)
    assert not reporting.is_alive()
    store.trials.finish(held, "complete", reason="")  # the store that was refused is of use again
    assert (trial(store, study).epochs, trial(store, study).value) == ([1, 2], 0.6)


@only_sqlite
def test_a_lock_that_outlasts_the_timeout_is_waited_for(url: str, make_spec: MakeSpec) -> None:
    study, worker = begin(Store(url, create=True), make_spec(0.1))
    patient, impatient = Store(f"{url}?timeout=0.1").retrying(for_s=600), Store(f"{url}?timeout=0.1")
    held = claim(patient, study, worker)
    writer = sqlite3.connect(patient.url.database or "")
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreFailed, match="locked"):
        impatient.trials.report(held, ANY_SPEC, epoch=1, metrics={}, value=0.5)
    reporting = threading.Thread(target=lambda: report(patient, held, 0.5))
    reporting.start()
    reporting.join(timeout=0.5)
    assert reporting.is_alive()
    writer.close()
    reporting.join(timeout=180)
    assert not reporting.is_alive()
    assert trial(impatient, study).epochs == [1]


def test_a_worker_that_is_told_to_leave_waits_no_longer(url: str, make_spec: MakeSpec) -> None:
    study, worker = begin(Store(url, create=True), make_spec(0.1))
    told = threading.Event()
    patient = Store(url).retrying(for_s=600, until=told.is_set)
    held = claim(patient, study, worker)
    broken = sa.exc.OperationalError("SELECT", {}, Exception("the server went away"))
    calls = []

    def fails(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            told.set()
        raise broken

    sa.event.listen(patient.storage.engine, "before_cursor_execute", fails)
    with pytest.raises(StoreFailed):
        report(patient, held, 0.5)
    assert len(calls) >= 3


def test_a_request_that_is_wrong_is_not_tried_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Store(url, create=True).retrying(for_s=600)
    with patient.storage.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE hpo_attempts")
        connection.exec_driver_sql("DROP TABLE hpo_slots")
    monkeypatch.setattr("hpo.store.retry.time.sleep", lambda _: pytest.fail("it is tried again"))
    with pytest.raises(StoreFailed):
        patient.trials.counts(1)


# Other versions, other stores


def make_version_1(store: Store) -> None:
    with store.storage.engine.begin() as connection:
        for statement in (
            "ALTER TABLE hpo_slots DROP COLUMN kind",
            "ALTER TABLE hpo_slots DROP COLUMN replicate",
            "ALTER TABLE hpo_slots DROP COLUMN tested",
            "ALTER TABLE hpo_slots DROP COLUMN failures",
            "ALTER TABLE hpo_slots DROP COLUMN alone",
            "ALTER TABLE hpo_slots DROP COLUMN pruned_at",
            "DROP TABLE hpo_attempts",
            "UPDATE hpo_meta SET value = '1' WHERE key = 'schema_version'",
        ):
            connection.exec_driver_sql(statement)


def test_a_store_of_an_older_version_is_refused_until_it_is_upgraded_and_then_goes_on(
    store: Store, make_spec: MakeSpec, url: str
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    report(store, claim(store, study, worker), 0.5)
    make_version_1(store)
    for create in (False, True):
        with pytest.raises(UserError, match=r"schema version 1, and this hpo needs 3: .*`hpo storage upgrade`"):
            Store(url, create=create)
    assert database.upgrade(database.parse_url(url)) == [
        "our tables: from version 1 to 3",
        f"Optuna's tables: version {store.storage.get_current_version()} already",
    ]
    assert database.upgrade(database.parse_url(url))[0] == "our tables: version 3 already"
    upgraded = Store(url)
    assert trial(upgraded, study).epochs == [1]
    assert claim(upgraded, study, worker).number == 1
    assert upgraded.problems(study) == []


def test_upgrading_an_empty_database_makes_the_tables(url: str) -> None:
    assert database.upgrade(database.parse_url(url)) == [
        f"made the tables of {database.parse_url(url)}, schema version {schema.SCHEMA_VERSION}"
    ]
    assert Store(url).studies.get_all() == []


def test_what_ledger_and_optuna_do_not_agree_on_is_found(store: Store, make_spec: MakeSpec, change: Change) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.3))
    for _ in range(2):
        held = claim(store, study, worker)
        report(store, held, 0.5)
        store.trials.finish(held, "complete", reason="")
    assert store.problems(study) == []
    change(store, schema.slots_table.update().where(schema.slots_table.c.number == 0).values(state="failed"))
    change(store, schema.slots_table.update().where(schema.slots_table.c.number == 1).values(trial_id=None))
    assert store.problems(study) == [
        "trial 0 of study 's' is failed, and to Optuna trial 0, COMPLETE",
        "Optuna's trial 1 of study 's' has no slot",
    ]


@pytest.mark.parametrize("sampler", slow_except(["grid", "tpe"], "tpe"))
def test_a_copied_study_is_the_same_and_goes_on_in_the_other_store(
    store: Store, make_spec: MakeSpec, tmp_path: Path, sampler: str
) -> None:
    spec = make_spec(*[n / 10 for n in range(1, 7)]) if sampler == "grid" else make_spec(search={"trials": 6})
    study, worker = begin(store, spec)
    for value, state in ((0.5, "complete"), (0.4, "pruned"), (math.nan, "diverged"), (0.7, "failed")):
        held = claim(store, study, worker)
        report(store, held, 0.3, value)
        store.trials.finish(held, state, reason="because")
    running = claim(store, study, worker)
    report(store, running, 0.3)
    target = Store(f"sqlite:///{tmp_path}/other.db", create=True)
    begin(target, make_spec(0.1, name="another"))  # so that no id is the same by chance
    with pytest.raises(UserError, match="is in training"):
        target.studies.copy_from(store.studies, study, metadata={**study.metadata, "uid": "0123abcd"})
    store.trials.release(running)
    copied = target.studies.copy_from(store.studies, study, metadata={**study.metadata, "uid": "0123abcd"})
    before, after = store.trials.get_all(study), target.trials.get_all(copied)
    assert [(t.state, t.params, t.value, t.curves) for t in before] == [
        (t.state, t.params, t.value, t.curves) for t in after
    ]
    assert [t.params for t in optuna_trials(target)] == [t.params for t in optuna_trials(store)]
    assert target.problems(copied) == []
    assert (copied.spec, copied.key) == (study.spec, "s-0123abcd")
    again = claim(target, copied, target.workers.add(copied.study_id, device="cpu"))
    assert (again.number, again.attempt) == (4, 2)
    with pytest.raises(UserError, match="holds a study 's' already"):
        target.studies.copy_from(store.studies, study, metadata={**study.metadata, "uid": "0123abce"})


def test_a_copy_that_is_interrupted_leaves_nothing(store: Store, make_spec: MakeSpec, tmp_path: Path) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    held = claim(store, study, worker)
    report(store, held, 0.3)
    store.trials.release(held)
    target = Store(f"sqlite:///{tmp_path}/other.db", create=True)
    before = everything(target)
    for at in range(200):
        with suppress(Interruption), interrupted(target, at=at):
            target.studies.copy_from(store.studies, study, metadata={**study.metadata, "uid": "0123abcd"})
            break
        assert everything(target) == before
    assert at > 5
    assert everything(target) != before


@only_postgres
@pytest.mark.parametrize("action", slow_except(["claim", "suggest", "report", "finish"], "report"))
def test_a_connection_that_is_cut_at_any_statement_is_replaced_and_the_call_succeeds(
    store: Store, make_spec: MakeSpec, postgres: Any, action: str
) -> None:
    study, worker = begin(store, make_spec(search={"trials": 60, "sampler": "tpe"}, pruner={"name": "median"}))
    patient = Store(url_of(store)).retrying(for_s=600)
    cut = postgres.execute
    engine = patient.storage.engine

    def prepared() -> Claim | None:
        if action == "claim":
            return None
        held = patient.trials.claim(study, worker)
        assert held is not None
        if action in ("report", "finish"):
            patient.trials.suggest(held, study.spec, attributes=lambda _: {})
        if action == "finish":
            report(patient, held, 0.5)
        return held

    actions: dict[str, Callable[[Any], Any]] = {
        "claim": lambda _: patient.trials.claim(study, worker),
        "suggest": lambda held: patient.trials.suggest(held, study.spec, attributes=lambda _: {"seed": 1}),
        "report": lambda held: patient.trials.report(held, study.spec, epoch=1, metrics={}, value=0.5),
        "finish": lambda held: patient.trials.finish(held, "complete", reason=""),
    }
    for at in range(0, 60, 3):
        held = prepared()
        count = 0

        def before(connection: Any, *_: Any, at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at + 1:
                pid = connection.connection.dbapi_connection.info.backend_pid
                cut(f"SELECT pg_terminate_backend({pid}, 1000)")

        sa.event.listen(engine, "before_cursor_execute", before)
        actions[action](held)
        sa.event.remove(engine, "before_cursor_execute", before)
        if count <= at:
            break
    assert at > 3
    assert store.problems(study) == []


def test_an_error_of_the_database_is_never_the_trials(
    store: Store, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, worker = begin(store, make_spec(0.1))
    held = claim(store, study, worker)

    def breaks(*_: Any, **__: Any) -> None:
        raise optuna.exceptions.StorageInternalError("x")

    monkeypatch.setattr(type(store.database.cached), "get_trial", breaks)
    with pytest.raises(StoreFailed):
        store.trials.last_report(held)


def test_a_dead_trial_of_another_study_does_not_keep_a_device(
    store: Store, make_spec: MakeSpec, change: Change
) -> None:
    other, gone = begin(store, make_spec(0.1, name="other"))
    hungry = claim(store, other, gone)
    fail_once(store, hungry, make_spec(0.1), key=OUT_OF_MEMORY)
    assert claim(store, other, gone).attempt == 2
    study, worker = begin(store, make_spec(0.1))
    assert store.trials.claim(study, worker) is None
    end_worker_process(store, gone, change)
    assert store.trials.claim(study, worker) is not None


def test_a_name_from_a_store_cannot_name_a_folder_elsewhere(store: Store, make_spec: MakeSpec) -> None:
    store.studies.create(make_spec(0.1), metadata={})
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE studies SET study_name = '../../evil'")
    with pytest.raises(UserError, match=r"study '../../evil' in .* is damaged: its spec names it 's'"):
        store.studies.get("../../evil")


def test_several_may_enlarge_a_study_at_once(store: Store, make_spec: MakeSpec) -> None:
    study, _ = begin(store, make_spec(search={"trials": 2}))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Store(url_of(store)).studies.enlarge(study, 9), range(4)))
    assert store.trials.counts(study.study_id) == {"waiting": 9}
    assert store.studies.get("s").spec.num_trials == 9


def test_a_store_of_a_newer_version_is_not_upgraded(store: Store) -> None:
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo_meta SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(UserError, match=r"schema version 99, and this hpo knows up to 3: upgrade hpo"):
        database.upgrade(store.url)


@pytest.mark.parametrize("column", ["spec", "metadata"])
@pytest.mark.parametrize("content", slow_except(["{broken", "[1]", "{}"], "{broken"))
def test_one_damaged_study_does_not_keep_anybody_from_the_others(
    store: Store, make_spec: MakeSpec, column: str, content: str
) -> None:
    store.studies.create(make_spec(0.1, name="good"), metadata={})
    bad = store.studies.create(make_spec(0.1, name="bad"), metadata={})
    with store.storage.engine.begin() as connection:
        connection.execute(
            schema.studies_table.update().where(schema.studies_table.c.study_id == bad.study_id), {column: content}
        )
    assert [study.name for study in store.studies.get_all()] == ["good"]
    (damage,) = store.studies.damages()
    assert "study 'bad'" in damage
    with pytest.raises(UserError, match="study 'bad'"):
        store.studies.get("bad")
