"""The figures over the learning rate: the response with every trial, the learning curves, and where the epochs went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.response import CONFIDENCE, Response
from hpo.analysis.text import interval_text, params_text, rate_text, response_lines, value_text
from hpo.report.figures.data import FigureData, hover_settings, rate_of, shown_bounds, value_axis
from hpo.report.figures.style import (
    BLUE,
    GREEN,
    STATE_STYLES,
    VERMILLION,
    escape_plotly,
    lay_out,
    rate_axis,
    round_digits,
    with_opacity,
)
from hpo.study.records import TrialRecord

MAX_PANELS = 8  # of combinations of listed parameters
PANEL_HEIGHT = 340  # pixels
ResponseGroup = tuple[Mapping[str, Any], Response | None, list[TrialRecord]]


def draw_response(findings: FigureData) -> go.Figure | None:
    """The value over the learning rate, a panel for each combination of listed parameters: the curve with its band,
    the plateau, the interval of the best rate, the edge with its interval, and every trial by its state."""
    groups = _response_groups(findings)[:MAX_PANELS]
    if not groups:
        return None
    titles = [escape_plotly(params_text(params)) for params, _, _ in groups] if len(groups) > 1 else None
    figure = make_subplots(
        rows=len(groups), shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.16 / len(groups)
    )
    shown = [trial for _, _, trials in groups for trial in trials]
    low, high = _value_range(findings, groups)
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    below = low - room  # or above, where the lower value is the better: those without a value
    if findings.study.spec.direction == "minimize":
        below = high + room
    named: set[str] = set()
    for row, (_, found, trials) in enumerate(groups, start=1):
        if found is not None:
            _add_response(figure, findings, found, row)
        _add_trials(figure, findings, trials, row, (low, high, below), named)
    rates = [rate for trial in shown if (rate := rate_of(trial))]
    rates += [lr for _, found, _ in groups if found for lr in (found.lrs[0], found.lrs[-1])]
    ends = math.log10(min(rates)), math.log10(max(rates))
    margin = 0.04 * (ends[1] - ends[0]) or 0.5
    figure.update_xaxes(**rate_axis(title=None, range=[ends[0] - margin, ends[1] + margin]))
    figure.update_xaxes(title={"text": "learning rate"}, row=len(groups))
    figure.update_yaxes(**value_axis(findings, range=[min(low, below) - room, max(high, below) + room]))
    height = PANEL_HEIGHT + 90 if len(groups) == 1 else 90 + 260 * len(groups)
    return lay_out(
        figure, height=height, margin={"l": 8, "r": 8, "t": 44 if titles else 12, "b": 8}, legend=LEGEND_BELOW
    )


LEGEND_BELOW = {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0, "yanchor": "bottom"}


def response_caption(findings: FigureData) -> str:
    told = []
    for params, found, trials in _response_groups(findings):
        name = f"With {params_text(params)}: " if params else ""
        if found is None:
            told.append(f"{name}{len(trials)} trials, too few learning rates for a curve")
        else:
            lines = "; ".join(response_lines(findings.study, found))
            told.append(f"{name or 'All trials: '}the best learning rate is {rate_text(found.best)}; {lines}")
    hidden = len(told) - MAX_PANELS
    drawn = f"; {hidden} more combinations are not drawn" if hidden > 0 else ""
    return ". ".join(told) + drawn + ". Trials without a value, such as diverged ones, are at the axis's end."


def _response_groups(findings: FigureData) -> list[ResponseGroup]:
    """Trials of each combination that has a response, the answer's first, and last all others."""
    left = [trial for trial in findings.trials if rate_of(trial) is not None and trial.state != "waiting"]
    groups: list[ResponseGroup] = []
    found = findings.best
    ranked = sorted(found.responses, key=lambda entry: entry[1] is not found.response) if found else []
    for params, curve in ranked:
        alike = [trial for trial in left if params.items() <= trial.params.items()]
        left = [trial for trial in left if trial not in alike] if params else []
        groups.append((params, curve, alike))
    return [*groups, ({"the other values": ""} if groups else {}, None, left)] if left else groups


