"""Plain frozen records of what the store holds: studies, trials, attempts, reports and workers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hpo.config.study_spec import StudySpec
from hpo.search.proposals import values_from_optuna

STATES = ("waiting", "running", "complete", "pruned", "diverged", "failed")
KINDS = ("search", "confirm", "test")
SEARCH_END = "search_end"  # the metadata with the reason of `StudyRecord.search_end`
CODE = "code"  # the metadata with digests of users' own code, by file
WIDENED = "widened"  # the metadata with `StudyRecord.widenings`
ENDED = ("complete", "pruned", "diverged", "failed")  # the states that a trial does not leave


@dataclass(frozen=True)
class StudyRecord:
    """A study as it stands in the store."""

    study_id: int
    name: str
    spec: StudySpec
    metadata: Mapping[str, Any]  # what the preflight found: num_train, num_val, num_classes, num_parameters...
    stop: str | None  # None | "requested" | "failure"
    stop_reason: str | None
    started: float  # by the latest `hpo run` or `hpo resume`, as times in `TrialRecord`

    @property
    def origin(self) -> str:
        """The uid of the study that it is a copy of, or else its own; it names the checkpoints, which a copy shares."""
        return str(self.metadata.get("origin", self.metadata["uid"]))

    @property
    def search_end(self) -> str | None:
        """Why the search ended before it had had all of its trials, in words; None where it did not."""
        return self.metadata.get(SEARCH_END)

    @property
    def widenings(self) -> Sequence[Mapping[str, Any]]:
        """How ranges were widened, in order: the ranges `before` and `after` by their keys, and whether they `grew`."""
        widened: Sequence[Mapping[str, Any]] = self.metadata.get(WIDENED, [])
        return widened

    @property
    def num_growths(self) -> int:
        """How often the range of learning rates grew by itself."""
        return sum(bool(one["grew"]) for one in self.widenings)

    @property
    def grain(self) -> float:
        """The smallest difference of two values, if it is known: an accuracy differs by one validation image."""
        num_val = self.metadata.get("num_val")
        return 1 / num_val if num_val and self.spec.metric in ("val_accuracy", "top5") else 0.0

    @property
    def key(self) -> str:
        """Its name and its uid, which no other study of that name has: it names the study's folders."""
        return f"{self.name}-{self.metadata['uid']}"


@dataclass(frozen=True)
class Claim:
    """One attempt at one slot, held under a lease by one worker."""

    study_id: int
    number: int
    attempt: int
    trial_id: int
    worker_id: str
    is_suspect: bool = field(default=False, compare=False)  # workers died of it or alongside it: it trains alone
    kind: str = field(default="search", compare=False)  # as in `TrialRecord`, with the two below
    replicate: int | None = field(default=None, compare=False)
    tested: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class EpochReport:
    """The report of an epoch of a trial; `value` is that of the metric which the search optimizes."""

    claim: Claim
    epoch: int  # counted from 1
    metrics: Mapping[str, float]
    value: float
    may_prune: bool = True


@dataclass(frozen=True)
class Attempt:
    """One attempt at training a trial, from its claim to its end, whatever ended it.

    Attributes:
        attempt: Its number; 1 is the first.
        worker_id: The worker.
        host: The machine of the worker.
        device: The device of the worker.
        began: When it began, in seconds since 1970 by the clock of the database.
        ended: When it ended; None while it trains.
        last_epoch: The last epoch that earlier attempts had reported.
        resumed_from: The epoch of the checkpoint that it resumed from; 0: it started anew; None: not known (yet).
        outcome: A final state of the trial, "released", "lost", or an exception in a line; None while it trains.
        error: The traceback of an exception.
        note: Problems that did not end it, a line each.
    """

    attempt: int
    worker_id: str
    host: str | None
    device: str | None
    began: float
    ended: float | None
    last_epoch: int
    resumed_from: int | None
    outcome: str | None
    error: str | None
    note: str | None


