"""The study in its database: the ledger of slots with leases, and the Optuna study that every Optuna tool can read.

A slot is one trial of the study's budget. It is claimed, reported on and ended in single transactions that change the
ledger and Optuna's tables together. Trial n of the Optuna study is slot n.

Contract: every method may be called from any thread and any process; what a method has returned from is on disk.
Methods that take a `Claim` raise `ClaimLost`, and change nothing, where the slot has been given to another attempt.
"""

from __future__ import annotations

import json
import math
import os
import socket
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.exceptions import ExperimentalWarning
from optuna.storages import get_storage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import Connection

from hpo import liveness, search
from hpo.database import (
    database_path,
    epochs,
    intermediate_values,
    now,
    open_storage,
    parse_url,
    slots,
    studies,
    workers,
)
from hpo.errors import UserError
from hpo.learning import LearningStudy
from hpo.records import Claim, Study, Trial, WorkerRow, read_trial
from hpo.spec import StudySpec

LEASE_S = 60.0  # a claim that is not renewed for this long may be taken by another worker
MAX_LOSSES = 3  # a slot whose worker died this often without coming further is failed: its trial kills them
SAME_FAILURE_LIMIT = 3  # this many trials failing the same way stop the study
ERROR_CHARACTERS = 20_000  # the end of a traceback that is kept

