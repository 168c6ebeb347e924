"""How far reading has come, in the log."""

from __future__ import annotations

import pytest

from hpo.train.data import progress


def test_progress_is_logged_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2)).__next__
    monkeypatch.setattr("hpo.train.data.progress.time.monotonic", clock)
    caplog.set_level("INFO")
    reading = progress.ReadingProgress("all of", 5000)
    for _ in range(5):
        reading.add(1000)
    assert caplog.messages == ["reading all of the images: 3,000 of 5,000"]
