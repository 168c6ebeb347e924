"""The figure of the epochs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpo.study.records import Attempt
from tests.analysis.examples import make_study, numbered, trained
from tests.reports.examples import drawn


def test_the_epochs_are_all_accounted_for(large: Any) -> None:
    _, trials, entries = large
    by_rate = [trace for trace in entries["epochs"].figure.data if trace.yaxis == "y"]
    assert sum(sum(trace.y) for trace in by_rate) == sum(len(trial.epochs) for trial in trials)
    ends = [trace for trace in entries["epochs"].figure.data if trace.yaxis == "y2"]
    assert sum(sum(trace.y) for trace in ends) == len(trials)


def test_epochs_of_a_network_that_is_only_measured_are_not_counted_again() -> None:
    trials = numbered(trained(0.1, 0.8), trained(0.2, 0.7))
    loaded = Attempt(1, "worker", "host", "cpu", 0.0, 1.0, 0, len(trials[0].epochs), "complete", None, None)
    tests = [replace(trials[0], number=2, kind="test", tested=0, attempts=[loaded])]
    trained_again = [replace(tests[0], attempts=[replace(loaded, resumed_from=0)])]
    without, measured, again = (drawn(make_study(), trials + more)["epochs"] for more in ([], tests, trained_again))
    assert measured.caption == without.caption != again.caption
    assert [list(trace.y) for trace in measured.figure.data] == [list(trace.y) for trace in without.figure.data]