class RecordedTrial(NamedTuple):
    """A trial as Optuna's tables have it: the value of its last epoch, its parameters and user attributes."""

    value: float | None
    params: Mapping[str, Any]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class TrialRecord:
    """One trial as people see it.

    Attributes:
        number: Its number in the study, from 0.
        state: waiting, running, complete, pruned, diverged or failed.
        params: Its values, by the keys of the search space.
        value: The value of the metric after the last epoch.
        attempt: The number of the latest attempt.
        reason: Why it ended, in words.
        error: The end of the traceback of a failed trial.
        worker_id: The worker of the latest attempt.
        attributes: What was recorded of it: seed, device, host, pid, versions...
        started: When the latest attempt began, in seconds since 1970 by the clock of the database.
        ended: When it ended.
        epochs: The epochs that it has reported.
        curves: Each reported metric by its name, with one entry for each of `epochs`; None is a number not finite.
        attempts: All attempts at it.
        kind: "search"; "confirm": trained again on a fresh seed; "test": one of those, with the test set.
        replicate: Which seed of a confirmation, from 0.
        tested: Of a test: the number of the trial whose network it measures.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    value: float | None
    attempt: int
    reason: str | None
    error: str | None
    worker_id: str | None
    attributes: Mapping[str, Any]
    started: float | None
    ended: float | None
    epochs: Sequence[int] = ()
    curves: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    attempts: Sequence[Attempt] = ()
    kind: str = "search"
    replicate: int | None = None
    tested: int | None = None

    def __repr__(self) -> str:
        values = "".join(f", {key}={value!r}" for key, value in self.params.items())
        value = "" if self.value is None else f", value {self.value:.4g}"
        return f"TrialRecord({self.number}, {self.kind} {self.state}{values}{value}, epoch {len(self.epochs)})"

    @property
    def duration_s(self) -> float | None:
        """How long the latest attempt took, once the trial has ended: a loser of a race waits for its end untrained."""
        if not self.started or not self.ended:
            return None
        left = self.attempts[-1].ended if self.attempts else None
        return (left or self.ended) - self.started


@dataclass(frozen=True)
class WorkerRecord:
    """A worker process that has not left."""

    worker_id: str
    host: str
    pid: int
    device: str
    seen_s: float  # seconds since the last sign of life
    alive: bool


@dataclass(frozen=True)
class DeviceFailures:
    """The failures of a device of one machine since the study was started."""

    machine: str  # as hpo.system.processes names it
    host: str
    device: str
    count: int
    reason: str  # of the latest one

    def __str__(self) -> str:
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"{self.device} of {self.host} failed {times}: {self.reason}"


def read_attempt(row: Any, worker: Any | None) -> Attempt:
    """Return an attempt from its row of hpo_attempts and, where there is one, the row of its worker."""
    return Attempt(
        attempt=row.attempt,
        worker_id=row.worker_id,
        host=None if worker is None else worker.host,
        device=None if worker is None else worker.device,
        began=row.began_at,
        ended=row.ended_at,
        last_epoch=row.last_epoch,
        resumed_from=row.resumed_from,
        outcome=row.outcome,
        error=row.error,
        note=row.note,
    )


def read_trial(
    row: Any,
    recorded: RecordedTrial | None,
    reports: list[tuple[int, dict[str, float | None]]],
    attempts: Sequence[Attempt],
) -> TrialRecord:
    """Return a trial from its row of hpo_slots, its trial of Optuna's if any, its (epoch, metrics) and attempts."""
    names = list(dict.fromkeys(name for _, metrics in reports for name in metrics))
    known = recorded or RecordedTrial(None, json.loads(row.given), {})
    return TrialRecord(
        number=row.number,
        state=row.state,
        params=values_from_optuna(known.params),
        value=known.value if row.state in ("complete", "pruned") else None,
        attempt=row.attempt,
        reason=row.reason,
        error=row.error,
        worker_id=row.worker_id,
        attributes=known.attributes,
        started=row.claimed_at,
        ended=row.ended_at,
        epochs=[epoch for epoch, _ in reports],
        curves={name: [metrics.get(name) for _, metrics in reports] for name in names},
        attempts=attempts,
        kind=row.kind,
        replicate=row.replicate,
        tested=row.tested,
    )


def trial_as_dict(trial: TrialRecord) -> dict[str, Any]:
    """Return a trial as plain data: what `hpo trials --json` prints.

    `curves` has all that the trial reported, whatever its name. The curves are also keys of the trial itself, as far as
    it has no key of its own by their names, and `train_loss` and `val_accuracy` always are.
    """
    curves = {name: list(values) for name, values in trial.curves.items()}
    return {
        "train_loss": [],
        "val_accuracy": [],
        **curves,
        **{key: value for key, value in trial.attributes.items() if key != "ended"},
        "number": trial.number,
        "kind": trial.kind,
        "state": trial.state,
        "params": dict(trial.params),
        "value": trial.value,
        "attempt": trial.attempt,
        "epochs": list(trial.epochs),
        "curves": curves,
        "reason": trial.reason,
        "error": trial.error,
        "attempts": [_attempt_as_dict(attempt) for attempt in trial.attempts],
        "duration_s": None if trial.duration_s is None else round(trial.duration_s, 3),
    }


def _attempt_as_dict(attempt: Attempt) -> dict[str, Any]:
    """As `hpo trials --json` names its keys."""
    json_keys = {"last_epoch": "furthest", "resumed_from": "went_on_from"}
    return {json_keys.get(key, key): value for key, value in asdict(attempt).items()}
