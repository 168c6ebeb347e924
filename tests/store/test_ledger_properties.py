"""The ledger as a state machine: whatever workers do in whatever order, the tables agree and no slot is given twice."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hpo.config.study_spec import StudySpec
from hpo.store import schema
from hpo.store.ledger import ClaimLost
from hpo.store.store import Store
from hpo.study.records import ENDED, Claim, EpochReport
from hpo.system.processes import machine_id
from hpo.train.failures import OUT_OF_MEMORY
from tests.store.helpers import LONG_AGO

NUM_WORKERS, NUM_TRIALS, MAX_EPOCH = 2, 5, 3
SPEC = StudySpec.from_dict(
    {
        "name": "s",
        "search": {"sampler": "random", "trials": NUM_TRIALS, "retries": 1, "space": {"lr": {"low": 0.1, "high": 1.0}}},
        "pruner": {"name": "median", "startup_trials": 1, "warmup_epochs": 0},
        "confirm": {"top": 1, "seeds": 2},
    }
)
workers = st.integers(0, NUM_WORKERS - 1)
values = st.sampled_from([0.1, 0.5, 0.9])


class LedgerMachine(RuleBasedStateMachine):
    """Several workers that hold claims, of which some are lost without the worker's knowledge."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hpo-ledger-"))

    @initialize()
    def create(self) -> None:
        """Make the study and register its workers, each on a machine of its own."""
        self.store = Store(f"sqlite:///{self.folder}/hpo.db", create=True)
        self.study = self.store.studies.create(SPEC, metadata={})
        names = [f"elsewhere {index}" for index in range(NUM_WORKERS)]
        self.worker_ids = [self.store.workers.add(self.study.study_id, device=name) for name in names]
        for worker_id, name in zip(self.worker_ids, names, strict=True):
            self.change(schema.workers_table, schema.workers_table.c.worker_id == worker_id, machine=name)
        self.held: list[list[Claim]] = [[] for _ in range(NUM_WORKERS)]  # as each worker believes
        self.holders: dict[int, Claim] = {}  # as the store should have it, by the number of the slot
        self.attempts: dict[int, int] = {}
        self.ended: dict[int, dict[str, Any]] = {}  # the rows of slots that have ended

    def teardown(self) -> None:
        """Remove the database."""
        self.store.storage.engine.dispose()
        shutil.rmtree(self.folder)

    def change(self, table: sa.Table, condition: sa.ColumnElement[bool], **values: Any) -> None:
        """Change rows behind the store's back."""
        with self.store.storage.engine.begin() as connection:
            connection.execute(table.update().where(condition).values(**values))

    def is_lost(self, claim: Claim) -> bool:
        """Return whether the slot should be no longer this claim's."""
        return self.holders.get(claim.number) != claim

    def pick_claim(self, data: st.DataObject) -> tuple[int, Claim]:
        """Choose a worker that believes to hold a claim, and one of its claims."""
        worker = data.draw(st.sampled_from([worker for worker, claims in enumerate(self.held) if claims]))
        return worker, data.draw(st.sampled_from(self.held[worker]))

    def drop(self, worker: int, claim: Claim) -> None:
        """Forget a claim that was given back, ended, or found lost."""
        self.held[worker].remove(claim)
        if not self.is_lost(claim):
            del self.holders[claim.number]

    def call(self, worker: int, claim: Claim, method: Any, *arguments: Any, **options: Any) -> Any:
        """Call a method of the store with a claim, which raises ClaimLost if, and only if, the claim is lost."""
        try:
            result = method(claim, *arguments, **options)
        except ClaimLost:
            assert self.is_lost(claim)
            self.held[worker].remove(claim)
            return None
        assert not self.is_lost(claim)
        return result

    @precondition(lambda self: len(self.holders) + len(self.ended) < NUM_TRIALS)
    @rule(worker=workers)
    def claim(self, worker: int) -> None:
        """Claim a slot that nobody holds, with the next attempt's number, and choose the trial's values."""
        claim = self.store.trials.claim(self.study, self.worker_ids[worker], num_held=len(self.held[worker]))
        if claim is None:
            return
        assert claim.number not in self.holders
        assert claim.number not in self.ended
        assert claim.attempt == self.attempts.get(claim.number, 0) + 1
        self.attempts[claim.number] = claim.attempt
        self.holders[claim.number] = claim
        self.held[worker].append(claim)
        self.store.trials.suggest(claim, SPEC, attributes=lambda _: {"worker": worker})
        self.store.trials.begin(claim, resumed_from=0)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), value=values)
    def report(self, data: st.DataObject, value: float) -> None:
        """Report an epoch of every claim that the worker believes to hold: those that it has lost are told so."""
        worker, _ = self.pick_claim(data)
        claims = list(self.held[worker])
        epochs = [data.draw(st.integers(1, MAX_EPOCH)) for _ in claims]
        reports = [
            EpochReport(claim, epoch, {"val_accuracy": value}, value, may_prune=claim.kind == "search")
            for claim, epoch in zip(claims, epochs, strict=True)
        ]
        verdicts = self.store.trials.report_all(reports, SPEC)
        for claim, verdict in zip(claims, verdicts, strict=True):
            assert (verdict is None) == self.is_lost(claim)
            if verdict is None:
                self.held[worker].remove(claim)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), state=st.sampled_from(["complete", "pruned", "diverged"]))
    def finish(self, data: st.DataObject, state: str) -> None:
        """End a trial that has reported: its slot is nobody's from then on."""
        worker, claim = self.pick_claim(data)
        if self.store.trials.last_report(claim) is None:
            return
        self.call(worker, claim, self.store.trials.finish, state, reason="finished")
        if claim in self.held[worker]:
            self.drop(worker, claim)

    @precondition(lambda self: any(self.held))
    @rule(
        data=st.data(),
        key=st.sampled_from(["ValueError", OUT_OF_MEMORY]),
        alongside_others=st.booleans(),
    )
    def fail(self, data: st.DataObject, key: str, alongside_others: bool) -> None:
        """End an attempt by an exception: the trial waits for another try, or has failed."""
        worker, claim = self.pick_claim(data)
        options = {"reason": key, "error": "Traceback", "failure_key": key, "alongside_others": alongside_others}
        self.call(worker, claim, self.store.trials.fail, SPEC, **options)
        if claim in self.held[worker]:
            self.drop(worker, claim)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give a trial back unfinished."""
        worker, claim = self.pick_claim(data)
        self.call(worker, claim, self.store.trials.release)
        if claim in self.held[worker]:
            self.drop(worker, claim)

    @precondition(lambda self: any(self.held))
    @rule(worker=workers)
    def renew(self, worker: int) -> None:
        """Renew the leases of all that a worker believes to hold: those that it has lost stay lost."""
        self.store.workers.renew(self.held[worker], self.worker_ids[worker])

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), then=st.sampled_from(["is told", "goes on", "claims again"]))
    def lose(self, data: st.DataObject, then: str) -> None:
        """Let the leases of a worker run out and reap them; it may be told, or go on as if nothing had happened."""
        worker, _ = self.pick_claim(data)
        slots = schema.slots_table
        is_held = (slots.c.worker_id == self.worker_ids[worker]) & (slots.c.state == "running")
        self.change(slots, is_held, lease_until=LONG_AGO)
        mine = [claim for claim in self.held[worker] if not self.is_lost(claim)]
        assert self.store.workers.reap(self.study) == len(mine)
        for claim in mine:
            del self.holders[claim.number]
        if then == "is told":
            self.held[worker].clear()
        if then == "claims again":  # perhaps the same slot, so that it believes to hold two attempts
            self.claim(worker)
            self.report(data, 0.5)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), cause=st.sampled_from(["crashed", "killed", "gone"]))
    def die(self, data: st.DataObject, cause: Any) -> None:
        """Let a worker's supervisor see it die, and put a new one in its place."""
        worker, _ = self.pick_claim(data)
        (row,) = [
            row
            for row in self.store.studies.rows(schema.workers_table, self.study)
            if row["worker_id"] == self.worker_ids[worker]
        ]
        assert row["machine"] != machine_id()
        mine = [claim for claim in self.held[worker] if not self.is_lost(claim)]
        assert self.store.workers.reap(self.study, dead={(row["machine"], row["pid"]): cause}) == len(mine)
        for claim in mine:
            del self.holders[claim.number]
        self.held[worker].clear()
        self.worker_ids[worker] = self.store.workers.add(self.study.study_id, device=row["device"])
        is_new = schema.workers_table.c.worker_id == self.worker_ids[worker]
        self.change(schema.workers_table, is_new, machine=row["machine"])

    @precondition(lambda self: any(self.held))
    @rule(worker=workers)
    def stop_and_start(self, worker: int) -> None:
        """Stop the study, so that nothing is claimed, and start it again."""
        self.store.studies.request_stop(self.study)
        assert self.store.trials.claim(self.study, self.worker_ids[worker]) is None
        self.store.studies.start(self.study)

    @invariant()
    def the_ledger_and_optuna_agree(self) -> None:
        """Check that `hpo storage check` would find nothing."""
        assert self.store.problems(self.study) == []

    @invariant()
    def every_slot_is_as_it_should_be(self) -> None:
        """Check that a running slot has the one holder that it was given to, and that an ended slot never changes."""
        for row in self.store.studies.rows(schema.slots_table, self.study):
            number = row["number"]
            claim = self.holders.get(number)
            assert (row["state"] == "running") == (claim is not None)
            if claim is not None:
                assert (row["worker_id"], row["attempt"]) == (claim.worker_id, claim.attempt)
            assert row["attempt"] == self.attempts.get(number, 0)
            if row["state"] in ENDED:
                assert self.ended.setdefault(number, row) == row

    @invariant()
    def attempts_are_counted_and_one_at_most_is_open(self) -> None:
        """Check that every attempt has its row, and all an outcome but the one that holds the slot."""
        rows = self.store.studies.rows(schema.attempts_table, self.study)
        by_number: dict[int, list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: (row["number"], row["attempt"])):
            by_number.setdefault(row["number"], []).append(row)
        for number, attempts in by_number.items():
            assert [row["attempt"] for row in attempts] == list(range(1, self.attempts[number] + 1))
            num_open = sum(row["outcome"] is None for row in attempts)
            assert num_open == (1 if number in self.holders else 0)
            assert all(row["outcome"] is not None for row in attempts[:-1])


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=7,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,  # the same runs each time: a failure is this commit's
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
