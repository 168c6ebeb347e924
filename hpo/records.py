"""What the store tells of studies, trials and workers, as plain frozen records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpo.search import values_from_optuna
from hpo.spec import StudySpec

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Study:
    """A study as it stands in the store."""

    study_id: int
    name: str
    spec: StudySpec
    facts: Mapping[str, Any]  # what the preflight found: num_train, num_val, num_classes, num_parameters...
    stop: str | None  # None | "requested" | "failure"
    stop_reason: str | None


@dataclass(frozen=True)
class Claim:
    """One attempt at one slot, held under a lease by one worker."""

    study_id: int
    number: int
    attempt: int
    trial_id: int
    worker_id: str


@dataclass(frozen=True)
class Trial:
    """One slot as people see it. `curves[metric]` has one entry for each of `epochs`; None is a number not finite."""

    number: int
    state: str
    params: Mapping[str, Any]
    value: float | None
    attempt: int
    reason: str | None
    error: str | None
    worker_id: str | None
    attributes: Mapping[str, Any]  # seed, device, host, pid, versions...
    started: float | None  # of the latest attempt, seconds since 1970 by the database's clock
    ended: float | None
    epochs: Sequence[int] = ()
    curves: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerRow:
    worker_id: str
    host: str
    pid: int
    device: str
    seen_s: float  # seconds since the last sign of life
    alive: bool


def read_trial(row: Any, frozen: FrozenTrial | None, reports: list[tuple[int, dict[str, float | None]]]) -> Trial:
    """A trial from its row of hpo_slots, its Optuna trial once it has one, and its (epoch, metrics) in order."""
    names = list(dict.fromkeys(name for _, metrics in reports for name in metrics))
    given = json.loads(row.given)
    value = frozen.value if frozen is not None and row.state in ("complete", "pruned") else None
    return Trial(
        number=row.number,
        state=row.state,
        params=values_from_optuna(frozen.params if frozen is not None else given),
        value=value,
        attempt=row.attempt,
        reason=row.reason,
        error=row.error,
        worker_id=row.worker_id,
        attributes=frozen.user_attrs if frozen is not None else {},
        started=row.claimed_at,
        ended=row.ended_at,
        epochs=[epoch for epoch, _ in reports],
        curves={name: [metrics.get(name) for _, metrics in reports] for name in names},
    )
