"""The figure of the learning curves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpo.reports.figures.curves import MAX_CURVES
from scripts.bench.report import make_study as make_large
from tests.analysis.examples import LOG_LR, complete, make_study, numbered, trained
from tests.reports.examples import drawn


def test_learning_curves_are_one_line_a_trial_coloured_by_its_rate_with_a_gap_where_a_number_is_not_finite() -> None:
    trials = numbered(*complete())
    trials[3] = replace(
        trials[3], curves={"val_accuracy": [0.1, None, 0.3], "train_loss": [None] * 3}, epochs=[1, 2, 3]
    )
    entry = drawn(make_study(search={"trials": 16, "space": {"lr": LOG_LR}}), trials)["curves"]
    lines = [trace for trace in entry.figure.data if trace.x[0] is not None]
    points = {
        (number, x): y
        for trace in lines
        if trace.yaxis == "y2"
        for number, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
        if x is not None
    }
    for trial in trials:
        for epoch, value in zip(trial.epochs, trial.curves["val_accuracy"], strict=True):
            assert points[trial.number, epoch] == (None if value is None else pytest.approx(value, rel=1e-3))
    colours = [trace.line.color for trace in lines if trace.yaxis == "y2"]
    assert len(set(colours)) == len(colours) > 5
    assert entry.figure.layout.coloraxis.cmin == pytest.approx(-5)


def test_of_very_many_trials_some_curves_are_drawn_and_that_is_said() -> None:
    study, trials = make_large(MAX_CURVES + 50, 3)
    entry = drawn(study, trials)["curves"]
    lines = {n for trace in entry.figure.data for n in trace.customdata or ()}
    assert len(lines) == MAX_CURVES
    assert f"{MAX_CURVES} of them are drawn" in entry.caption
    assert ("best trial's" in entry.caption) == (max(trials, key=lambda trial: trial.value or 0).number in lines)


def test_the_caption_says_accuracies_in_percent_as_the_axis_does() -> None:
    entry = drawn(make_study(), numbered(trained(0.1, 0.5), trained(0.2, 0.8)))["curves"]
    assert entry.caption.endswith("; the best trial's val_accuracy goes from 50.59 % to 80.00 %.")
