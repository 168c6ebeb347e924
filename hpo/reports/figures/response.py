"""The response to the learning rate: the curve with its band, the plateau, the intervals, and every trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.answer import Best
from hpo.analysis.answer_text import edge_label, response_lines
from hpo.analysis.response import CONFIDENCE, REACH_DECADES, Response
from hpo.analysis.text import counts_text, interval_text, params_text, plural, rate_text, value_text
from hpo.reports.figures.data import FigureData, hover_settings, rate_of, room_beyond, shown_bounds, value_axis
from hpo.reports.figures.style import (
    BELOW,
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

MOST_DIVERGING = 0.5  # where a larger share of trials diverges, no curve of those that do not is drawn
MAX_PANELS = 8  # of combinations of listed parameters
PANEL_HEIGHT = 340  # pixels, of a single panel
BEST_MARKER = {"size": 16, "color": GREEN, "line": {"width": 1, "color": "white"}}


class ResponseGroup(NamedTuple):
    """Trials of a combination of listed parameters or, after these, all others; the name of the only group is empty."""

    name: str
    response: Response | None
    trials: list[TrialRecord]


class ValueBounds(NamedTuple):
    """The values between which trials are drawn, and the height at which those without a value are."""

    low: float
    high: float
    without_value: float


def draw_response(data: FigureData) -> go.Figure | None:
    """Draw the value over the learning rate, a panel for each combination of listed parameters.

    A panel shows the curve with its band, the plateau, the interval of the best learning rate, where half of the trials
    diverge with its interval, every trial by its state, and what was confirmed.
    """
    groups = _response_groups(data)[:MAX_PANELS]
    if not groups:
        return None
    titles = [escape_plotly(group.name) for group in groups] if len(groups) > 1 else None
    figure = make_subplots(
        rows=len(groups), shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.24 / len(groups)
    )
    low, high = _value_range(data, groups)
    room = room_beyond(low, high)
    is_minimized = data.study.spec.direction == "minimize"
    bounds = ValueBounds(low, high, high + room if is_minimized else low - room)
    in_legend: set[str] = set()
    for row, group in enumerate(groups, start=1):
        if group.response is not None:
            _add_response(figure, data, group, row)
        _add_trials(figure, data, group.trials, row, bounds, in_legend)
        if data.best is not None and group.response is data.best.response:
            _add_confirmed_rate(figure, data.best, row)
    _add_shapes_to_legend(figure, data, groups)
    figure.update_xaxes(**rate_axis(title=None, range=_rate_range(groups)))
    figure.update_xaxes(title={"text": "learning rate"}, row=len(groups))
    ends = [min(low, bounds.without_value) - room, max(high, bounds.without_value) + room]
    figure.update_yaxes(**value_axis(data, range=ends))
    height = 90 + (PANEL_HEIGHT if len(groups) == 1 else 260 * len(groups))
    return lay_out(figure, height=height, margin={"l": 8, "r": 8, "t": 44 if titles else 12, "b": 8}, legend=BELOW)


def response_caption(data: FigureData) -> str:
    """Return what each response says, in sentences."""
    groups = _response_groups(data)
    drawn, hidden = groups[:MAX_PANELS], groups[MAX_PANELS:]
    sentences = []
    for name, response, trials in drawn:
        subject = f"With {name}: " if name else ""
        if response is None or data.best is None:
            sentences.append(f"{subject}{plural(len(trials), 'trial')}, too few learning rates for a curve")
        else:
            lines = "; ".join(f"{line.label} {line}" for line in response_lines(data.study, data.best, response))
            sentences.append(f"{subject or 'All trials: '}{lines}")
    if hidden:
        sentences.append(f"{len(hidden)} more combinations are not drawn")
    if any(_lacks_mean(group) for group in drawn):
        sentences.append("The curve ends where no trial nearby was trained to the end")
    without_value = [trial for group in drawn for trial in group.trials if trial.value is None]
    if without_value:
        sentences.append(f"Drawn at the end of the axis, as they have no value: {counts_text(without_value)}")
    return ". ".join(sentences) + "."


def _response_groups(data: FigureData) -> list[ResponseGroup]:
    """Return a group for each combination that has a response, the answer's first, and one for all other trials."""
    left = [trial for trial in data.trials if rate_of(trial) is not None and trial.state != "waiting"]
    groups: list[ResponseGroup] = []
    best = data.best
    ranked = sorted(best.responses, key=lambda entry: entry[1] is not best.response) if best else []
    for params, response in ranked:
        alike = [trial for trial in left if params.items() <= trial.params.items()]
        left = [trial for trial in left if trial not in alike] if params else []
        groups.append(ResponseGroup(params_text(params), response, alike))
    if left:
        groups.append(ResponseGroup("other values" if groups else "", None, left))
    return groups


