"""Claims: every slot is given to one worker, in order, and to none that it does not suit."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.config.study_spec import StudySpec
from hpo.search import proposals
from hpo.store import schema
from hpo.store.store import Store
from hpo.train.failures import OUT_OF_MEMORY
from tests.rows import slow_except
from tests.store.helpers import (
    Change,
    Interruption,
    MakeSpec,
    begin,
    claim,
    end_worker_process,
    fail_once,
    interrupted,
    move_elsewhere,
    optuna_trials,
    report,
    slow_on_postgres,
    trial,
)


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


def test_four_threads_share_out_every_slot_once(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 20, "sampler": "tpe"}))

    def work(_: int) -> list[int]:
        numbers = []
        while (claimed := store.trials.claim(study, worker)) is not None:
            store.trials.suggest(claimed, study.spec, attributes=lambda _: {"pid": 1})
            report(store, claimed, 0.5)
            store.trials.finish(claimed, "complete", reason="")
            numbers.append(claimed.number)
        return numbers

    with ThreadPoolExecutor(4) as pool:
        numbers = sorted(number for found in pool.map(work, range(4)) for number in found)
    assert numbers == list(range(20))
    assert [t.number for t in optuna_trials(store)] == numbers
    assert store.trials.counts(study.study_id) == {"complete": 20}


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
    lrs = [index / 100 for index in range(1, 25)]
    ended = subprocess.run(
        [sys.executable, "-c", EIGHT_PROCESSES, url, json.dumps(make_spec(*lrs).frozen())],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.stderr == ""
    pairs = [line.split() for line in ended.stdout.splitlines()]
    assert sorted((int(number), float(lr)) for number, lr in pairs) == list(enumerate(lrs))
    assert [t.params["lr"] for t in optuna_trials(Store(url))] == lrs


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
    with suppress(Interruption), interrupted(first, at=2):
        first.trials.suggest(lost, study.spec, attributes=lambda _: {"seed": 1})
    Store(url).trials.release(lost)
    again = claim(Store(url), study, "w")
    assert (again.trial_id, again.attempt) == (lost.trial_id, 2)
    assert expected.number == again.number
    assert trial(Store(url), study).params == trial(Store(url), undisturbed).params


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


def test_to_postgres_a_claim_is_three_statements(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 4}))
    claim(store, study, worker)
    statements = list[str]()
    sa.event.listen(store.storage.engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
    assert store.trials.claim(study, worker) is not None
    if store.storage.engine.dialect.name == "postgresql":
        assert len(statements) == 3, statements
    else:  # where a statement is no round trip
        assert len(statements) == 9


@pytest.mark.parametrize("kind", ["search", "confirm"])
def test_a_claim_writes_what_optuna_writes_of_a_new_trial(store: Store, make_spec: MakeSpec, kind: str) -> None:
    spec = make_spec(0.1, 0.2, confirm={"top": 1, "seeds": 2})
    study, worker = begin(store, spec)
    theirs = optuna.create_study(study_name="theirs", storage=store.storage)
    with store.database.transaction() as connection:
        connection.execute(schema.slots_table.update().values(kind=kind, replicate=0 if kind == "confirm" else None))
    for number in range(2):
        assert store.trials.claim(study, worker) is not None
        with store.database.connect() as connection:
            row = connection.execute(
                schema.select_all(schema.slots_table).where(schema.slots_table.c.number == number)
            ).one()
        store.storage.create_new_trial(theirs._study_id, proposals.new_trial(spec, row))
    for ours, expected in zip(optuna_trials(store), optuna_trials(store, "theirs"), strict=True):
        assert ours.datetime_start is not None
        assert expected.datetime_start is not None
        assert abs((ours.datetime_start - expected.datetime_start).total_seconds()) < 600
        ours.datetime_start, ours._trial_id = expected.datetime_start, expected._trial_id
        assert ours == expected
