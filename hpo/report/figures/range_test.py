"""The range tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from hpo.analysis import range_text
from hpo.analysis.range_text import clip_losses
from hpo.analysis.text import params_text
from hpo.report.figures.data import FigureData
from hpo.report.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    STATE_STYLES,
    escape_plotly,
    lay_out,
    rate_axis,
    round_digits,
    with_opacity,
)

LINE_DASHES = ("solid", "dash", "dot", "dashdot")


def draw_range_test(findings: FigureData) -> go.Figure | None:
    """The ramps that set the range of the search."""
    tested = findings.study.metadata.get(range_text.RANGE_TEST_KEY)
    return draw_ramps(tested) if tested else None


def range_test_caption(findings: FigureData) -> str:
    best = findings.best
    lines = range_text.range_test_lines(
        findings.study, best=best.lr if best else None, params=best.recommended if best else None
    )
    return _sentences(lines)


def _sentences(lines: Sequence[str]) -> str:
    return " ".join(f"{line[0].upper()}{line[1:]}." for line in lines)


def draw_ramps(tested: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Range tests, as plain data: the smoothed loss over the learning rate, and the range that follows from it."""
    figure = go.Figure()
    named: set[str] = set()
    for index, found in enumerate(tested):
        losses = clip_losses(found["losses"])
        figure.add_scatter(
            x=[round_digits(lr) for lr in found["lrs"]], y=[round_digits(loss) for loss in losses], mode="lines",
            name=escape_plotly(params_text(found["params"])) or "loss",
            line={"color": BLUE, "width": 2, "dash": LINE_DASHES[index % len(LINE_DASHES)]},
            hovertemplate="learning rate %{x:.2e}<br>loss %{y}<extra></extra>",
        )  # fmt: skip
        for what, colour in (("falls", GREEN), ("breaks", STATE_STYLES["diverged"].colour), ("leaps", ORANGE)):
            if found[what] is not None:
                figure.add_vline(found[what], line={"color": colour, "dash": "dot", "width": 1.5})
                named.add(what)
        if found["low"] is not None:
            figure.add_vrect(
                found["low"], found["high"], fillcolor=with_opacity(GREEN, 0.1), line_width=0, layer="below"
            )
            named.add("range")
    legend = {
        "falls": ("the loss starts to fall", GREEN, "line-ns-open"),
        "breaks": ("it explodes, or loses half of its fall", STATE_STYLES["diverged"].colour, "line-ns-open"),
        "leaps": ("a step changes 3 % of the weights", ORANGE, "line-ns-open"),
        "range": ("the range to search", with_opacity(GREEN, 0.3), "square"),
    }
    for what, (name, colour, symbol) in legend.items():
        if what in named:
            marker = {"symbol": symbol, "size": 12, "color": colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
    figure.update_xaxes(**rate_axis())
    figure.update_yaxes(title={"text": "loss, smoothed"})
    return lay_out(figure, height=430, margin={"l": 8, "r": 8, "t": 100, "b": 8})