def _value_range(data: FigureData, groups: Sequence[ResponseGroup]) -> tuple[float, float]:
    values = [trial.value for group in groups for trial in group.trials if trial.value is not None]
    for group in groups:
        if group.response is not None:
            curves = (group.response.trial_low, group.response.trial_high)
            values += [curve[index] for curve in curves for index in _drawn_indices(group.response)]
            values += [group.response.mean[index] for index in _supported_indices(group)]
    if data.best is not None and data.best.confirmation is not None:
        values.append(data.best.confirmation.value)
    return shown_bounds(data, values) if values else (0.0, 1.0)


def _rate_range(groups: Sequence[ResponseGroup]) -> list[float]:
    """Return log10 of the learning rates between which the axis runs."""
    rates = [rate for group in groups for trial in group.trials if (rate := rate_of(trial))]
    responses = [group.response for group in groups if group.response]
    rates += [lr for response in responses for lr in (response.lrs[0], response.lrs[-1])]
    low, high = math.log10(min(rates)), math.log10(max(rates))
    margin = 0.04 * (high - low) or 0.5
    return [low - margin, high + margin]


def _add_response(figure: go.Figure, data: FigureData, group: ResponseGroup, row: int) -> None:
    assert group.response is not None
    panel, response = {"row": row, "col": 1}, group.response
    _add_curve(figure, group, response, panel)
    _add_best_rate(figure, data, response, panel)
    # After the traces: Plotly shades no panel that is empty.
    plateau_fill, diverging_fill = with_opacity(GREEN, 0.12), with_opacity(VERMILLION, 0.08)
    if data.best is not None and not data.best.is_open(response):
        figure.add_vrect(*response.plateau, fillcolor=plateau_fill, line_width=0, layer="below", **panel)
    if response.divergence_lr is not None:
        lr, interval = response.divergence_lr.lr, response.divergence_lr.interval
        figure.add_vrect(*interval, fillcolor=diverging_fill, line_width=0, layer="below", **panel)
        figure.add_vline(lr, line={"color": VERMILLION, "dash": "dash", "width": 1.5}, **panel)


def _add_shapes_to_legend(figure: go.Figure, data: FigureData, groups: Sequence[ResponseGroup]) -> None:
    """Add traces without points: shapes have no traces, and so no place in the legend."""
    responses = [group.response for group in groups if group.response is not None]
    markers: dict[str, dict[str, Any]] = {}
    if data.best is not None and not all(data.best.is_open(response) for response in responses):
        markers["plateau"] = {"symbol": "square", "size": 12, "color": with_opacity(GREEN, 0.25)}
    for response in responses:
        if response.divergence_lr is not None:
            markers[edge_label(response)] = {"symbol": "line-ns-open", "size": 12, "color": VERMILLION}
    for name, marker in markers.items():
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker, row=1, col=1)


def _drawn_indices(response: Response) -> list[int]:
    """Return where the band is drawn: there is nothing to expect of trials that do not diverge where all do."""
    return [index for index, share in enumerate(response.diverging) if share <= MOST_DIVERGING]


def _supported_indices(group: ResponseGroup) -> list[int]:
    """Return where the mean is drawn, too: between the trials that were trained to the end, and near these.

    Elsewhere it comes from what other learning rates gained after the epoch in which a trial was pruned.
    """
    if group.response is None:
        return []
    drawn = _drawn_indices(group.response)
    whole = [rate for trial in group.trials if trial.state == "complete" and (rate := rate_of(trial))]
    low, high = min(whole, default=math.inf) / 10**REACH_DECADES, max(whole, default=0.0) * 10**REACH_DECADES
    return [index for index in drawn if low <= group.response.lrs[index] <= high]


