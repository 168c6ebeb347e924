"""All figures: each says its numbers, whatever the study is like."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from hpo.reports.figures.table import FIGURES
from tests.analysis.examples import make_study, make_trials
from tests.reports.examples import MINIMIZED, drawn, unusual


def test_a_study_of_several_parameters_has_every_figure_and_each_says_its_numbers(large: Any) -> None:
    assert list(large[2]) == list(FIGURES)
    for entry in large[2].values():
        assert re.search(r"\d", entry.caption), entry.name
        assert entry.caption.endswith(".")
        assert entry.figure.layout.height


@pytest.mark.parametrize("name", unusual())
def test_whatever_a_study_is_like_its_figures_are_drawn_and_hold_only_numbers(name: str) -> None:
    study, trials = unusual()[name]
    for entry in drawn(study, trials).values():
        assert entry.caption
        json.dumps(json.loads(entry.figure.to_json()), allow_nan=False)
        for trace in entry.figure.data:
            for values in (trace.x, trace.y):
                assert not any(isinstance(value, float) and not math.isfinite(value) for value in values)


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    study = make_study(objective=MINIMIZED, search={"space": {"lr": [0.1, 0.2], "kind": ["<a href='x'>y</a>", "b"]}})
    trials = [replace(t, params={"lr": 0.1, "kind": "<a href='x'>y</a>"}) for t in make_trials((1, 0.5), (1, 0.7))]
    for entry in drawn(study, trials).values():
        assert "<a href" not in entry.figure.to_json().replace("\\u003c", "<")
