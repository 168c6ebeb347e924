"""The figure of the response."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.analysis.answer import find_best
from tests.report.examples import traces


def test_the_response_shows_every_trial_once_by_its_state_and_what_the_answer_says(large: Any) -> None:
    study, trials, entries = large
    entry = entries["response"]
    for state in ("complete", "pruned", "diverged"):
        shown = sorted(number for trace in traces(entry, state) for number in trace.customdata)
        assert shown == [trial.number for trial in trials if trial.state == state and trial.kind == "search"]
    answer = find_best(study, trials)
    assert answer is not None
    assert len(answer.responses) == 3
    stars = traces(entry, "best, with its 90 % interval")
    assert {star.x[0] for star in stars} == {response.best for _, response in answer.responses}
    for star in stars:
        (interval,) = (response.interval for _, response in answer.responses if response.best == star.x[0])
        assert star.x[0] + star.error_x.array[0] == pytest.approx(interval[1])
        assert star.x[0] - star.error_x.arrayminus[0] == pytest.approx(interval[0])
    shaded = [(shape.x0, shape.x1) for shape in entry.figure.layout.shapes if shape.type == "rect"]
    for _, response in answer.responses:
        assert response.plateau in shaded
        assert response.divergence_lr is not None
        assert response.divergence_lr.interval in shaded