def _value_range(findings: FigureData, groups: Sequence[ResponseGroup]) -> tuple[float, float]:
    values = [trial.value for _, _, trials in groups for trial in trials if trial.value is not None]
    values += [value for _, found, _ in groups if found for value in found.mean]
    return shown_bounds(findings, values) if values else (0.0, 1.0)


def _add_response(figure: go.Figure, findings: FigureData, found: Response, row: int) -> None:
    first = row == 1
    lrs = [round_digits(lr) for lr in found.lrs]
    place = {"row": row, "col": 1}
    figure.add_scatter(
        x=lrs + lrs[::-1], y=[round_digits(y) for y in [*found.high, *found.low[::-1]]], fill="toself",
        fillcolor=with_opacity(BLUE, 0.16), line={"width": 0}, hoverinfo="skip", name=f"{CONFIDENCE:.0%} band",
        legendgroup="band", showlegend=first, mode="lines", **place,
    )  # fmt: skip
    figure.add_scatter(
        x=lrs, y=[round_digits(y) for y in found.mean], mode="lines", line={"color": BLUE, "width": 2.5}, name="response",
        hovertemplate="learning rate %{x:.2e}<br>expected %{y}<extra></extra>", legendgroup="curve", showlegend=first,
        **place,
    )  # fmt: skip
    figure.add_scatter(
        x=[found.best], y=[round_digits(found.value)], mode="markers", name=f"best, with its {CONFIDENCE:.0%} interval",
        marker={"symbol": "star", "size": 16, "color": GREEN, "line": {"width": 1, "color": "white"}},
        error_x={"type": "data", "symmetric": False, "array": [found.interval[1] - found.best],
                 "arrayminus": [found.best - found.interval[0]], "color": GREEN, "thickness": 3, "width": 7},
        hovertemplate=f"best learning rate {rate_text(found.best)}<br>{interval_text(found.interval)}"
        f"<br>expected {value_text(found.value, findings.study)}<extra></extra>",
        legendgroup="best", showlegend=first, **place,
    )  # fmt: skip
    # After the traces: Plotly shades no panel that is empty.
    figure.add_vrect(*found.plateau, fillcolor=with_opacity(GREEN, 0.12), line_width=0, layer="below", **place)
    if found.divergence_lr is not None:
        figure.add_vrect(
            *found.divergence_lr.interval,
            fillcolor=with_opacity(VERMILLION, 0.08),
            line_width=0,
            layer="below",
            **place,
        )
        figure.add_vline(found.divergence_lr.lr, line={"color": VERMILLION, "dash": "dash", "width": 1.5}, **place)
    # What is shaded has no trace of its own, and so no place in the legend without these.
    for name, colour, symbol in (("plateau", GREEN, "square"), ("half diverge", VERMILLION, "line-ns-open")):
        if first and (name == "plateau" or found.divergence_lr is not None):
            marker = {
                "symbol": symbol,
                "size": 12,
                "color": with_opacity(colour, 0.25) if symbol == "square" else colour,
            }
            figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker, **place)


def _add_trials(
    figure: go.Figure, findings: FigureData, trials: Sequence[TrialRecord], row: int, bounds: tuple[float, float, float],
    named: set[str],
) -> None:  # fmt: skip
    low, high, below = bounds
    for state, look in STATE_STYLES.items():
        some = [trial for trial in trials if trial.state == state]
        if not some:
            continue
        figure.add_scatter(
            x=[round_digits(rate_of(trial)) for trial in some],
            y=[below if trial.value is None else round_digits(min(max(trial.value, low), high)) for trial in some],
            mode="markers", name=state, legendgroup=state, showlegend=state not in named,
            marker={"symbol": look.symbol, "size": 9, "color": look.colour, "opacity": 0.85,
                    "line": {"width": 1, "color": "white"}},
            **hover_settings(findings, some), row=row, col=1,
        )  # fmt: skip
        named.add(state)
