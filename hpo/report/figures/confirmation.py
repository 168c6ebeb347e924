"""The figures of what stands before and after a search: the range tests that set its range, and its confirmation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from hpo.analysis import range_text
from hpo.analysis.range_text import worth_showing
from hpo.analysis.text import confirmation_lines, params_text
from hpo.report.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STATE_STYLES,
    Findings,
    escaped,
    lay_out,
    rate_axis,
    rgba,
    short,
    value_axis,
)  # fmt: skip

DASHES = ("solid", "dash", "dot", "dashdot")


# The confirmation


def confirmation(findings: Findings) -> go.Figure | None:
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
        x=[short(value) for _, value, _ in points], y=[escaped(name) for name, _, _ in points], mode="markers",
        name="a seed", customdata=[seed for _, _, seed in points],
        marker={"symbol": STATE_STYLES["complete"].symbol, "size": 9, "color": BLUE, "opacity": 0.7},
        hovertemplate="seed %{customdata}: %{x}<extra></extra>",
    )  # fmt: skip
    means = [(name, one.mean) for name, one in zip(names, found.candidates, strict=True) if one.mean is not None]
    figure.add_scatter(
        x=[short(mean) for _, mean in means], y=[escaped(name) for name, _ in means], mode="markers",
        name="mean" + (", with its standard error" if found.standard_error is not None else ""),
        marker={"symbol": ["star", *["diamond"] * (len(means) - 1)], "size": 15, "color": GREEN,
                "line": {"width": 1, "color": "white"}},
        error_x={"type": "constant", "value": found.standard_error or 0.0, "color": GREEN, "thickness": 3, "width": 7},
        hovertemplate="mean %{x}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[short(found.value)], y=[escaped(names[0])], mode="markers", name="to be expected",
        marker={"symbol": "line-ns-open", "size": 24, "color": GREEN, "line": {"width": 3}},
        hovertemplate="to be expected %{x}<extra></extra>",
    )  # fmt: skip
    tested = [
        accuracy for trial in findings.others if trial.kind == "test" and trial.tested in found.winner.trials
        if trial.state == "complete" and (accuracy := trial.curves["test_accuracy"][-1]) is not None
    ]  # fmt: skip
    if tested:
        figure.add_scatter(
            x=[short(accuracy) for accuracy in tested], y=[escaped(names[0])] * len(tested), mode="markers",
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


def tell_confirmation(findings: Findings) -> str:
    assert findings.best is not None
    assert findings.best.confirmation is not None
    return _sentences(confirmation_lines(findings.study, findings.best.confirmation))


# The range test


def range_test(findings: Findings) -> go.Figure | None:
    """The ramps that set the range of the search."""
    tested = findings.study.facts.get(range_text.RANGE_TEST_KEY)
    return ramps(tested) if tested else None


def tell_range_test(findings: Findings) -> str:
    best = findings.best
    lines = range_text.range_test_lines(
        findings.study, best=best.lr if best else None, params=best.recommended if best else None
    )
    return _sentences(lines)


def _sentences(lines: Sequence[str]) -> str:
    return " ".join(f"{line[0].upper()}{line[1:]}." for line in lines)


def ramps(tested: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Range tests, as plain data: the smoothed loss over the learning rate, and the range that follows from it."""
    figure = go.Figure()
    named: set[str] = set()
    for index, found in enumerate(tested):
        losses = worth_showing(found["losses"])
        figure.add_scatter(
            x=[short(lr) for lr in found["lrs"]], y=[short(loss) for loss in losses], mode="lines",
            name=escaped(params_text(found["params"])) or "loss",
            line={"color": BLUE, "width": 2, "dash": DASHES[index % len(DASHES)]},
            hovertemplate="learning rate %{x:.2e}<br>loss %{y}<extra></extra>",
        )  # fmt: skip
        for what, colour in (("falls", GREEN), ("breaks", STATE_STYLES["diverged"].colour), ("leaps", ORANGE)):
            if found[what] is not None:
                figure.add_vline(found[what], line={"color": colour, "dash": "dot", "width": 1.5})
                named.add(what)
        if found["low"] is not None:
            figure.add_vrect(found["low"], found["high"], fillcolor=rgba(GREEN, 0.1), line_width=0, layer="below")
            named.add("range")
    legend = {
        "falls": ("the loss starts to fall", GREEN, "line-ns-open"),
        "breaks": ("it explodes, or loses half of its fall", STATE_STYLES["diverged"].colour, "line-ns-open"),
        "leaps": ("a step changes 3 % of the weights", ORANGE, "line-ns-open"),
        "range": ("the range to search", rgba(GREEN, 0.3), "square"),
    }
    for what, (name, colour, symbol) in legend.items():
        if what in named:
            marker = {"symbol": symbol, "size": 12, "color": colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
    figure.update_xaxes(**rate_axis())
    figure.update_yaxes(title={"text": "loss, smoothed"})
    return lay_out(figure, height=430, margin={"l": 8, "r": 8, "t": 100, "b": 8})
