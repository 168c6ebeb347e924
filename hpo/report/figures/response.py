"""The figures over the learning rate: the response with every trial, the learning curves, and where the epochs went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.response import CONFIDENCE, Response
from hpo.analysis.text import interval_in_words, params_text, rate_in_words, response_lines, value_in_words
from hpo.report.figures.style import (
    BLUE,
    GREEN,
    NUM_COLOURS,
    STATE_STYLES,
    VERMILLION,
    Findings,
    escaped,
    lay_out,
    line_colours,
    pointed_at,
    rate_axis,
    rate_of,
    rgba,
    shares,
    short,
    value_axis,
    worst_shown,
)  # fmt: skip
from hpo.study.records import TrialRecord

MOST_PANELS = 8  # of combinations of listed parameters
MOST_LINES = 200  # in the figure of learning curves; of more trials, as many are drawn, even in their learning rates
MOST_MARKS = 600  # of more points, the lines alone are drawn
PANEL = 340  # pixels
ResponseGroup = tuple[Mapping[str, Any], Response | None, list[TrialRecord]]


# The response


def response(findings: Findings) -> go.Figure | None:
    """The value over the learning rate, a panel for each combination of listed parameters: the curve with its band,
    the plateau, the interval of the best rate, the edge with its interval, and every trial by its state."""
    groups = _groups(findings)[:MOST_PANELS]
    if not groups:
        return None
    titles = [escaped(params_text(params)) for params, _, _ in groups] if len(groups) > 1 else None
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
            _draw_response(figure, findings, found, row)
        _draw_trials(figure, findings, trials, row, (low, high, below), named)
    rates = [rate for trial in shown if (rate := rate_of(trial))]
    rates += [lr for _, found, _ in groups if found for lr in (found.lrs[0], found.lrs[-1])]
    ends = math.log10(min(rates)), math.log10(max(rates))
    margin = 0.04 * (ends[1] - ends[0]) or 0.5
    figure.update_xaxes(**rate_axis(title=None, range=[ends[0] - margin, ends[1] + margin]))
    figure.update_xaxes(title={"text": "learning rate"}, row=len(groups))
    figure.update_yaxes(**value_axis(findings, range=[min(low, below) - room, max(high, below) + room]))
    height = PANEL + 90 if len(groups) == 1 else 90 + 260 * len(groups)
    return lay_out(figure, height=height, margin={"l": 8, "r": 8, "t": 44 if titles else 12, "b": 8}, legend=BELOW)


BELOW = {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0, "yanchor": "bottom"}


def tell_response(findings: Findings) -> str:
    told = []
    for params, found, trials in _groups(findings):
        name = f"With {params_text(params)}: " if params else ""
        if found is None:
            told.append(f"{name}{len(trials)} trials, too few learning rates for a curve")
        else:
            lines = "; ".join(response_lines(findings.study, found))
            told.append(f"{name or 'All trials: '}the best learning rate is {rate_in_words(found.best)}; {lines}")
    hidden = len(told) - MOST_PANELS
    drawn = f"; {hidden} more combinations are not drawn" if hidden > 0 else ""
    return ". ".join(told) + drawn + ". Trials without a value, such as diverged ones, are at the axis's end."


def _groups(findings: Findings) -> list[ResponseGroup]:
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


def _value_range(findings: Findings, groups: Sequence[ResponseGroup]) -> tuple[float, float]:
    values = [trial.value for _, _, trials in groups for trial in trials if trial.value is not None]
    values += [value for _, found, _ in groups if found for value in found.mean]
    return worst_shown(findings, values) if values else (0.0, 1.0)


def _draw_response(figure: go.Figure, findings: Findings, found: Response, row: int) -> None:
    first = row == 1
    lrs = [short(lr) for lr in found.lrs]
    place = {"row": row, "col": 1}
    figure.add_scatter(
        x=lrs + lrs[::-1], y=[short(y) for y in [*found.high, *found.low[::-1]]], fill="toself",
        fillcolor=rgba(BLUE, 0.16), line={"width": 0}, hoverinfo="skip", name=f"{CONFIDENCE:.0%} band",
        legendgroup="band", showlegend=first, mode="lines", **place,
    )  # fmt: skip
    figure.add_scatter(
        x=lrs, y=[short(y) for y in found.mean], mode="lines", line={"color": BLUE, "width": 2.5}, name="response",
        hovertemplate="learning rate %{x:.2e}<br>expected %{y}<extra></extra>", legendgroup="curve", showlegend=first,
        **place,
    )  # fmt: skip
    figure.add_scatter(
        x=[found.best], y=[short(found.value)], mode="markers", name=f"best, with its {CONFIDENCE:.0%} interval",
        marker={"symbol": "star", "size": 16, "color": GREEN, "line": {"width": 1, "color": "white"}},
        error_x={"type": "data", "symmetric": False, "array": [found.interval[1] - found.best],
                 "arrayminus": [found.best - found.interval[0]], "color": GREEN, "thickness": 3, "width": 7},
        hovertemplate=f"best learning rate {rate_in_words(found.best)}<br>{interval_in_words(found.interval)}"
        f"<br>expected {value_in_words(found.value, findings.study)}<extra></extra>",
        legendgroup="best", showlegend=first, **place,
    )  # fmt: skip
    # After the traces: Plotly shades no panel that is empty.
    figure.add_vrect(*found.plateau, fillcolor=rgba(GREEN, 0.12), line_width=0, layer="below", **place)
    if found.edge is not None:
        figure.add_vrect(*found.edge.interval, fillcolor=rgba(VERMILLION, 0.08), line_width=0, layer="below", **place)
        figure.add_vline(found.edge.lr, line={"color": VERMILLION, "dash": "dash", "width": 1.5}, **place)
    # What is shaded has no trace of its own, and so no place in the legend without these.
    for name, colour, symbol in (("plateau", GREEN, "square"), ("half diverge", VERMILLION, "line-ns-open")):
        if first and (name == "plateau" or found.edge is not None):
            marker = {"symbol": symbol, "size": 12, "color": rgba(colour, 0.25) if symbol == "square" else colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker, **place)


def _draw_trials(
    figure: go.Figure, findings: Findings, trials: Sequence[TrialRecord], row: int, bounds: tuple[float, float, float],
    named: set[str],
) -> None:  # fmt: skip
    low, high, below = bounds
    for state, look in STATE_STYLES.items():
        some = [trial for trial in trials if trial.state == state]
        if not some:
            continue
        figure.add_scatter(
            x=[short(rate_of(trial)) for trial in some],
            y=[below if trial.value is None else short(min(max(trial.value, low), high)) for trial in some],
            mode="markers", name=state, legendgroup=state, showlegend=state not in named,
            marker={"symbol": look.symbol, "size": 9, "color": look.colour, "opacity": 0.85,
                    "line": {"width": 1, "color": "white"}},
            **pointed_at(findings, some), row=row, col=1,
        )  # fmt: skip
        named.add(state)


# The learning curves


def curves(findings: Findings) -> go.Figure | None:
    """Training loss and what is searched for over epochs, one line a trial, coloured by its learning rate."""
    metrics, trials = _curve_metrics(findings), _with_curves(findings)
    if not metrics or not trials:
        return None
    drawn = _thinned(trials)
    figure = make_subplots(rows=len(metrics), shared_xaxes=True, vertical_spacing=0.07)
    rates = [math.log10(rate_of(trial) or 1) for trial in drawn]
    low, high = min(rates), max(rates)
    colours = line_colours("light")
    num_points = sum(len(trial.epochs) for trial in drawn)
    mode = "lines+markers" if num_points <= MOST_MARKS else "lines"
    for row, metric in enumerate(metrics, start=1):
        for step in range(NUM_COLOURS):
            x: list[float | None] = []
            y: list[float | None] = []
            numbers: list[int | None] = []
            for trial, rate in zip(drawn, rates, strict=True):
                if round((rate - low) / ((high - low) or 1) * (NUM_COLOURS - 1)) == step and metric in trial.curves:
                    x += [*trial.epochs, None]
                    y += [*map(short, trial.curves[metric]), None]
                    numbers += [trial.number] * (len(trial.epochs) + 1)
            if x:
                figure.add_scatter(
                    x=x, y=y, mode=mode,
                    line={"color": colours[step], "width": 1.6}, marker={"size": 4}, opacity=0.85, connectgaps=False,
                    customdata=numbers, meta={"colour": step}, showlegend=False,
                    hovertemplate=f"trial %{{customdata}}, epoch %{{x}}<br>{escaped(metric)} %{{y}}<extra></extra>",
                    row=row, col=1,
                )  # fmt: skip
        figure.update_yaxes(**_curve_axis(findings, metric, drawn), row=row)
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title={"text": "epoch"}, row=len(metrics))
    if low < high:
        _add_rate_bar(figure, low, high)
    return lay_out(figure, height=60 + 250 * len(metrics), margin={"l": 8, "r": 8, "t": 12, "b": 8})


def tell_curves(findings: Findings) -> str:
    trials, told = _with_curves(findings), []
    rates = [rate for trial in trials if (rate := rate_of(trial))]
    among = f", learning rates from {rate_in_words(min(rates))} to {rate_in_words(max(rates))}" if rates else ""
    told.append(f"Learning curves of {len(trials)} trials{among}")
    if len(trials) > MOST_LINES:
        told.append(f"{MOST_LINES} of them are drawn, even in their learning rates")
    best = next((trial for trial in trials if findings.best and trial.number == findings.best.trial), None)
    for metric in _curve_metrics(findings) if best else ():
        ends = [value for value in best.curves.get(metric, ()) if value is not None] if best else []
        if ends and best:
            told.append(f"the best trial's {metric} goes from {ends[0]:.4g} to {ends[-1]:.4g}")
    return "; ".join(told) + "."


def _curve_metrics(findings: Findings) -> list[str]:
    wanted = dict.fromkeys(["train_loss", findings.study.spec.metric, "test_accuracy"])
    return [metric for metric in wanted if any(trial.curves.get(metric) for trial in findings.trials)]


def _with_curves(findings: Findings) -> list[TrialRecord]:
    """In the order of their learning rates; those that have none are last of all, as one colour."""
    trials = [trial for trial in findings.trials if trial.epochs]
    rated = [trial for trial in trials if rate_of(trial) is not None]
    return sorted(rated or trials, key=lambda trial: rate_of(trial) or 0)


def _thinned(trials: list[TrialRecord]) -> list[TrialRecord]:
    if len(trials) <= MOST_LINES:
        return trials
    return [trials[round(index * (len(trials) - 1) / (MOST_LINES - 1))] for index in range(MOST_LINES)]


def _curve_axis(findings: Findings, metric: str, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    values = [value for trial in trials for value in trial.curves.get(metric, ()) if value is not None]
    if metric.endswith("accuracy") and all(0 <= value <= 1 for value in values):
        return {"title": {"text": escaped(metric)}, "tickformat": ".0%"}
    axis: dict[str, Any] = {"title": {"text": escaped(metric)}, "exponentformat": "e"}
    sane = [
        value for trial in trials if trial.state != "diverged" for value in trial.curves.get(metric, ())
        if value is not None
    ]  # fmt: skip
    if sane and metric == "train_loss":  # what explodes leaves the picture, or it would be all there is to see
        low, high = min(sane), max(sane)
        room = 0.04 * (high - low) or 1.0
        axis["range"] = [min(low - room, 0.0) if low >= 0 else low - room, high + room]
    return axis


def _add_rate_bar(figure: go.Figure, low: float, high: float) -> None:
    """A colour bar, which only marks can have: two that are not seen."""
    ticks: list[float] = [*range(math.ceil(low), math.floor(high) + 1)] or [low, high]
    figure.add_scatter(
        x=[None, None], y=[None, None], mode="markers", showlegend=False, hoverinfo="skip",
        marker={"color": [low, high], "coloraxis": "coloraxis"},
    )  # fmt: skip
    figure.update_layout(
        coloraxis={"cmin": low, "cmax": high, "colorbar": {
            "title": {"text": "learning rate", "side": "right"}, "tickvals": ticks,
            "ticktext": [rate_in_words(10**tick) for tick in ticks],
        }}
    )  # fmt: skip


# Where the epochs went


def epochs(findings: Findings) -> go.Figure | None:
    """Epochs of training by learning rate and by how the trial ended, and how many trials ended after which epoch."""
    trained = [trial for trial in findings.all_trials if trial.epochs]
    if not trained:
        return None
    figure = make_subplots(rows=2, vertical_spacing=0.24, row_heights=[0.55, 0.45])
    bins = _bins(trained)
    names = [name for name, _ in bins]
    for state, look in STATE_STYLES.items():
        spent = [sum(len(trial.epochs) for trial in some if trial.state == state) for _, some in bins]
        if not any(spent):
            continue
        marker = {"color": look.colour, "pattern": {"shape": look.pattern, "size": 6, "solidity": 0.25}}
        figure.add_bar(
            x=names, y=spent, name=state, legendgroup=state, marker=marker,
            hovertemplate=f"{state}: %{{y}} epochs<br>learning rate %{{x}}<extra></extra>", row=1, col=1,
        )  # fmt: skip
        ends = [len(trial.epochs) for trial in trained if trial.state == state]
        lasts = sorted(set(ends))
        figure.add_bar(
            x=lasts, y=[ends.count(last) for last in lasts], name=state, legendgroup=state, showlegend=False,
            marker=marker, hovertemplate=f"{state} after epoch %{{x}}: %{{y}} trials<extra></extra>", row=2, col=1,
        )  # fmt: skip
    figure.update_xaxes(title={"text": "learning rate"}, type="category", row=1)
    figure.update_yaxes(title={"text": "epochs"}, row=1)
    figure.update_xaxes(title={"text": "epochs that a trial was trained"}, row=2)
    figure.update_yaxes(title={"text": "trials"}, row=2)
    return lay_out(figure, height=460, barmode="stack", bargap=0.25)


def tell_epochs(findings: Findings) -> str:
    spent: dict[str, float] = {}
    for trial in findings.all_trials:
        spent[trial.state] = spent.get(trial.state, 0) + len(trial.epochs)
    most = findings.study.spec.training.epochs
    full = sum(int(trial.params.get("epochs", most)) for trial in findings.all_trials if trial.epochs)
    total = int(sum(spent.values()))
    saved = f", where training all of these trials to their end would have taken {full:,}" if full > total else ""
    again = sum(len(trial.epochs) for trial in findings.others if trial.kind == "confirm")
    confirmed = f" {again:,} of them confirmed what was found." if again else ""
    return f"{total:,} epochs were trained{saved}.{confirmed} By how the trial ended: {shares(spent)}."


def _bins(trials: Sequence[TrialRecord]) -> list[tuple[str, list[TrialRecord]]]:
    """Trials by their learning rate: half a decade each, or a decade where those would be many."""
    rated = [(math.log10(rate), trial) for trial in trials if (rate := rate_of(trial))]
    if not rated:
        return [("all", list(trials))]
    span = max(rate for rate, _ in rated) - min(rate for rate, _ in rated)
    width = 0.5 if span <= 5 else 1.0
    first = math.floor(min(rate for rate, _ in rated) / width)
    last = math.floor(max(rate for rate, _ in rated) / width)
    bins: list[list[TrialRecord]] = [[] for _ in range(min(last - first, 30) + 1)]
    for rate, trial in rated:
        bins[min(math.floor(rate / width) - first, len(bins) - 1)].append(trial)
    ends = [10 ** (width * (first + index)) for index in range(len(bins) + 1)]
    return [(f"{ends[index]:.1g}–{ends[index + 1]:.1g}", some) for index, some in enumerate(bins)]
