"""The ledger: the changes to one slot inside a transaction, each made with Optuna's tables.

A slot is one trial of the study's budget; slot n is trial n of the Optuna study. It is claimed under a lease, reported
on, and ended exactly once. An attempt that has lost its slot can change nothing: its `Claim` no longer matches.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import sqlalchemy as sa
from optuna.storages._rdb.models import TrialValueModel
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from hpo.errors import UserError
from hpo.store.conditions import is_attempt, is_held, is_slot
from hpo.store.database import Database, clock_of, execute_together, upsert
from hpo.store.optuna_rows import utc_now
from hpo.store.prepared import claim_values, execute_prepared, named_claim
from hpo.store.schema import (
    attempts_table,
    intermediate_values,
    optuna_trials,
    slots_table,
    studies_table,
    trial_user_attributes,
    trial_values,
)
from hpo.study.processes import Cause
from hpo.study.records import ENDED, Claim


def _lease_s() -> float:
    text = os.environ.get("HPO_LEASE_S") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86_400:
        raise UserError(f"HPO_LEASE_S must be a number of seconds between 1 and 86400, got {text!r}")
    return seconds


LEASE_S = _lease_s()  # another worker may take a trial whose claim was not renewed for this long
MAX_TRIAL_CRASHES = 3  # a trial fails when its worker has crashed this often without an epoch in between
MAX_TRIAL_KILLS = 10  # the same for workers that were killed from outside, perhaps not because of the trial
SAME_FAILURE_LIMIT = 3  # this many trials failing the same way stop the study
ENDED_ELSEWHERE = "another program has ended the trial with Optuna"
ERROR_CHARACTERS = 20_000  # the end of a traceback that is kept

Verdict = Literal["go on", "prune", "wait", "stop"]


class ClaimLost(Exception):
    """The slot is no longer this attempt's: the worker should drop the trial, which another one may train by now."""


def claim_lost(claim: Claim) -> ClaimLost:
    """Return the exception that says which claim no longer holds its slot."""
    return ClaimLost(f"trial {claim.number}, attempt {claim.attempt}")


def extend_lease(dialect_name: str) -> sa.Update:
    """Return the statement that extends the lease of the claim named "of", if it holds its slot."""
    is_named = is_held(named_claim("of"))
    return slots_table.update().where(is_named).values(lease_until=clock_of(dialect_name) + LEASE_S)


def build_extension(dialect_name: str) -> list[sa.Update]:
    """Return the statement of `extend_lease`, to be executed alone."""
    return [extend_lease(dialect_name)]


