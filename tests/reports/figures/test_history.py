"""The figure of the history."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.analysis.answer import find_best
from tests.analysis.examples import make_study, make_trials
from tests.reports.examples import drawn, traces


def test_the_history_says_when_the_best_value_came(large: Any) -> None:
    study, trials, entries = large
    answer = find_best(study, trials)
    assert answer is not None
    assert f"came with trial {answer.trial}" in entries["history"].caption
    (line,) = traces(entries["history"], "best so far")
    assert list(line.y) == sorted(line.y)


def test_what_has_no_value_is_not_drawn_and_that_is_said() -> None:
    trials = make_trials((0.1, 0.5), (0.2, 0.7), (0.3, "failed"), (0.4, "diverged"))
    entry = drawn(make_study(), trials)["history"]
    assert entry.caption.startswith("3 trials: 2 complete, 1 diverged;")
    assert entry.caption.endswith("; without a value, and not drawn: 1 failed.")
    assert entry.figure.layout.xaxis.range == (-0.5, 3.5)
    assert "not drawn" not in drawn(make_study(), trials[:2])["history"].caption


def test_the_axis_of_a_single_value_has_room_about_it() -> None:
    low, high = drawn(make_study(), make_trials((0.1, 0.5), (0.2, "diverged")))["history"].figure.layout.yaxis.range
    assert low == pytest.approx(0.47)
    assert high == pytest.approx(0.53)
