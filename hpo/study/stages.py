"""What is due once all trials of a study have ended: its confirmation, then its test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from hpo.search.space import Scalar
from hpo.study.records import ENDED, StudyRecord

if TYPE_CHECKING:
    pass


class Slot(Protocol):
    """What of a trial tells how far its study has come."""

    @property
    def number(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def state(self) -> str: ...


AnySlot = TypeVar("AnySlot", bound=Slot)


@dataclass(frozen=True)
class Planned:
    """A trial that confirms, or that measures the test set with the network of another one, `tested`."""

    kind: str  # confirm | test
    params: Mapping[str, Scalar]
    replicate: int
    tested: int | None = None


def due(study: StudyRecord, slots: Sequence[Slot]) -> str | None:
    """What is to follow the trials that a study has, once they all have ended: "confirm", "test" or None, nothing."""
    if study.spec.confirm is None or any(slot.state not in ENDED for slot in slots):
        return None
    found = latest(slots)
    if not found:
        return "confirm" if any(slot.state == "complete" for slot in slots) else None
    complete = any(slot.state == "complete" for slot in found)
    return "test" if complete and study.metadata.get("has_test") and found[-1].kind == "confirm" else None


def num_due(study: StudyRecord, slots: Sequence[Slot]) -> int:
    """How many trials follow at most."""
    stage, spec = due(study, slots), study.spec.confirm
    return 0 if stage is None or spec is None else spec.seeds * (spec.top if stage == "confirm" else 1)


def latest(slots: Sequence[AnySlot]) -> list[AnySlot]:
    """The confirmation of all that was searched: those that follow the last trial of the search."""
    last = max((slot.number for slot in slots if slot.kind == "search"), default=-1)
    return sorted((slot for slot in slots if slot.number > last), key=lambda slot: slot.number)


def untested(study: StudyRecord, slots: Sequence[Slot]) -> set[int]:
    """The numbers of the trials whose networks the test set may yet be measured with."""
    found = latest(slots)
    tests = [slot for slot in found if slot.kind == "test"]
    is_over = bool(tests) and all(slot.state in ENDED for slot in tests)
    wanted = study.spec.confirm is not None and study.metadata.get("has_test") and not is_over
    return {slot.number for slot in found if slot.kind == "confirm"} if wanted else set()