class Ledger:
    """The changes to one slot. The caller is in a transaction, and holds the slot where a method takes a `Claim`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def locked_claim(self, claim: Claim) -> Iterator[Connection]:
        """Open a transaction and extend the lease; raise ClaimLost if the claim no longer holds its slot."""
        with self._database.transaction() as connection:
            if not self.extend(connection, claim):
                raise claim_lost(claim)
            yield connection

    def extend(self, connection: Connection, claim: Claim) -> bool:
        """Extend the lease and lock the slot; return False if the claim no longer holds it."""
        extended = execute_prepared(connection, build_extension, claim_values("of", claim))
        return bool(extended.rowcount == 1)

    def note(self, connection: Connection, claim: Claim, texts: Sequence[str]) -> None:
        """Record problems of the attempt, each of them once."""
        before = connection.execute(sa.select(attempts_table.c.note).where(is_attempt(claim))).scalar()
        known = before or ""
        new = [text for text in map(storable_text, texts) if text not in known]  # a full disk is full every epoch
        if new:
            note = "\n".join([before, *new] if before else new)
            connection.execute(attempts_table.update().where(is_attempt(claim)).values(note=note))

    def give_back(self, connection: Connection, claim: Claim, cause: Cause, *, outcome: str) -> None:
        """Free the slot of a worker that is gone or leaves, or fail its trial if workers have died of it too often.

        They are counted until the trial reaches another epoch; those that are "gone" are not.
        """
        if cause != "gone":
            died = slots_table.update().where(is_held(claim)).values(crashes=slots_table.c.crashes + 1)
            connection.execute(died)
            num_crashes = connection.execute(sa.select(slots_table.c.crashes).where(is_slot(claim))).scalar_one()
            if num_crashes >= (MAX_TRIAL_CRASHES if cause == "crashed" else MAX_TRIAL_KILLS):
                reason = f"its worker died {num_crashes} times"
                if outcome == "released":
                    reason = f"a signal ended its worker {num_crashes} times; the training code may send it"
                self.end(connection, claim, "failed", reason, failure_key="its worker died")
                return
        self.free(connection, claim, outcome)

    def free(self, connection: Connection, claim: Claim, outcome: str, *, error: str | None = None) -> None:
        """Give the slot back unfinished, and end the attempt."""
        free = slots_table.update().where(is_held(claim)).values(state="waiting", worker_id=None, lease_until=None)
        connection.execute(free)
        connection.execute(self._attempt_end(claim, outcome, error))

    def end(
        self,
        connection: Connection,
        claim: Claim,
        state: str,
        reason: str,
        *,
        error: str | None = None,
        failure_key: str | None = None,
    ) -> None:
        """End the slot and its attempt for good, and Optuna's trial with them.

        A trial that another program has ended with Optuna's tools fails: what it has there is not what was trained.
        Optuna is given the value of a diverged trial too, because its tools hide a curve without one; we never show it.
        """
        trial = _lock_trial(connection, claim.trial_id)
        if trial.is_ended:
            state, reason = "failed", ENDED_ELSEWHERE
        reason, error = storable_text(reason), error and storable_text(error)[-ERROR_CHARACTERS:]
        statements = [
            self._slot_end(is_held(claim), state, reason, error=error, failure_key=failure_key),
            self._attempt_end(claim, state, error),
        ]
        if trial.is_ended:
            execute_together(connection, *statements)
            return
        execute_together(connection, *statements, *_trial_end(connection, claim.trial_id, trial.last, state, reason))
        if failure_key is not None:
            self._stop_on_same_failures(connection, claim.study_id, failure_key, error or reason)

    def prune(self, connection: Connection, slot: sa.ColumnElement[bool], trial_id: int, reason: str) -> None:
        """End a slot that nobody holds and its trial, which has reported, as pruned."""
        trial = _lock_trial(connection, trial_id)
        if trial.is_ended:
            connection.execute(self._slot_end(slot, "failed", ENDED_ELSEWHERE))
        else:
            end = self._slot_end(slot, "pruned", reason)
            execute_together(connection, end, *_trial_end(connection, trial_id, trial.last, "pruned", reason))

    def _slot_end(
        self,
        slot: sa.ColumnElement[bool],
        state: str,
        reason: str,
        *,
        error: str | None = None,
        failure_key: str | None = None,
    ) -> sa.Update:
        assert state in ENDED
        end = {
            "state": state,
            "lease_until": None,
            "ended_at": self._database.clock,
            "reason": reason,
            "error": error,
            "failure_key": failure_key,
        }
        return slots_table.update().where(slot).values(end)

    def _attempt_end(self, claim: Claim, outcome: str, error: str | None) -> sa.Update:
        end = {"ended_at": self._database.clock, "outcome": outcome, "error": error}
        return attempts_table.update().where(is_attempt(claim)).values(**end)

    def _stop_on_same_failures(self, connection: Connection, study_id: int, failure_key: str, error: str) -> None:
        started = sa.select(studies_table.c.started_at).where(studies_table.c.study_id == study_id).scalar_subquery()
        num_same = connection.execute(
            sa.select(sa.func.count())
            .select_from(slots_table)
            .where(
                slots_table.c.study_id == study_id,
                slots_table.c.failure_key == failure_key,
                slots_table.c.ended_at >= started,
            )
        ).scalar_one()
        if num_same >= SAME_FAILURE_LIMIT:
            reason = f"{num_same} trials failed the same way\n{error}"
            connection.execute(
                studies_table.update()
                .where(studies_table.c.study_id == study_id)
                .values(stop="failure", stop_reason=reason)
            )


class _OptunaTrial(NamedTuple):
    is_ended: bool
    last: float | None  # the last value that was reported, if it is finite


def _lock_trial(connection: Connection, trial_id: int) -> _OptunaTrial:
    """Lock a trial of Optuna's, and return what its end depends on."""
    theirs = intermediate_values.c
    last = sa.select(theirs.intermediate_value).where(theirs.trial_id == optuna_trials.c.trial_id)
    last = last.order_by(theirs.step.desc()).limit(1)
    columns = (optuna_trials.c.state, last.scalar_subquery())
    query = sa.select(*columns).where(optuna_trials.c.trial_id == trial_id).with_for_update(of=optuna_trials)
    row = connection.execute(query).first()
    if row is None:
        raise KeyError(f"Optuna's tables have no trial with the id {trial_id}")
    return _OptunaTrial(row[0].is_finished(), row[1])


def _trial_end(
    connection: Connection, trial_id: int, last: float | None, state: str, reason: str
) -> list[sa.Update | sa.Insert]:
    """Return the statements that end Optuna's trial of a slot that ends, as its `set_trial_state_values` does."""
    is_valued = state != "failed" and last is not None
    assert is_valued or state != "complete"
    # To Optuna a diverged trial is a pruned one: samplers count it among the worst, and would not see a failed one.
    states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
    end = {"state": states.get(state, TrialState.PRUNED), "datetime_complete": utc_now()}
    ended = {"trial_id": trial_id, "key": "ended", "value_json": json.dumps(f"{state}: {reason}")}
    statements: list[sa.Update | sa.Insert] = [
        optuna_trials.update().where(optuna_trials.c.trial_id == trial_id).values(end),
        upsert(connection.dialect.name, trial_user_attributes, ended, ["trial_id", "key"]),
    ]
    if is_valued:
        kind = TrialValueModel.TrialValueType.FINITE
        value = {"trial_id": trial_id, "objective": 0, "value": last, "value_type": kind}
        statements.append(upsert(connection.dialect.name, trial_values, value, ["trial_id", "objective"]))
    return statements


def storable_text(text: str) -> str:
    """Return the text without what no database takes: NUL, and the half characters of undecodable file names."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
