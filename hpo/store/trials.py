"""The trials of a study in their database: claimed, reported on, ended, counted and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.search import proposals, samplers
from hpo.store.claiming import Waiting, read_waiting, take_slot
from hpo.store.conditions import is_attempt, is_slot
from hpo.store.confirming import last_seed_in_turn, weights_to_keep
from hpo.store.damage import refuse_damage
from hpo.store.database import Database
from hpo.store.enqueued import begin_enqueued, take_in
from hpo.store.ledger import ENDED_ELSEWHERE, ERROR_CHARACTERS, Ledger, Verdict, claim_lost, storable_text
from hpo.store.prepared import claim_values, execute_prepared
from hpo.store.pruning import Look, plan_look
from hpo.store.racing import count_claimable, hold_back
from hpo.store.reading import best_values, lock_to_claim, read_epoch_seconds, read_trials
from hpo.store.reports import LockedSlots, decide, judge_epochs, lock_slots, record_epochs
from hpo.store.retry import retry_on_outage
from hpo.store.schema import attempts_table, slots_table
from hpo.store.searches import last_unbegun
from hpo.store.slots import count_slots, lock_study, slot_states
from hpo.store.suggesting import BufferedStorage, build_suggestion, choose_values
from hpo.study import stages
from hpo.study.records import ENDED, Claim, EpochReport, StudyRecord, TrialRecord
from hpo.study.seed_race import FIRST_SEEDS
from hpo.train.failures import OUT_OF_MEMORY


class Trials:
    """The trials of the studies in a database.

    Any thread and any process may call any method. What a method has done is on disk when it returns. A method that
    takes a `Claim` raises `ClaimLost`, and changes nothing, if the slot has been given to another attempt.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ledger = Ledger(database)
        self._has_claimed = False
        self.retry = database.retry

    @retry_on_outage
    def claim(
        self, study: StudyRecord, worker_id: str, *, num_held: int = 0, may_begin_last: bool = True
    ) -> Claim | None:
        """Claim the first waiting slot that suits the worker, which holds `num_held` trials already.

        `Waiting.choose` has the rules. Return None if no such slot waits, if the study should stop, or if it was
        widened since `study` was read. Without `may_begin_last`, do not begin the last trial of the search.
        """
        if not _may_lock(self._database, study):
            return None
        if not self._has_claimed:  # to build a statement takes longer than to claim: not while others wait for the lock
            with self._database.connect() as connection:
                read_waiting(connection, study.study_id, worker_id, num_held=num_held)
            self._has_claimed = True
        with self._database.transaction() as connection:
            if not lock_to_claim(connection, study):  # one claim at a time: slot n becomes Optuna's trial n
                return None
            read = partial(_read_waiting, self._database, connection, study, worker_id)
            waiting = read(num_held=num_held, may_begin_last=may_begin_last)
            if not waiting.queue.is_in_order:
                take_in(self._database, connection, study)
                waiting = read(num_held=num_held, may_begin_last=may_begin_last)
            row = waiting.choose()
            if row is None:
                return None
            refuse_damage(self._database.url, study.name, slots_table, [row])
            if row.trial_id is not None and row.attempt == 0 and not begin_enqueued(self._database, connection, row):
                return None
            new = proposals.new_trial(study.spec, row) if row.trial_id is None else None
            return take_slot(connection, row, waiting.queue, new, worker_id=worker_id)

    @retry_on_outage
    def begin(self, claim: Claim, *, resumed_from: int, notes: Sequence[str] = ()) -> None:
        """Record the epoch of the checkpoint that an attempt resumes from, 0 for none, and notes on the others."""
        with self._ledger.locked_claim(claim) as connection:
            begun = attempts_table.update().where(is_attempt(claim)).values(resumed_from=resumed_from)
            connection.execute(begun)
            self._ledger.note(connection, claim, notes)

    @retry_on_outage
    def note(self, claim: Claim, text: str) -> None:
        """Record a problem of an attempt that does not end it."""
        with self._ledger.locked_claim(claim) as connection:
            self._ledger.note(connection, claim, [text])

    @retry_on_outage
    def suggest(
        self, claim: Claim, spec: StudySpec, *, attributes: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the trial's values, and record `attributes(values)` with them.

        They are sampled now unless an earlier attempt had them, or the trial confirms others: the sampler does not see
        such a trial. The sampler works before the transaction, for which others wait, and all is written within it.
        """
        storage = BufferedStorage(self._database.storage, spec, claim)
        # A counter is read and written in two steps, which the lock on the study keeps together.
        is_counted = claim.kind == "search" and samplers.SAMPLERS[spec.search.sampler].has_counter
        values = {} if is_counted else choose_values(storage, spec, claim)
        with self._database.transaction() as connection:
            progress = self._lock_slots(connection, [claim]).progress
            if progress and is_counted:
                lock_study(connection, claim.study_id)
                values = choose_values(storage, spec, claim)
            if progress:
                rows = storage.rows(attributes(values))
                written = rows.values | claim_values("of", claim)
                execute_prepared(connection, build_suggestion, written, *rows.shape)
        if not progress:
            raise claim_lost(claim)
        return values

    def report(
        self,
        claim: Claim,
        spec: StudySpec,
        *,
        epoch: int,
        metrics: Mapping[str, float],
        value: float,
        may_prune: bool = True,
    ) -> Verdict:
        """Record an epoch and return how the trial goes on, as `report_all` does for several trials."""
        (verdict,) = self.report_all([EpochReport(claim, epoch, metrics, value, may_prune)], spec)
        if verdict is None:
            raise claim_lost(claim)
        return verdict

    @retry_on_outage
    def report_all(self, reports: Sequence[EpochReport], spec: StudySpec) -> list[Verdict | None]:
        """Record epochs of trials that were trained together, and return how each goes on, None if its claim is lost.

        A report replaces what an earlier attempt reported of this epoch and of later ones. The pruner judges each epoch
        once, when it knows all of them, and its verdict is kept: a kill between a report and its consequences changes
        nothing.
        """
        with self._database.transaction() as connection:
            look = plan_look(self._database.storage, reports, spec)
            progress, compared = self._lock_slots(connection, [report.claim for report in reports], look)
            held = [report for report in reports if report.claim in progress]
            verdicts: dict[Claim, Verdict] = {}
            if held:
                judgement = judge_epochs(look, compared, held, progress)
                record_epochs(connection, held, progress, judgement)
                verdicts = decide(self._database, connection, held, progress, judgement, spec)
        return [verdicts.get(report.claim) for report in reports]

    def _lock_slots(self, connection: Connection, claims: Sequence[Claim], look: Look | None = None) -> LockedSlots:
        """Lock slots as `lock_slots` does, but end those whose trials another program has ended, and leave them out."""
        locked = lock_slots(connection, claims, look)
        for claim in [claim for claim, slot in locked.progress.items() if slot.is_ended_elsewhere]:
            self._ledger.end(connection, claim, "failed", ENDED_ELSEWHERE)
            del locked.progress[claim]
        return locked

    @retry_on_outage
    def last_report(self, claim: Claim) -> tuple[int, float] | None:
        """Return the last epoch that this or an earlier attempt reported, and its value; None before the first."""
        trial = self._database.storage.get_trial(claim.trial_id)
        return None if trial.last_step is None else (trial.last_step, trial.intermediate_values[trial.last_step])

    @retry_on_outage
    def epoch_seconds(self, claim: Claim) -> dict[int, float]:
        """Return how long each epoch took that was reported of the trial, in seconds by epoch."""
        with self._database.connect() as connection:
            return read_epoch_seconds(connection, claim)

    @retry_on_outage
    def finish(
        self, claim: Claim, state: str, *, reason: str, error: str | None = None, failure_key: str | None = None
    ) -> None:
        """End the slot for good. Its value is that of its last report; a failed trial has none.

        `failure_key` is equal for two trials that failed the same way; three of them stop the study.
        """
        with self._ledger.locked_claim(claim) as connection:
            self._ledger.end(connection, claim, state, reason, error=error, failure_key=failure_key)

    @retry_on_outage
    def fail(
        self,
        claim: Claim,
        spec: StudySpec,
        *,
        reason: str,
        error: str,
        failure_key: str,
        alongside_others: bool = False,
    ) -> bool:
        """End an attempt by an exception. Return True if that ends the trial too, False if it waits for another try.

        A trial is tried again `search.retries` times; one that ran out of memory once, with a device to itself. With
        `alongside_others` the error does not count, because it may be another trial's: this one becomes a suspect, and
        is tried again alone.
        """
        with self._ledger.locked_claim(claim) as connection:
            slot = is_slot(claim)
            error_tail = storable_text(error)[-ERROR_CHARACTERS:]
            if alongside_others:
                connection.execute(slots_table.update().where(slot, slots_table.c.crashes == 0).values(crashes=1))
                outcome = f"alongside others: {storable_text(reason)}"
                self._ledger.free(connection, claim, outcome, error=error_tail)
                return False
            columns = (slots_table.c.failures, slots_table.c.exclusive.label("exclusive"))
            row = connection.execute(sa.select(*columns).where(slot)).one()
            is_memory = failure_key == OUT_OF_MEMORY
            if row.exclusive if is_memory else row.failures >= spec.search.retries:
                key = None if claim.kind == "test" else failure_key  # a test that fails must not stop the study
                self._ledger.end(connection, claim, "failed", reason, error=error, failure_key=key)
                return True
            changed = {"exclusive": 1} if is_memory else {"failures": row.failures + 1}
            connection.execute(slots_table.update().where(slot).values(changed))
            self._ledger.free(connection, claim, storable_text(reason), error=error_tail)
            return False

    @retry_on_outage
    def release(self, claim: Claim, *, was_killed: bool = False) -> None:
        """Give the slot back unfinished, so that it can be claimed again.

        With `was_killed`, a signal from outside ends the worker. It counts against the trial, as a death does in
        `Workers.reap`: the trial's own code may send that signal each time.
        """
        with self._ledger.locked_claim(claim) as connection:
            self._ledger.give_back(connection, claim, "killed" if was_killed else "gone", outcome="released")

    @retry_on_outage
    def get_all(self, study: StudyRecord, *, latest: int | None = None) -> list[TrialRecord]:
        """Return every slot of the study with what is known of it, in order; or the `latest`, as `read_trials` does."""
        return read_trials(self._database, study, latest=latest)

    @retry_on_outage
    def counts(self, study_id: int) -> dict[str, int]:
        """Return how many trials are in each state, without the states that none is in; enqueued ones wait."""
        return count_slots(self._database, study_id)

    @retry_on_outage
    def num_epochs(self, study: StudyRecord) -> int:
        """Return how many epochs the study's trials have reached, all together."""
        query = sa.select(sa.func.sum(slots_table.c.last_epoch)).where(slots_table.c.study_id == study.study_id)
        with self._database.connect() as connection:
            return connection.execute(query).scalar_one() or 0

    @retry_on_outage
    def best(self, study: StudyRecord, count: int) -> list[tuple[int, float]]:
        """Return the numbers and values of the `count` best complete trials of the search, the best first."""
        with self._database.connect() as connection:
            return best_values(connection, study, count)

    @retry_on_outage
    def keeping_weights(self, study: StudyRecord, count: int) -> tuple[set[int], set[int]]:
        """Return the numbers of the trials whose last checkpoint stays, and of others that may have one."""
        with self._database.connect() as connection:
            return weights_to_keep(self._database, connection, study, count)

    @retry_on_outage
    def ended_numbers(self, study: StudyRecord) -> set[int]:
        """Return the numbers of the trials that have ended, in whatever state."""
        has_ended = slots_table.c.state.in_(ENDED)
        query = sa.select(slots_table.c.number).where(slots_table.c.study_id == study.study_id, has_ended)
        with self._database.connect() as connection:
            return set(connection.execute(query).scalars())

    @retry_on_outage
    def num_left(self, study: StudyRecord) -> int:
        """Return how many trials have yet to end, as far as that is known."""
        if study.spec.confirm is None:
            return sum(count for state, count in self.counts(study.study_id).items() if state not in ENDED)
        return stages.num_left(study, slot_states(self._database, study.study_id))

    @retry_on_outage
    def most_at_once(self, study: StudyRecord) -> int:
        """Return how many trials may wait at the same time, now or later."""
        slots, confirm = slot_states(self._database, study.study_id), study.spec.confirm
        num_waiting = sum(slot.state == "waiting" for slot in slots)
        if confirm is None or not stages.num_left(study, slots):
            return num_waiting
        return max(num_waiting, confirm.top * min(confirm.seeds, FIRST_SEEDS))


def _may_lock(database: Database, study: StudyRecord) -> bool:
    """Return whether a worker may lock a study to claim a trial: idle ones ask often, and must keep nobody waiting.

    On Postgres `lock_to_claim` locks nothing where nothing waits, so this asks only where a race holds trials back.
    """
    if database.storage.engine.dialect.name == "postgresql" and study.spec.search.sampler != "race":
        return True
    with database.connect() as connection:
        return count_claimable(database, connection, study) > 0


def _read_waiting(
    database: Database,
    connection: Connection,
    study: StudyRecord,
    worker_id: str,
    *,
    num_held: int,
    may_begin_last: bool,
) -> Waiting:
    """Return what a worker chooses from: without what a confirmation, a race or a limit of the search holds back."""
    last_seed = last_seed_in_turn(database, connection, study)
    without = hold_back(database, connection, study)
    if not may_begin_last:
        without |= last_unbegun(connection, study.study_id)
    return read_waiting(connection, study.study_id, worker_id, num_held=num_held, last_seed=last_seed, without=without)
