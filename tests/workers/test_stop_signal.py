"""When a worker leaves: after its epoch, or in the middle of one that does not end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hpo.workers import stop_signal
from hpo.workers.stop_signal import EPOCH_GRACE_S, StopSignal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the module a clock whose time is the list's only item."""
    now = [0.0]
    monkeypatch.setattr(stop_signal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_worker_that_is_told_to_leave_has_the_time_to_end_its_epoch(clock: list[float]) -> None:
    told: list[bool] = []
    stop = StopSignal(lambda: bool(told))
    assert not stop.is_set()
    assert not stop.must_abort()
    clock[0] = 100.0
    told.append(True)
    assert stop.is_set()
    assert not stop.must_abort()
    clock[0] += EPOCH_GRACE_S
    assert not stop.must_abort()
    clock[0] += 1.0
    assert stop.must_abort()


def test_an_epoch_is_never_left_in_its_middle_because_the_study_stops(clock: list[float]) -> None:
    stop = StopSignal(lambda: False)
    stop.study_is_stopping()
    assert stop.is_set()
    assert not stop.must_abort()
    clock[0] += 2 * EPOCH_GRACE_S
    assert not stop.must_abort()
