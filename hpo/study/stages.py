"""What is due once all trials of a study have ended: the confirmation of the best, then the test of the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hpo.search.space import Scalar
from hpo.study.records import ENDED, StudyRecord


class Slot(Protocol):
    """What this module needs to know of a trial."""

    @property
    def number(self) -> int:
        """From 0, in the order of the study."""

    @property
    def kind(self) -> str:
        """`search`, `confirm` or `test`."""

    @property
    def state(self) -> str:
        """`waiting`, `running`, or one of ENDED."""


AnySlot = TypeVar("AnySlot", bound=Slot)


@dataclass(frozen=True)
class Planned:
    """A trial that confirms, or that measures the test set with the network of another one, `tested`."""

    kind: str  # confirm | test
    params: Mapping[str, Scalar]
    replicate: int
    tested: int | None = None


def due(study: StudyRecord, slots: Sequence[Slot]) -> str | None:
    """Return what follows a study's trials once all have ended: "confirm", "test", or None for nothing."""
    if study.spec.confirm is None or any(slot.state not in ENDED for slot in slots):
        return None
    found = latest(slots)
    if not found:
        return "confirm" if any(slot.state == "complete" for slot in slots) else None
    complete = any(slot.state == "complete" for slot in found)
    return "test" if complete and study.metadata.get("has_test") and found[-1].kind == "confirm" else None


def num_due(study: StudyRecord, slots: Sequence[Slot]) -> int:
    """Return how many trials follow at most."""
    stage, spec = due(study, slots), study.spec.confirm
    return 0 if stage is None or spec is None else spec.seeds * (spec.top if stage == "confirm" else 1)


def num_left(study: StudyRecord, slots: Sequence[Slot]) -> int:
    """Return how many of these trials have yet to end or, once all have, how many follow at most."""
    return sum(slot.state not in ENDED for slot in slots) or num_due(study, slots)


def latest(slots: Sequence[AnySlot]) -> list[AnySlot]:
    """Return the trials that follow the last one of the search that did not fail: they confirm all of it."""
    last = max((slot.number for slot in slots if slot.kind == "search" and slot.state != "failed"), default=-1)
    following = (slot for slot in slots if slot.kind != "search" and slot.number > last)
    return sorted(following, key=lambda slot: slot.number)


def untested(study: StudyRecord, slots: Sequence[Slot]) -> set[int]:
    """Return the numbers of the trials whose networks the test set may yet be measured with."""
    found = latest(slots)
    tests = [slot for slot in found if slot.kind == "test"]
    is_over = bool(tests) and all(slot.state in ENDED for slot in tests)
    wanted = study.spec.confirm is not None and study.metadata.get("has_test") and not is_over
    return {slot.number for slot in found if slot.kind == "confirm"} if wanted else set()
