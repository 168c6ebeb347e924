"""The range tests that set the range of a search: the loss of each ramp, its signs, and the range that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from hpo.analysis.range_text import RANGE_TEST_KEY, clip_losses, range_test_lines
from hpo.analysis.text import paragraph_text, params_text
from hpo.reports.figures.data import FigureData
from hpo.reports.figures.style import (
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
SIGN_COLOURS = {"falls": GREEN, "breaks": STATE_STYLES["diverged"].colour, "leaps": ORANGE}
LEGEND = {  # name of a sign, or the range: (text, colour, symbol)
    "falls": ("the loss starts to fall", SIGN_COLOURS["falls"], "line-ns-open"),
    "breaks": ("it explodes, or loses half of its fall", SIGN_COLOURS["breaks"], "line-ns-open"),
    "leaps": ("a step changes 3 % of the weights", SIGN_COLOURS["leaps"], "line-ns-open"),
    "range": ("the range to search", with_opacity(GREEN, 0.3), "square"),
}


def draw_range_test(data: FigureData) -> go.Figure | None:
    """Draw the ramps that set the range of the search."""
    tests = data.study.metadata.get(RANGE_TEST_KEY)
    return draw_ramps(tests) if tests else None


def range_test_caption(data: FigureData) -> str:
    """Return what the answer says of the range tests."""
    best = data.best
    lines = range_test_lines(data.study, best=best.lr if best else None, params=best.recommended if best else None)
    return paragraph_text(lines)


def draw_ramps(tests: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw range tests, given as plain data: the smoothed loss over the learning rate, and the range to search."""
    figure = go.Figure()
    seen: set[str] = set()
    for index, test in enumerate(tests):
        losses = clip_losses(test["losses"])
        figure.add_scatter(
            x=[round_digits(lr) for lr in test["lrs"]],
            y=[round_digits(loss) for loss in losses],
            mode="lines",
            name=escape_plotly(params_text(test["params"])) or "loss",
            line={"color": BLUE, "width": 2, "dash": LINE_DASHES[index % len(LINE_DASHES)]},
            hovertemplate="learning rate %{x:.2e}<br>loss %{y}<extra></extra>",
        )
        for sign, colour in SIGN_COLOURS.items():
            if test[sign] is not None:
                figure.add_vline(test[sign], line={"color": colour, "dash": "dot", "width": 1.5})
                seen.add(sign)
        if test["low"] is not None:
            fill = with_opacity(GREEN, 0.1)
            figure.add_vrect(test["low"], test["high"], fillcolor=fill, line_width=0, layer="below")
            seen.add("range")
    for what, (name, colour, symbol) in LEGEND.items():
        if what in seen:
            marker = {"symbol": symbol, "size": 12, "color": colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
    figure.update_xaxes(**rate_axis())
    figure.update_yaxes(title={"text": "loss, smoothed"})
    return lay_out(figure, height=430, margin={"l": 8, "r": 8, "t": 100, "b": 8})
