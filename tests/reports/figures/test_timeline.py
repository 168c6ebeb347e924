"""The figure of workers and devices."""

from __future__ import annotations

from dataclasses import replace

from hpo.study.records import Attempt
from tests.analysis.examples import make_study, make_trials
from tests.reports.examples import drawn


def test_attempts_that_overlap_have_rows_of_their_own_and_each_device_keeps_to_its_own() -> None:
    def attempt(device: str, began: float, ended: float | None, outcome: str | None = "complete") -> Attempt:
        return Attempt(1, "w", "host", device, began, ended, 0, 0, outcome, None, None)

    tries = [attempt("cuda:0", 0, 10), attempt("cuda:0", 5, 12, "lost"), attempt("cuda:0", 10, None, None)]
    tries += [attempt("cuda:1", 1, 2), attempt("cuda:1", 2, 3)]
    trials = [replace(t, attempts=[a]) for t, a in zip(make_trials(*[(0.1, 0.5)] * 5), tries, strict=True)]
    entry = drawn(make_study(), trials)["timeline"]
    bars = [
        (y, base, base + length)
        for trace in entry.figure.data
        for y, base, length in zip(trace.y, trace.base, trace.x, strict=True)
    ]
    assert sorted(bars) == [(0, 0, 10), (0, 10, 12), (1, 5, 12), (2, 1, 2), (2, 2, 3)]
    assert list(entry.figure.layout.yaxis.ticktext) == ["host cuda:0", "host cuda:1"]
    assert {trace.name for trace in entry.figure.data} == {"complete", "other", "running"}
