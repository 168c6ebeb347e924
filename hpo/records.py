"""What the store tells of studies, trials and workers, as plain frozen records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpo.spec import StudySpec


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
    started: float | None  # seconds since 1970
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