STORE_ERRORS = (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

_UNCLAIMED = {"state": "waiting", "attempt": 0, "furthest": 0, "losses": 0}
ENDED = ("complete", "pruned", "diverged", "failed")


class ClaimLost(Exception):
    """The slot is no longer this attempt's: drop the trial, it is another worker's now."""


class Store:
    """A database of studies. `create` makes the database where there is none; else its absence is a UserError."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # what it would say of a study, we say
        # What we use of it is pinned to one major version, and "experimental" means nothing to whoever runs a study.
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        self.url = parse_url(url)
        self._storage = open_storage(self.url, create=create)
        self._cached = get_storage(self._storage)  # finished trials are read from the database once

    @property
    def folder(self) -> Path:
        """Where logs and a trial's own files go: beside the database."""
        return database_path(self.url).parent / "hpo_files"

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        """The Optuna storage, for Optuna's own tools."""
        return self._storage

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._storage.transaction() as connection:
                yield connection
        except BaseException:
            self._cached = get_storage(self._storage)  # it may have cached what was rolled back
            raise

    # Studies

    def create_study(self, spec: StudySpec, *, facts: Mapping[str, Any]) -> Study:
        """Creates the study with its slots, or joins the one of that name.

        Raises UserError where the spec differs from the study's in anything that would change a result.
        """
        with self._transaction() as connection:
            study_id = self._find_id(connection, spec.name)
            frozen = json.dumps(spec.frozen())
            if study_id is None:
                study_id = self._insert_study(connection, spec, frozen, json.dumps(dict(facts)))
            else:
                study = self._load(connection, study_id, spec.name)
                if differences := study.spec.differences(spec):
                    raise UserError(
                        f"study {spec.name!r} exists in {self.url} with other settings; give this one another name, "
                        "or undo: " + "; ".join(differences)
                    )
                connection.execute(studies.update().where(studies.c.study_id == study_id).values(spec=frozen))
            return self._load(connection, study_id, spec.name)

    def _insert_study(self, connection: Connection, spec: StudySpec, frozen: str, facts: str) -> int:
        direction = StudyDirection.MAXIMIZE if spec.direction == "maximize" else StudyDirection.MINIMIZE
        try:
            study_id = self._storage.create_new_study([direction], spec.name)
        except optuna.exceptions.DuplicatedStudyError:
            raise UserError(
                f"{self.url} holds a study {spec.name!r} that hpo did not make; choose another name"
            ) from None
        optuna.load_study(study_name=spec.name, storage=self._storage).set_metric_names([spec.metric])
        created = now(connection)
        connection.execute(
            studies.insert().values(study_id=study_id, spec=frozen, facts=facts, created_at=created, started_at=created)
        )
        given = [json.dumps(search.optuna_params(spec, values)) for values in search.slots(spec)]
        self._insert_slots(connection, study_id, range(len(given)), given)
        return study_id

    def _insert_slots(self, connection: Connection, study_id: int, numbers: range, given: Sequence[str]) -> None:
        rows = [
            {"study_id": study_id, "number": number, "given": values, **_UNCLAIMED}
            for number, values in zip(numbers, given, strict=True)
        ]
        if rows:
            connection.execute(slots.insert(), rows)

    def study(self, name: str) -> Study:
        """The study of this name. Raises UserError, listing those that exist, where there is none."""
        with self._storage.engine.connect() as connection:
            study_id = self._find_id(connection, name)
            if study_id is None:
                names = ", ".join(sorted(self._names(connection).values())) or "none"
                raise UserError(f"there is no study {name!r} in {self.url}; there are: {names}")
            return self._load(connection, study_id, name)

    def studies(self) -> list[Study]:
        with self._storage.engine.connect() as connection:
            return [self._load(connection, study_id, name) for study_id, name in self._names(connection).items()]

    def enlarge(self, study: Study, trials: int) -> None:
        """Gives the study a budget of `trials`; what was trained stays. Raises UserError for a grid or for fewer."""
        if study.spec.search.sampler == "grid":
            raise UserError(f"--trials cannot enlarge a grid; study {study.name!r} has {study.spec.num_trials} points")
        with self._transaction() as connection:
            count = connection.execute(
                sa.select(sa.func.count()).select_from(slots).where(slots.c.study_id == study.study_id)
            ).scalar_one()
            if trials < count:
                raise UserError(f"--trials must be at least {count}, which study {study.name!r} has, got {trials}")
            self._insert_slots(connection, study.study_id, range(count, trials), ["{}"] * (trials - count))
            frozen = study.spec.frozen()
            frozen["search"]["trials"] = trials
            connection.execute(
                studies.update().where(studies.c.study_id == study.study_id).values(spec=json.dumps(frozen))
            )

    def request_stop(self, study: Study) -> None:
        """Every worker lets go of its trial at its next report and leaves."""
        with self._transaction() as connection:
            connection.execute(
                studies.update()
                .where(studies.c.study_id == study.study_id, studies.c.stop.is_(None))
                .values(stop="requested", stop_reason="hpo stop")
            )

    def start(self, study: Study) -> None:
        """Takes back a stop, whatever its reason; failures are counted from now on."""
        with self._transaction() as connection:
            connection.execute(
                studies.update()
                .where(studies.c.study_id == study.study_id)
                .values(stop=None, stop_reason=None, started_at=now(connection))
            )

    def _names(self, connection: Connection) -> dict[int, str]:
        ours = set(connection.execute(sa.select(studies.c.study_id)).scalars())
        return {s._study_id: s.study_name for s in self._storage.get_all_studies() if s._study_id in ours}

    def _find_id(self, connection: Connection, name: str) -> int | None:
        return next((study_id for study_id, other in self._names(connection).items() if other == name), None)

    def _load(self, connection: Connection, study_id: int, name: str) -> Study:
        row = connection.execute(sa.select(studies).where(studies.c.study_id == study_id)).one()
        spec = StudySpec.from_dict(json.loads(row.spec), source=f"study {name!r} in {self.url}")
        return Study(study_id, name, spec, json.loads(row.facts), row.stop, row.stop_reason)

    # Workers

    def add_worker(self, study_id: int, *, device: str) -> str:
        """Registers the calling process as a worker and returns its id."""
        worker_id = uuid.uuid4().hex[:12]
        with self._transaction() as connection:
            at = now(connection)
            connection.execute(
                workers.insert().values(
                    worker_id=worker_id,
                    study_id=study_id,
                    host=socket.gethostname(),
                    machine=liveness.machine(),
                    pid=os.getpid(),
                    pid_started=liveness.process_started(),
                    device=device,
                    started_at=at,
                    seen_at=at,
                )
            )
        return worker_id

    def remove_worker(self, worker_id: str) -> None:
        with self._transaction() as connection:
            connection.execute(
                workers.update().where(workers.c.worker_id == worker_id).values(ended_at=now(connection))
            )

    def workers(self, study: Study) -> list[WorkerRow]:
        """The workers that have not left, with how long ago each gave a sign of life."""
        with self._storage.engine.connect() as connection:
            at = now(connection)
            rows = connection.execute(
                sa.select(workers).where(workers.c.study_id == study.study_id, workers.c.ended_at.is_(None))
            )
            return [
                WorkerRow(
                    row.worker_id, row.host, row.pid, row.device, at - row.seen_at,
                    alive=not _gone(row) and at - row.seen_at < LEASE_S,
                )
                for row in rows.all()
            ]  # fmt: skip

    # Slots

    def claim(self, study: Study, worker_id: str) -> Claim | None:
        """Takes the first waiting slot, or None where no slot waits or the study is to stop."""
        with self._transaction() as connection:
            stop = sa.select(studies.c.stop).where(studies.c.study_id == study.study_id).with_for_update()
            if connection.execute(stop).scalar_one() is not None:
                return None
            row = connection.execute(
                sa.select(slots)
                .where(slots.c.study_id == study.study_id, slots.c.state == "waiting")
                .order_by(slots.c.number)
                .limit(1)
            ).first()
            if row is None:
                return None
            trial_id = row.trial_id
            if trial_id is None:
                trial_id = self._cached.create_new_trial(
                    study.study_id,
                    create_trial(state=TrialState.RUNNING, system_attrs={"fixed_params": json.loads(row.given)}),
                )
            connection.execute(
                slots.update()
                .where(slots.c.study_id == study.study_id, slots.c.number == row.number)
                .values(
                    state="running",
                    attempt=row.attempt + 1,
                    trial_id=trial_id,
                    worker_id=worker_id,
                    lease_until=now(connection) + LEASE_S,
                )
            )
            return Claim(study.study_id, row.number, row.attempt + 1, trial_id, worker_id)

    def suggest(self, claim: Claim, spec: StudySpec, *, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The trial's values, sampled now unless an earlier attempt did, and its attributes recorded."""
        sampler = search.SAMPLERS[spec.search.sampler]
        study = self._optuna_study(spec, number=claim.number, learning=sampler.needs_values)
        study.get_trials(deepcopy=False)  # the cache refuses parameters of a trial that it has not seen
        trial = optuna.Trial(study, claim.trial_id)
        if not sampler.atomic:
            _ = trial.relative_params  # what takes long is done before the other writers have to wait
        with self._held(claim):
            values = search.suggest(trial, spec)
            for key, value in attributes.items():
                self._cached.set_trial_user_attr(claim.trial_id, key, value)
        return values

    def report(self, claim: Claim, *, epoch: int, metrics: Mapping[str, float], value: float) -> None:
        """Records an epoch; it replaces what an earlier attempt said of this epoch and of later ones."""
        with self._held(claim) as connection:
            mine = (epochs.c.study_id == claim.study_id) & (epochs.c.number == claim.number)
            connection.execute(epochs.delete().where(mine, epochs.c.epoch >= epoch))
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
            connection.execute(
                slots.update().where(_is_held(claim), slots.c.furthest < epoch).values(furthest=epoch, losses=0)
            )
            theirs = intermediate_values.c
            later = (theirs.trial_id == claim.trial_id) & (theirs.step > epoch)
            connection.execute(intermediate_values.delete().where(later))
            self._cached.set_trial_intermediate_value(claim.trial_id, epoch, value)

    def last_report(self, claim: Claim) -> tuple[int, float] | None:
        """The last epoch that this or an earlier attempt reported, and its value; None where none did."""
        trial = self._cached.get_trial(claim.trial_id)
        return None if trial.last_step is None else (trial.last_step, trial.intermediate_values[trial.last_step])

    def should_prune(self, claim: Claim, spec: StudySpec, *, epoch: int) -> bool:
        """What the study's pruner says of the trial after this epoch."""
        return optuna.Trial(self._optuna_study(spec, number=claim.number), claim.trial_id).should_prune()

    def finish(
        self, claim: Claim, state: str, *, reason: str, error: str | None = None, failure_key: str | None = None
    ) -> None:
        """Ends the slot for good. Its value is its last report, and nothing where it failed.

        Optuna is given that of a diverged trial too (its tools hide a curve without a value); we never show it.
        """
        assert state in ENDED
        with self._held(claim) as connection:
            _, last = self.last_report(claim) or (0, math.nan)
            values = [last] if state != "failed" and math.isfinite(last) else None
            assert values or state != "complete"
            self._end(
                connection, claim.study_id, claim.number, claim.trial_id, state, values, reason, error, failure_key
            )
            if failure_key is not None:
                self._stop_on_same_failures(connection, claim.study_id, failure_key, error)

    def release(self, claim: Claim) -> None:
        """Gives the slot back unfinished, to be claimed again."""
        with self._held(claim) as connection:
            self._free(connection, claim.study_id, claim.number)

    def renew(self, claims: Sequence[Claim], worker_id: str) -> None:
        """Extends the leases of the claims that are still this worker's, and records that it lives."""
        with self._transaction() as connection:
            at = now(connection)
            connection.execute(workers.update().where(workers.c.worker_id == worker_id).values(seen_at=at))
            for claim in claims:
                connection.execute(slots.update().where(_is_held(claim)).values(lease_until=at + LEASE_S))

    def is_stopping(self, study_id: int) -> bool:
        with self._storage.engine.connect() as connection:
            query = sa.select(studies.c.stop).where(studies.c.study_id == study_id)
            return connection.execute(query).scalar_one() is not None

    def reap(self, study: Study) -> int:
        """Frees the slots of workers that died or lost their lease; returns how many.

        A worker of this machine is looked up by its process; one elsewhere is given up when its lease has run out.
        """
        with self._transaction() as connection:
            at = now(connection)
            rows = connection.execute(
                sa.select(slots.c.number, slots.c.trial_id, slots.c.losses, slots.c.lease_until, workers)
                .join(workers, workers.c.worker_id == slots.c.worker_id)
                .where(slots.c.study_id == study.study_id, slots.c.state == "running")
            ).all()
            lost = [row for row in rows if row.lease_until < at or _gone(row)]
            for row in lost:
                where = (slots.c.study_id == study.study_id) & (slots.c.number == row.number)
                connection.execute(slots.update().where(where).values(losses=row.losses + 1))
                if row.losses + 1 >= MAX_LOSSES:
                    reason = f"its worker died {MAX_LOSSES} times"
                    self._end(connection, study.study_id, row.number, row.trial_id, "failed", None, reason, None, None)
                else:
                    self._free(connection, study.study_id, row.number)
            living = sa.select(workers).where(workers.c.study_id == study.study_id, workers.c.ended_at.is_(None))
            for row in connection.execute(living).all():
                if _gone(row):
                    connection.execute(workers.update().where(workers.c.worker_id == row.worker_id).values(ended_at=at))
            return len(lost)

    def counts(self, study_id: int) -> dict[str, int]:
        """How many slots are in each state; states that no slot is in are left out."""
        with self._storage.engine.connect() as connection:
            query = (
                sa.select(slots.c.state, sa.func.count().label("num"))
                .where(slots.c.study_id == study_id)
                .group_by(slots.c.state)
            )
            return {row.state: row.num for row in connection.execute(query)}

    def trials(self, study: Study) -> list[Trial]:
        """Every slot of the study with what is known of it, in order."""
        with self._storage.engine.connect() as connection:
            rows = connection.execute(
                sa.select(slots).where(slots.c.study_id == study.study_id).order_by(slots.c.number)
            ).all()
            reports: dict[int, list[tuple[int, dict[str, float | None]]]] = {}
            for row in connection.execute(
                sa.select(epochs).where(epochs.c.study_id == study.study_id).order_by(epochs.c.number, epochs.c.epoch)
            ):
                reports.setdefault(row.number, []).append((row.epoch, json.loads(row.metrics)))
        frozen = {trial._trial_id: trial for trial in self._cached.get_all_trials(study.study_id, deepcopy=False)}
        return [read_trial(row, frozen.get(row.trial_id), reports.get(row.number, [])) for row in rows]

    # Inside a transaction

    @contextmanager
    def _held(self, claim: Claim) -> Iterator[Connection]:
        """A transaction that the slot's holder alone can enter; extends the lease."""
        with self._transaction() as connection:
            held = slots.update().where(_is_held(claim)).values(lease_until=now(connection) + LEASE_S)
            if connection.execute(held).rowcount != 1:
                raise ClaimLost(f"trial {claim.number}, attempt {claim.attempt}")
            yield connection

    def _free(self, connection: Connection, study_id: int, number: int) -> None:
        connection.execute(
            slots.update()
            .where(slots.c.study_id == study_id, slots.c.number == number)
            .values(state="waiting", worker_id=None, lease_until=None)
        )

    def _end(
        self,
        connection: Connection,
        study_id: int,
        number: int,
        trial_id: int,
        state: str,
        values: list[float] | None,
        reason: str,
        error: str | None,
        failure_key: str | None,
    ) -> None:
        reason = _storable(reason)
        connection.execute(
            slots.update()
            .where(slots.c.study_id == study_id, slots.c.number == number)
            .values(
                state=state,
                lease_until=None,
                ended_at=now(connection),
                reason=reason,
                error=error and _storable(error)[-ERROR_CHARACTERS:],
                failure_key=failure_key,
            )
        )
        self._cached.set_trial_user_attr(trial_id, "ended", f"{state}: {reason}")
        # To Optuna a diverged trial is a pruned one: samplers count it among the worst, and would not see a failed one.
        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        self._cached.set_trial_state_values(trial_id, states.get(state, TrialState.PRUNED), values)

    def _stop_on_same_failures(
        self, connection: Connection, study_id: int, failure_key: str, error: str | None
    ) -> None:
        started = sa.select(studies.c.started_at).where(studies.c.study_id == study_id).scalar_subquery()
        same = connection.execute(
            sa.select(sa.func.count())
            .select_from(slots)
            .where(slots.c.study_id == study_id, slots.c.failure_key == failure_key, slots.c.ended_at >= started)
        ).scalar_one()
        if same >= SAME_FAILURE_LIMIT:
            reason = f"{same} trials failed the same way\n{_storable(error or '')}"
            connection.execute(
                studies.update().where(studies.c.study_id == study_id).values(stop="failure", stop_reason=reason)
            )

    def _optuna_study(self, spec: StudySpec, *, number: int, learning: bool = False) -> optuna.Study:
        # A new Study for each use: it caches the list of trials until `Study.ask`, which we never call.
        sampler = search.build_sampler(spec, number=number)
        if learning:
            return LearningStudy(spec.name, self._cached, sampler=sampler)
        return optuna.Study(spec.name, self._cached, sampler=sampler, pruner=search.build_pruner(spec))


def _is_held(claim: Claim) -> sa.ColumnElement[bool]:
    return sa.and_(
        slots.c.study_id == claim.study_id,
        slots.c.number == claim.number,
        slots.c.attempt == claim.attempt,
        slots.c.worker_id == claim.worker_id,
        slots.c.state == "running",
    )


def _gone(worker: Any) -> bool:
    """Whether a row of hpo_workers is known to be of a process that no longer runs; elsewhere only a lease can tell."""
    here = worker.machine == liveness.machine()
    return worker.ended_at is not None or (here and not liveness.is_running(worker.pid, started=worker.pid_started))


def _storable(text: str) -> str:
    """The text without what no database takes: halves of characters, as undecodable file names have, and NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
