"""The figure of the response."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpo.analysis.answer import find_best
from tests.analysis.examples import SEARCHED, make_study, numbered, trained
from tests.report.examples import drawn, traces


def test_no_curve_is_drawn_where_all_trials_diverged() -> None:
    whole = [trained(lr, 0.9 - 0.1 * (math.log10(lr) + 3) ** 2) for lr in (1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3)]
    dead = [trained(lr, 0.1, state="diverged", epochs=1) for lr in (1e-2, 2e-2, 3e-2, 5e-2, 9e-2)]
    (curve,) = traces(drawn(make_study(**SEARCHED), numbered(*whole, *dead))["response"], "response")
    assert 4e-3 < max(curve.x) <= 1e-2
    assert min(curve.x) == pytest.approx(1e-5)


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