def _lacks_mean(group: ResponseGroup) -> bool:
    return group.response is not None and len(_supported_indices(group)) < len(_drawn_indices(group.response))


def _add_curve(figure: go.Figure, group: ResponseGroup, response: Response, panel: Mapping[str, int]) -> None:
    """Add the expected value of trials that do not diverge, and the band that holds most of their values."""
    drawn, supported = _drawn_indices(response), _supported_indices(group)
    lrs = [round_digits(response.lrs[index]) for index in drawn]
    low, high = (
        [round_digits(values[index]) for index in drawn] for values in (response.trial_low, response.trial_high)
    )
    figure.add_scatter(
        x=lrs + lrs[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=with_opacity(BLUE, 0.16),
        line={"width": 0},
        hoverinfo="skip",
        name=f"{100 * CONFIDENCE:.0f} % of trials",
        legendgroup="band",
        showlegend=panel["row"] == 1,
        mode="lines",
        **panel,
    )
    figure.add_scatter(
        x=[round_digits(response.lrs[index]) for index in supported],
        y=[round_digits(response.mean[index]) for index in supported],
        mode="lines",
        line={"color": BLUE, "width": 2.5},
        name="response",
        hovertemplate="learning rate %{x:.2e}<br>expected %{y}<extra></extra>",
        legendgroup="curve",
        showlegend=panel["row"] == 1,
        **panel,
    )


def _add_best_rate(figure: go.Figure, data: FigureData, response: Response, panel: Mapping[str, int]) -> None:
    """Add the best rate with its interval, as a star unless another one was confirmed."""
    low, high = response.interval
    label = f"best learning rate {rate_text(response.best)}<br>{interval_text(response.interval)}"
    name, symbol = f"best, with its {100 * CONFIDENCE:.0f} % interval", "star"
    if data.best is not None and data.best.confirmation is not None:
        name, symbol = f"best by the search, with its {100 * CONFIDENCE:.0f} % interval", "diamond"
    figure.add_scatter(
        x=[response.best],
        y=[round_digits(response.value)],
        mode="markers",
        name=name,
        marker={"symbol": symbol, **BEST_MARKER},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - response.best],
            "arrayminus": [response.best - low],
            "color": GREEN,
            "thickness": 3,
            "width": 7,
        },
        hovertemplate=f"{label}<br>expected {value_text(response.value, data.study)}<extra></extra>",
        legendgroup="best",
        showlegend=panel["row"] == 1,
        **panel,
    )


def _add_confirmed_rate(figure: go.Figure, best: Best, row: int) -> None:
    if best.confirmation is None:
        return
    figure.add_scatter(
        x=[best.lr],
        y=[round_digits(best.confirmation.value)],
        mode="markers",
        name="confirmed",
        marker={"symbol": "star", **BEST_MARKER},
        error_y={"type": "constant", "value": best.confirmation.standard_error or 0.0, "color": GREEN, "thickness": 2},
        hovertemplate=f"confirmed: learning rate {rate_text(best.lr)}<br>%{{y}}<extra></extra>",
        row=row,
        col=1,
    )


def _add_trials(
    figure: go.Figure,
    data: FigureData,
    trials: Sequence[TrialRecord],
    row: int,
    bounds: ValueBounds,
    in_legend: set[str],
) -> None:
    """Add a mark for each trial; `in_legend` are the states that the legend already has, and is added to."""
    for state, style in STATE_STYLES.items():
        in_state = [trial for trial in trials if trial.state == state]
        if not in_state:
            continue
        figure.add_scatter(
            x=[round_digits(rate_of(trial)) for trial in in_state],
            y=[_height(trial, bounds) for trial in in_state],
            mode="markers",
            name=state,
            legendgroup=state,
            showlegend=state not in in_legend,
            marker={
                "symbol": style.symbol,
                "size": 9,
                "color": style.colour,
                "opacity": 0.85,
                "line": {"width": 1, "color": "white"},
            },
            **hover_settings(data, in_state),
            row=row,
            col=1,
        )
        in_legend.add(state)


def _height(trial: TrialRecord, bounds: ValueBounds) -> float | None:
    if trial.value is None:
        return bounds.without_value
    return round_digits(min(max(trial.value, bounds.low), bounds.high))
