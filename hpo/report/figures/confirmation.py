"""The figures of what stands before and after a search: the range tests that set its range, and its confirmation."""

from __future__ import annotations

import plotly.graph_objects as go

from hpo.analysis.text import confirmation_lines, params_text
from hpo.report.figures.data import FigureData, value_axis
from hpo.report.figures.range_test import _sentences
from hpo.report.figures.style import BLUE, GREEN, GREY, PURPLE, STATE_STYLES, escape_plotly, lay_out, round_digits


def draw_confirmation(findings: FigureData) -> go.Figure | None:
    """Each learning rate that was trained again, a row each: its seeds, their mean, and the winner's test accuracy."""
    found = findings.best.confirmation if findings.best else None
    if found is None or findings.best is None:
        return None
    figure = go.Figure()
    names = [f"{params_text(candidate.params)}{' ' * index}" for index, candidate in enumerate(found.candidates)]
    points = [
        (name, value, seed)
        for name, candidate in zip(names, found.candidates, strict=True)
        for seed, value in enumerate(candidate.values)
        if value is not None
    ]
    figure.add_scatter(
        x=[round_digits(value) for _, value, _ in points], y=[escape_plotly(name) for name, _, _ in points], mode="markers",
        name="a seed", customdata=[seed for _, _, seed in points],
        marker={"symbol": STATE_STYLES["complete"].symbol, "size": 9, "color": BLUE, "opacity": 0.7},
        hovertemplate="seed %{customdata}: %{x}<extra></extra>",
    )  # fmt: skip
    means = [(name, one.mean) for name, one in zip(names, found.candidates, strict=True) if one.mean is not None]
    figure.add_scatter(
        x=[round_digits(mean) for _, mean in means], y=[escape_plotly(name) for name, _ in means], mode="markers",
        name="mean" + (", with its standard error" if found.standard_error is not None else ""),
        marker={"symbol": ["star", *["diamond"] * (len(means) - 1)], "size": 15, "color": GREEN,
                "line": {"width": 1, "color": "white"}},
        error_x={"type": "constant", "value": found.standard_error or 0.0, "color": GREEN, "thickness": 3, "width": 7},
        hovertemplate="mean %{x}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[round_digits(found.value)], y=[escape_plotly(names[0])], mode="markers", name="to be expected",
        marker={"symbol": "line-ns-open", "size": 24, "color": GREEN, "line": {"width": 3}},
        hovertemplate="to be expected %{x}<extra></extra>",
    )  # fmt: skip
    tested = [
        accuracy for trial in findings.others if trial.kind == "test" and trial.tested in found.winner.trials
        if trial.state == "complete" and (accuracy := trial.curves["test_accuracy"][-1]) is not None
    ]  # fmt: skip
    if tested:
        figure.add_scatter(
            x=[round_digits(accuracy) for accuracy in tested], y=[escape_plotly(names[0])] * len(tested), mode="markers",
            name="on the test set", marker={"symbol": "triangle-up-open", "size": 11, "color": PURPLE},
            hovertemplate="test accuracy %{x}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(findings.best.value, line={"color": GREY, "dash": "dash", "width": 1.5})
    figure.add_scatter(
        x=[None], y=[None], mode="markers", name="the search's best trial",
        marker={"symbol": "line-ns-open", "size": 12, "color": GREY},
    )  # fmt: skip
    figure.update_xaxes(**value_axis(findings))
    figure.update_yaxes(type="category", autorange="reversed")
    return lay_out(figure, height=170 + 46 * len(names), margin={"l": 8, "r": 8, "t": 70, "b": 8})


def confirmation_caption(findings: FigureData) -> str:
    assert findings.best is not None
    assert findings.best.confirmation is not None
    return _sentences(confirmation_lines(findings.study, findings.best.confirmation))
