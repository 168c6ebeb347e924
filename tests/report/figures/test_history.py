"""The figure of the history."""

from __future__ import annotations

from typing import Any

from hpo.analysis.answer import find_best
from tests.report.examples import traces


def test_the_history_says_when_the_best_value_came(large: Any) -> None:
    study, trials, entries = large
    answer = find_best(study, trials)
    assert answer is not None
    assert f"came with trial {answer.trial}" in entries["history"].caption
    (line,) = traces(entries["history"], "best so far")
    assert list(line.y) == sorted(line.y)
