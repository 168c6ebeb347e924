"""The ledger: the slots of a study from their claim to their end, each change in one transaction with Optuna's tables.

A slot is one trial of the study's budget; trial n of the Optuna study is slot n. It is claimed under a lease, reported
on and ended exactly once. An attempt that has lost its slot can change nothing: its `Claim` no longer matches.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import optuna
import sqlalchemy as sa
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import NopPruner
from optuna.storages import get_storage
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search import proposals, pruners
from hpo.search import samplers as search
from hpo.search.study_views import RoundStudy
from hpo.store.conditions import is_attempt, is_held, is_slot, on_same_device
from hpo.store.database import BufferedStorage, now, open_storage, parse_url
from hpo.store.retry import STORE_ERRORS, StoreFailed, plain, retry_on_outage
from hpo.store.schema import attempts, epochs, intermediate_values, slots, studies, trial_values, workers
from hpo.study.processes import Cause, Process
from hpo.study.records import ENDED, Claim, EpochReport, StudyRecord
from hpo.system import processes as liveness


def _lease_s() -> float:
    text = os.environ.get("HPO_LEASE_S") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86_400:
        raise UserError(f"HPO_LEASE_S must be a number of seconds between 1 and 86400, got {text!r}")
    return seconds


LEASE_S = _lease_s()  # a claim that is not renewed for this long may be taken by another worker
MAX_LOSSES = 3  # a trial whose worker crashed this often without an epoch in between is failed: it kills them
MAX_KILLS = 10  # the same for a worker that was killed from outside, which need not be the trial's doing
OUT_OF_MEMORY = "out of memory"  # the failure key of what ran out of it, wherever it did
SAME_FAILURE_LIMIT = 3  # this many trials failing the same way stop the study
ERROR_CHARACTERS = 20_000  # the end of a traceback that is kept

Verdict = Literal["go on", "prune", "stop"]


class ClaimLost(Exception):
    """The slot is no longer this attempt's: drop the trial, it is another worker's now."""


class Ledger:
    """The slots in a database. `create` makes the database where there is none; else its absence is a UserError.

    While the database does not answer, what a worker calls is tried again for `patience_s`, or until `give_up()`.

    Contract: every method may be called from any thread and any process; what a method has returned from is on disk.
    Methods that take a `Claim` raise `ClaimLost`, and change nothing, where the slot has been given to another attempt.
    """

    def __init__(
        self, url: str, *, create: bool = False, patience_s: float = 0.0, give_up: Callable[[], bool] = lambda: False
    ) -> None:
        self.patience_s = patience_s
        self.give_up = give_up
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # what it would say of a study, we say
        # What we use of it is pinned to one major version, and "experimental" means nothing to whoever runs a study.
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        self.url = parse_url(url)
        self._storage = open_storage(self.url, create=create)
        self._cached = get_storage(self._storage)  # finished trials are read from the database once

    @retry_on_outage
    def claim(self, study: StudyRecord, worker_id: str, *, beside: int = 0) -> Claim | None:
        """Takes a waiting slot, the first one, or None where no slot waits for this worker or the study is to stop.

        `beside` is how many trials the worker holds already. A trial that keeps killing workers is taken after those
        that do not, lest it keep the study from them, and never beside others, lest they pay for it. One that ran out
        of memory is taken last, and only by a worker that has its device to itself, which no other one then takes a
        trial on.
        """
        waiting = sa.select(slots).where(slots.c.study_id == study.study_id, slots.c.state == "waiting")
        with self._storage.engine.connect() as connection:  # idle workers ask often: no write lock for a no
            if connection.execute(waiting.limit(1)).first() is None:
                return None
        with self._transaction() as connection:
            # The lock on the study's row lets one worker claim at a time, so that slot n becomes Optuna's trial n.
            stop = sa.select(studies.c.stop).where(studies.c.study_id == study.study_id).with_for_update()
            if connection.execute(stop).scalar_one() is not None:
                return None
            at = now(connection)
            neighbours = [row for row in connection.execute(on_same_device(worker_id)) if not _is_lost(row, at)]
            if any(row.alone for row in neighbours):
                return None
            fits = slots.c.alone == 0
            kinds = [fits & (slots.c.losses < MAX_LOSSES), fits] + [slots.c.alone == 1] * (not neighbours)
            if beside:
                kinds = [fits & (slots.c.losses == 0)]
            # One after the other, not one ORDER BY, so that the index gives the first at once and nothing is sorted.
            queries = [waiting.where(kind).order_by(slots.c.number).limit(1) for kind in kinds]
            row = next((row for query in queries if (row := connection.execute(query).first())), None)
            if row is None:
                return None
            trial_id = row.trial_id
            if trial_id is None:
                trial_id = self._cached.create_new_trial(study.study_id, proposals.new_trial(study.spec, row))
            claim = Claim(
                study.study_id, row.number, row.attempt + 1, trial_id, worker_id, is_suspect=row.losses > 0,
                kind=row.kind, replicate=row.replicate, tested=row.tested,
            )  # fmt: skip
            connection.execute(
                slots.update()
                .where(is_slot(claim))
                .values(
                    state="running",
                    attempt=claim.attempt,
                    trial_id=trial_id,
                    worker_id=worker_id,
                    claimed_at=at,
                    lease_until=at + LEASE_S,
                )
            )
            connection.execute(
                attempts.insert().values(
                    study_id=claim.study_id, number=claim.number, attempt=claim.attempt, worker_id=worker_id,
                    began_at=at, furthest=row.furthest,
                )
            )  # fmt: skip
            return claim

    @retry_on_outage
    def begin(self, claim: Claim, *, resumed_from: int, notes: Sequence[str] = ()) -> None:
        """Records from which epoch's checkpoint an attempt goes on, 0 for none, and what was wrong with others."""
        with self._held(claim) as connection:
            connection.execute(attempts.update().where(is_attempt(claim)).values(went_on_from=resumed_from))
            self._note(connection, claim, notes)

    @retry_on_outage
    def note(self, claim: Claim, text: str) -> None:
        """Records what went wrong in an attempt without ending it."""
        with self._held(claim) as connection:
            self._note(connection, claim, [text])

    @retry_on_outage
    def suggest(
        self, claim: Claim, spec: StudySpec, *, attributes: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The trial's values, sampled now unless an earlier attempt did; records `attributes(values)` with them.

        The sampler thinks before the transaction, which others wait for, and writes in it. It does not hear of a trial
        that confirms what was found.
        """
        if claim.kind != "search":
            values = proposals.values_from_optuna(self._cached.get_trial(claim.trial_id).params)
            with self._held(claim):
                self._describe(claim, attributes(values))
            return values
        sampler = search.SAMPLERS[spec.search.sampler]
        draft = BufferedStorage(self._cached)
        study = sampler.study()(
            spec.name, cast(optuna.storages.BaseStorage, draft), search.build_sampler(spec, number=claim.number),
            NopPruner(),  # Optuna's Hyperband would show the sampler a study of its own, of one bracket's trials
        )  # fmt: skip
        study.get_trials(deepcopy=False)  # the cache refuses parameters of a trial that it has not seen
        trial = None if sampler.counts else optuna.Trial(study, claim.trial_id)
        with self._held(claim) as connection:
            if trial is None:  # it reads and writes an attribute of the study's in two steps
                connection.execute(
                    sa.select(studies.c.study_id).where(studies.c.study_id == claim.study_id).with_for_update()
                )
                trial = optuna.Trial(study, claim.trial_id)
            values = proposals.suggest(trial, spec)
            draft.write()
            self._describe(claim, attributes(values))
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
        """Records an epoch and says how the trial goes on, as `report_all` does of several."""
        (verdict,) = self.report_all([EpochReport(claim, epoch, metrics, value, may_prune)], spec)
        if verdict is None:
            raise ClaimLost(f"trial {claim.number}, attempt {claim.attempt}")
        return verdict

    @retry_on_outage
    def report_all(self, reports: Sequence[EpochReport], spec: StudySpec) -> list[Verdict | None]:
        """Records epochs of trials that were trained together, and says how each goes on; None: it was lost.

        A report replaces what an earlier attempt said of this epoch and of later ones. The pruner is asked once for
        each epoch, when all are recorded, and its word is kept: a kill between a report and what follows from it
        changes nothing.
        """
        verdicts: dict[Claim, Verdict] = {}
        with self._transaction() as connection:
            known = {}
            for report in sorted(reports, key=lambda report: report.claim.number):  # as `renew`, lest both wait
                if self._extend(connection, report.claim):
                    known[report.claim] = self._record(connection, report)
            stop = sa.select(studies.c.stop).where(studies.c.study_id == reports[0].claim.study_id)
            otherwise: Verdict = "go on" if connection.execute(stop).scalar_one() is None else "stop"
            judge: RoundStudy | None = None  # made where it is needed
            for report in reports:
                claim = report.claim
                if claim not in known:
                    continue
                furthest, pruned_at = known[claim]
                pruned = pruned_at == report.epoch
                if report.epoch > furthest:
                    if report.may_prune:
                        judge = judge or RoundStudy(spec.name, self._cached, pruner=pruners.build_pruner(spec))
                        pruned = judge.should_prune(claim.trial_id)
                    reached = {"furthest": report.epoch, "losses": 0, "pruned_at": report.epoch if pruned else None}
                    connection.execute(slots.update().where(is_slot(claim)).values(**reached))
                verdicts[claim] = "prune" if pruned and report.may_prune else otherwise
        return [verdicts.get(report.claim) for report in reports]

    @retry_on_outage
    def last_report(self, claim: Claim) -> tuple[int, float] | None:
        """The last epoch that this or an earlier attempt reported, and its value; None where none did."""
        trial = self._cached.get_trial(claim.trial_id)
        return None if trial.last_step is None else (trial.last_step, trial.intermediate_values[trial.last_step])

    @retry_on_outage
    def finish(
        self, claim: Claim, state: str, *, reason: str, error: str | None = None, failure_key: str | None = None
    ) -> None:
        """Ends the slot for good. Its value is its last report, and nothing where it failed.

        Optuna is given that of a diverged trial too (its tools hide a curve without a value); we never show it.
        `failure_key` is equal for two trials that failed the same way; three of them stop the study.
        """
        with self._held(claim) as connection:
            self._end(connection, claim, state, reason, error=error, failure_key=failure_key)

    @retry_on_outage
    def fail(
        self, claim: Claim, spec: StudySpec, *, reason: str, error: str, failure_key: str, beside: bool = False
    ) -> bool:
        """Ends an attempt by an exception; returns whether that was the trial's end too, or it waits for another try.

        `beside` others it counts for nobody, because nobody knows whose it was: the trial is a suspect, tried alone.

        A trial is tried again `search.retries` times, and one that ran out of memory once, alone on its device.
        """
        with self._held(claim) as connection:
            mine = is_slot(claim)
            ended = {"error": _storable(error)[-ERROR_CHARACTERS:]}
            if beside:
                connection.execute(slots.update().where(mine, slots.c.losses == 0).values(losses=1))
                self._free(connection, claim, f"beside others: {_storable(reason)}", **ended)
                return False
            row = connection.execute(sa.select(slots.c.failures, slots.c.alone).where(mine)).one()
            out_of_memory = failure_key == OUT_OF_MEMORY
            if row.alone if out_of_memory else row.failures >= spec.search.retries:
                key = None if claim.kind == "test" else failure_key  # the study has its answer all the same
                self._end(connection, claim, "failed", reason, error=error, failure_key=key)
                return True
            tried = {"alone": 1} if out_of_memory else {"failures": row.failures + 1}
            connection.execute(slots.update().where(mine).values(**tried))
            self._free(connection, claim, _storable(reason), **ended)
            return False

    @retry_on_outage
    def release(self, claim: Claim) -> None:
        """Gives the slot back unfinished, to be claimed again."""
        with self._held(claim) as connection:
            self._free(connection, claim, "released")

    def renew(self, claims: Sequence[Claim], worker_id: str) -> None:
        """Extends the leases of the claims that are still this worker's, and records that it lives."""
        with self._transaction() as connection:
            at = now(connection)
            connection.execute(workers.update().where(workers.c.worker_id == worker_id).values(seen_at=at))
            for claim in sorted(claims, key=lambda claim: claim.number):
                connection.execute(slots.update().where(is_held(claim)).values(lease_until=at + LEASE_S))

    @retry_on_outage
    def reap(self, study: StudyRecord, *, dead: Mapping[Process, Cause] = {}) -> int:
        """Frees the slots of workers that died or lost their lease; returns how many.

        A worker of this machine is looked up by its process; one elsewhere is given up when its lease has run out, or
        when its supervisor has seen it die: `dead` has those, with the cause. Where they have died by themselves, or of
        SIGKILL, as a kernel without memory sends it, that counts against the trials they had, until these come an epoch
        further. The end of a whole machine, or of everything at once, does not count.
        """

        def is_dead(row: Any) -> bool:
            return (row.machine, row.pid) in dead or is_gone(row)

        ours = (slots.c.study_id == study.study_id) & (slots.c.state == "running")
        columns = (workers.c.machine, workers.c.pid, workers.c.pid_started, workers.c.ended_at.label("left"))
        running = sa.select(slots, *columns).join(workers, workers.c.worker_id == slots.c.worker_id).where(ours)
        living = sa.select(workers).where(workers.c.study_id == study.study_id, workers.c.ended_at.is_(None))
        with self._storage.engine.connect() as connection:  # asked often: no write lock where there is nothing to do
            at = now(connection)
            any_lost = any(is_dead(row) or _is_lost(row, at) for row in connection.execute(running))
            if not any_lost and not any(is_dead(row) for row in connection.execute(living)):
                return 0
        with self._transaction() as connection:
            at = now(connection)
            # A slot that is locked is being reported on at this moment: its worker lives.
            rows = connection.execute(running.with_for_update(of=slots, skip_locked=True)).all()
            lost = [row for row in rows if is_dead(row) or _is_lost(row, at)]
            for row in lost:
                claim = Claim(row.study_id, row.number, row.attempt, row.trial_id, row.worker_id)
                cause = dead.get((row.machine, row.pid), "gone")
                losses = row.losses + (cause != "gone")
                connection.execute(slots.update().where(is_held(claim)).values(losses=losses))
                if losses >= {"crashed": MAX_LOSSES, "killed": MAX_KILLS, "gone": math.inf}[cause]:
                    reason = f"its worker died {losses} times"
                    self._end(connection, claim, "failed", reason, failure_key="its worker died")
                else:
                    self._free(connection, claim, "lost")
            for row in connection.execute(living).all():
                if is_dead(row):
                    connection.execute(workers.update().where(workers.c.worker_id == row.worker_id).values(ended_at=at))
            return len(lost)

    @retry_on_outage
    def best_trials(self, study: StudyRecord, count: int) -> list[tuple[int, float]]:
        """The complete trials of the search with the best values, at most `count`, in order: numbers and values."""
        value = trial_values.c.value
        order = value.desc() if study.spec.direction == "maximize" else value.asc()
        query = (
            sa.select(slots.c.number, value)
            .join(trial_values, trial_values.c.trial_id == slots.c.trial_id)
            .where(slots.c.study_id == study.study_id, slots.c.state == "complete", slots.c.kind == "search")
            .order_by(order, slots.c.number)
            .limit(count)
        )
        with self._storage.engine.connect() as connection:
            return [(number, found) for number, found in connection.execute(query)]

    @retry_on_outage
    def ended_numbers(self, study: StudyRecord) -> set[int]:
        """The numbers of the trials that have ended, in whatever way."""
        query = sa.select(slots.c.number).where(slots.c.study_id == study.study_id, slots.c.state.in_(ENDED))
        with self._storage.engine.connect() as connection:
            return set(connection.execute(query).scalars())

    @retry_on_outage
    def is_stopping(self, study_id: int) -> bool:
        with self._storage.engine.connect() as connection:
            query = sa.select(studies.c.stop).where(studies.c.study_id == study_id)
            return connection.execute(query).scalar_one() is not None

    # Inside a transaction

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._storage.transaction() as connection:
                yield connection
        except BaseException as error:
            self._cached = get_storage(self._storage)  # it may have cached what was rolled back
            if isinstance(error, STORE_ERRORS):
                raise StoreFailed(plain(error)) from error
            raise

    @contextmanager
    def _held(self, claim: Claim) -> Iterator[Connection]:
        """A transaction that the slot's holder alone can enter; extends the lease."""
        with self._transaction() as connection:
            if not self._extend(connection, claim):
                raise ClaimLost(f"trial {claim.number}, attempt {claim.attempt}")
            yield connection

    def _describe(self, claim: Claim, attributes: Mapping[str, Any]) -> None:
        for key, value in attributes.items():
            self._cached.set_trial_user_attr(claim.trial_id, key, value)

    def _extend(self, connection: Connection, claim: Claim) -> bool:
        """Extends the lease, where it is still the claim's, and locks the slot."""
        held = slots.update().where(is_held(claim)).values(lease_until=now(connection) + LEASE_S)
        return bool(connection.execute(held).rowcount == 1)

    def _record(self, connection: Connection, report: EpochReport) -> tuple[int, int | None]:
        """Writes an epoch to our tables and Optuna's; returns how far the slot had come, and where it was pruned."""
        claim, epoch = report.claim, report.epoch
        of_slot = sa.select(slots.c.furthest, slots.c.pruned_at).where(is_slot(claim))
        furthest, pruned_at = connection.execute(of_slot).one()
        self._replace_epoch(connection, claim, epoch, report.metrics)
        theirs = intermediate_values.c
        later = (theirs.trial_id == claim.trial_id) & (theirs.step > epoch)
        connection.execute(intermediate_values.delete().where(later))
        self._cached.set_trial_intermediate_value(claim.trial_id, epoch, report.value)
        return furthest, pruned_at

    def _replace_epoch(
        self, connection: Connection, claim: Claim, epoch: int, metrics: Mapping[str, float]
    ) -> None:  # fmt: skip
        same_or_later = (
            (epochs.c.study_id == claim.study_id) & (epochs.c.number == claim.number) & (epochs.c.epoch >= epoch)
        )
        connection.execute(epochs.delete().where(same_or_later))
        finite = {key: number if math.isfinite(number) else None for key, number in metrics.items()}
        connection.execute(
            epochs.insert().values(
                study_id=claim.study_id,
                number=claim.number,
                epoch=epoch,
                attempt=claim.attempt,
                metrics=json.dumps(finite),
            )
        )

    def _free(self, connection: Connection, claim: Claim, outcome: str, *, error: str | None = None) -> None:
        free = slots.update().where(is_held(claim)).values(state="waiting", worker_id=None, lease_until=None)
        connection.execute(free)
        self._end_attempt(connection, claim, outcome, error)

    def _end_attempt(self, connection: Connection, claim: Claim, outcome: str, error: str | None) -> None:
        end = {"ended_at": now(connection), "outcome": outcome, "error": error}
        connection.execute(attempts.update().where(is_attempt(claim)).values(**end))

    def _note(self, connection: Connection, claim: Claim, texts: Sequence[str]) -> None:
        before = connection.execute(sa.select(attempts.c.note).where(is_attempt(claim))).scalar()
        new = [text for text in map(_storable, texts) if text not in (before or "")]  # a full disk is full every epoch
        if new:
            note = "\n".join([*([before] if before else []), *new])
            connection.execute(attempts.update().where(is_attempt(claim)).values(note=note))

    def _end(
        self,
        connection: Connection,
        claim: Claim,
        state: str,
        reason: str,
        *,
        error: str | None = None,
        failure_key: str | None = None,
    ) -> None:
        assert state in ENDED
        reason, error = _storable(reason), error and _storable(error)[-ERROR_CHARACTERS:]
        end = {"state": state, "lease_until": None, "ended_at": now(connection), "reason": reason, "error": error}
        connection.execute(slots.update().where(is_held(claim)).values(**end, failure_key=failure_key))
        self._end_attempt(connection, claim, state, error)
        trial = self._cached.get_trial(claim.trial_id)
        last = math.nan if trial.last_step is None else trial.intermediate_values[trial.last_step]
        values = [last] if state != "failed" and math.isfinite(last) else None
        assert values or state != "complete"
        self._cached.set_trial_user_attr(claim.trial_id, "ended", f"{state}: {reason}")
        # To Optuna a diverged trial is a pruned one: samplers count it among the worst, and would not see a failed one.
        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        self._cached.set_trial_state_values(claim.trial_id, states.get(state, TrialState.PRUNED), values)
        if failure_key is not None:
            self._stop_on_same_failures(connection, claim.study_id, failure_key, error or reason)

    def _stop_on_same_failures(self, connection: Connection, study_id: int, failure_key: str, error: str) -> None:
        started = sa.select(studies.c.started_at).where(studies.c.study_id == study_id).scalar_subquery()
        same = connection.execute(
            sa.select(sa.func.count())
            .select_from(slots)
            .where(slots.c.study_id == study_id, slots.c.failure_key == failure_key, slots.c.ended_at >= started)
        ).scalar_one()
        if same >= SAME_FAILURE_LIMIT:
            reason = f"{same} trials failed the same way\n{error}"
            connection.execute(
                studies.update().where(studies.c.study_id == study_id).values(stop="failure", stop_reason=reason)
            )


def is_gone(worker: Any) -> bool:
    """Whether a row of hpo_workers is of a process of this machine that no longer runs; elsewhere a lease must tell."""
    here = worker.machine == liveness.machine_id()
    return here and not liveness.is_running(worker.pid, started=worker.pid_started)


def _is_lost(row: Any, at: float) -> bool:
    return row.lease_until < at or row.left is not None or is_gone(row)


def _storable(text: str) -> str:
    """The text without what no database takes: halves of characters, as undecodable file names have, and NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
