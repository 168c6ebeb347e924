"""The figure of the epochs."""

from __future__ import annotations

from typing import Any


def test_the_epochs_are_all_accounted_for(large: Any) -> None:
    _, trials, entries = large
    by_rate = [trace for trace in entries["epochs"].figure.data if trace.yaxis == "y"]
    assert sum(sum(trace.y) for trace in by_rate) == sum(len(trial.epochs) for trial in trials)
    ends = [trace for trace in entries["epochs"].figure.data if trace.yaxis == "y2"]
    assert sum(sum(trace.y) for trace in ends) == len(trials)
