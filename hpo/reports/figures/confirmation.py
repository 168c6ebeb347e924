"""The confirmation of a search: the seeds of each learning rate that was trained again, and their means."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from hpo.analysis.answer_text import confirmation_lines
from hpo.analysis.confirmation import Confirmation
from hpo.analysis.text import paragraph_text, params_text
from hpo.reports.figures.data import FigureData, value_axis
from hpo.reports.figures.style import BLUE, GREEN, GREY, PURPLE, STATE_STYLES, escape_plotly, lay_out, round_digits
from hpo.train.config import name_on_test_set


def draw_confirmation(data: FigureData) -> go.Figure | None:
    """Draw a row for each learning rate: its seeds, their mean, and the test accuracy of the winner's networks."""
    confirmation = data.best.confirmation if data.best else None
    if confirmation is None or data.best is None:
        return None
    figure = go.Figure()
    # Equal texts would share a row.
    texts = [params_text(candidate.params) for candidate in confirmation.candidates]
    names = [escape_plotly(f"{text}{' ' * index}") for index, text in enumerate(texts)]
    _add_seeds(figure, confirmation, names)
    _add_means(figure, confirmation, names)
    _add_tests(figure, data, confirmation, names[0])
    figure.add_scatter(  # a mark in each row, and no line across the figure, which would not widen the axis
        x=[round_digits(data.best.value)] * len(names),
        y=names,
        mode="markers",
        name="the search's best trial",
        marker={"symbol": "line-ns-open", "size": 24, "color": GREY, "line": {"width": 2}},
        hovertemplate="the search's best trial %{x}<extra></extra>",
    )
    figure.update_xaxes(**value_axis(data))
    figure.update_yaxes(type="category", autorange="reversed")
    return lay_out(figure, height=170 + 46 * len(names), margin={"l": 8, "r": 8, "t": 70, "b": 8})


def _add_seeds(figure: go.Figure, confirmation: Confirmation, names: Sequence[str]) -> None:
    points = [
        (name, value, seed)
        for name, candidate in zip(names, confirmation.candidates, strict=True)
        for seed, value in enumerate(candidate.values)
        if value is not None
    ]
    figure.add_scatter(
        x=[round_digits(value) for _, value, _ in points],
        y=[name for name, _, _ in points],
        mode="markers",
        name="a seed",
        customdata=[seed for _, _, seed in points],
        marker={
            "symbol": STATE_STYLES["complete"].symbol,
            "size": 9,
            "color": BLUE,
            "line": {"width": 1, "color": "white"},
        },
        hovertemplate="seed %{customdata}: %{x}<extra></extra>",
    )


def _add_means(figure: go.Figure, confirmation: Confirmation, names: Sequence[str]) -> None:
    """Add the mean of each candidate, and the expected value of the winner."""
    means = [
        (name, candidate.mean)
        for name, candidate in zip(names, confirmation.candidates, strict=True)
        if candidate.mean is not None
    ]
    error = confirmation.standard_error
    figure.add_scatter(
        x=[round_digits(mean) for _, mean in means],
        y=[name for name, _ in means],
        mode="markers",
        name="mean" if error is None else "mean, with its standard error",
        marker={
            "symbol": ["star", *["diamond"] * (len(means) - 1)],
            "size": 15,
            "color": GREEN,
            "line": {"width": 1, "color": "white"},
        },
        error_x={"type": "constant", "value": error or 0.0, "color": GREEN, "thickness": 3, "width": 7},
        hovertemplate="mean %{x}<extra></extra>",
    )
    figure.add_scatter(
        x=[round_digits(confirmation.value)],
        y=[names[0]],
        mode="markers",
        name="expected",
        marker={"symbol": "line-ns-open", "size": 24, "color": GREEN, "line": {"width": 3}},
        hovertemplate="expected %{x}<extra></extra>",
    )


def _add_tests(figure: go.Figure, data: FigureData, confirmation: Confirmation, winner: str) -> None:
    tests = [
        trial
        for trial in data.others
        if trial.kind == "test" and trial.state == "complete" and trial.tested in confirmation.winner.trials
    ]
    metric = confirmation.test_metric
    values = [value for trial in tests if (value := trial.curves[metric][-1]) is not None]
    if values and metric == name_on_test_set(data.study.spec.metric):  # else they would say nothing on this axis
        figure.add_scatter(
            x=[round_digits(value) for value in values],
            y=[winner] * len(values),
            mode="markers",
            name="on the test set",
            marker={"symbol": "triangle-up-open", "size": 11, "color": PURPLE},
            hovertemplate=f"{escape_plotly(metric)} %{{x}}<extra></extra>",
        )


def confirmation_caption(data: FigureData) -> str:
    """Return what the answer says of the confirmation."""
    assert data.best is not None
    assert data.best.confirmation is not None
    lines = confirmation_lines(data.study, data.best.confirmation)
    return paragraph_text([f"{line.label}: {line}" for line in lines])
