"""The figure of the parameters' importance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hpo.reports.figures.importance import importance_caption
from tests.analysis.examples import complete, make_study, numbered
from tests.reports.examples import figure_data


def test_importance_is_of_what_was_searched_and_a_parameter_that_does_nothing_matters_little(large: Any) -> None:
    shares = figure_data(*large[:2]).importances
    assert set(shares) == {"lr", "optimizer", "batch_size"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["batch_size"] < shares["lr"]
    assert figure_data(make_study(), numbered(*complete())).importances == {}


def test_the_caption_says_how_trials_count_that_there_are(large: Any) -> None:
    data = figure_data(*large[:2])
    caption = importance_caption(data)
    assert "Pruned trials count with their last report and diverged trials count with the worst value." in caption
    caption = importance_caption(replace(data, trials=[trial for trial in data.trials if trial.state == "complete"]))
    assert "count with" not in caption
