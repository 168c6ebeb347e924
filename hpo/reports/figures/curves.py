"""The learning curves: training loss and the metric over epochs, one line for each trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.text import plural, rate_text
from hpo.reports.figures.data import FigureData, rate_of
from hpo.reports.figures.style import (
    NUM_COLOURS,
    THEMES,
    count_axis,
    escape_plotly,
    lay_out,
    line_colours,
    round_digits,
)
from hpo.study.records import TrialRecord
from hpo.train.metrics import is_percent

MAX_CURVES = 200  # of more trials, so many are drawn, evenly spread over the learning rates
MAX_CURVE_MARKS = 600  # with more points, only the lines are drawn


def draw_curves(data: FigureData) -> go.Figure | None:
    """Draw a panel for each metric, with a line for each trial that is coloured by its learning rate."""
    metrics, trials = _shown_metrics(data), _with_curves(data)
    if not metrics or not trials:
        return None
    drawn = _spread_over_rates(trials)
    figure = make_subplots(rows=len(metrics), shared_xaxes=True, vertical_spacing=0.07)
    rates = [math.log10(rate_of(trial) or 1) for trial in drawn]
    low, high = min(rates), max(rates)
    steps = [round((rate - low) / ((high - low) or 1) * (NUM_COLOURS - 1)) for rate in rates]
    for row, metric in enumerate(metrics, start=1):
        _add_lines(figure, drawn, steps, metric, row)
        figure.update_yaxes(**_metric_axis(metric, drawn), row=row)
    epochs = [epoch for trial in drawn for epoch in trial.epochs]
    figure.update_xaxes(**count_axis(min(epochs), max(epochs)))
    figure.update_xaxes(title={"text": "epoch"}, row=len(metrics))
    if low < high:
        _add_rate_bar(figure, low, high)
    return lay_out(figure, height=60 + 250 * len(metrics), margin={"l": 8, "r": 8, "t": 12, "b": 8})


def _add_lines(figure: go.Figure, trials: Sequence[TrialRecord], steps: Sequence[int], metric: str, row: int) -> None:
    """Add one trace for all trials of a colour, with a gap between two trials; `steps` are the trials' colours."""
    num_points = sum(len(trial.epochs) for trial in trials)
    colours = line_colours(THEMES["light"])
    for step, colour in enumerate(colours):
        x: list[float | None] = []
        y: list[float | None] = []
        numbers: list[int | None] = []
        for trial, step_of_trial in zip(trials, steps, strict=True):
            if step_of_trial == step and metric in trial.curves:
                x += [*trial.epochs, None]
                y += [*map(round_digits, trial.curves[metric]), None]
                numbers += [trial.number] * (len(trial.epochs) + 1)
        if x:
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines+markers" if num_points <= MAX_CURVE_MARKS else "lines",
                line={"color": colour, "width": 1.6},
                marker={"size": 4},
                opacity=0.85,
                connectgaps=False,
                customdata=numbers,
                meta={"colour": step},
                showlegend=False,
                hovertemplate=f"trial %{{customdata}}, epoch %{{x}}<br>{escape_plotly(metric)} %{{y}}<extra></extra>",
                row=row,
                col=1,
            )


def curves_caption(data: FigureData) -> str:
    """Return which learning rates are drawn, and where the curves of the best trial begin and end."""
    trials = _with_curves(data)
    rates = [rate for trial in trials if (rate := rate_of(trial))]
    caption = f"Learning curves of {plural(len(trials), 'trial')}"
    if rates:
        caption += f", learning rates from {rate_text(min(rates))} to {rate_text(max(rates))}"
    if len(trials) > MAX_CURVES:
        caption += f"; {MAX_CURVES} of them are drawn, spread evenly over the learning rates"
    best = next((trial for trial in _spread_over_rates(trials) if data.best and trial.number == data.best.trial), None)
    if best is not None:
        for metric in _shown_metrics(data):
            values = [value for value in best.curves.get(metric, ()) if value is not None]
            if values:
                in_percent = is_percent(metric) and all(0 <= value <= 1 for value in values)
                first, last = (f"{100 * end:.2f} %" if in_percent else f"{end:.4g}" for end in (values[0], values[-1]))
                caption += f"; the best trial's {metric} goes from {first} to {last}"
    return f"{caption}."


def _shown_metrics(data: FigureData) -> list[str]:
    wanted = dict.fromkeys(["train_loss", data.study.spec.metric, "test_accuracy"])
    return [metric for metric in wanted if any(trial.curves.get(metric) for trial in data.trials)]


def _with_curves(data: FigureData) -> list[TrialRecord]:
    """Return the trials with epochs in the order of their learning rates; if none has a rate, all of them."""
    trials = [trial for trial in data.trials if trial.epochs]
    rated = [trial for trial in trials if rate_of(trial) is not None]
    return sorted(rated or trials, key=lambda trial: rate_of(trial) or 0)


def _spread_over_rates(trials: list[TrialRecord]) -> list[TrialRecord]:
    """Return at most MAX_CURVES of the trials, evenly spread over their order."""
    if len(trials) <= MAX_CURVES:
        return trials
    return [trials[round(index * (len(trials) - 1) / (MAX_CURVES - 1))] for index in range(MAX_CURVES)]


def _metric_axis(metric: str, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    values = [value for trial in trials for value in trial.curves.get(metric, ()) if value is not None]
    if is_percent(metric) and all(0 <= value <= 1 for value in values):
        return {"title": {"text": escape_plotly(metric)}, "tickformat": "~%"}
    axis: dict[str, Any] = {"title": {"text": escape_plotly(metric)}, "exponentformat": "e"}
    trained = [trial for trial in trials if trial.state != "diverged"]
    sane = [value for trial in trained for value in trial.curves.get(metric, ()) if value is not None]
    if sane and metric == "train_loss":  # a loss that explodes leaves the panel, or it would be all there is to see
        low, high = min(sane), max(sane)
        room = 0.04 * (high - low) or 1.0
        axis["range"] = [min(low - room, 0.0) if low >= 0 else low - room, high + room]
    return axis


def _add_rate_bar(figure: go.Figure, low: float, high: float) -> None:
    """Add a colour bar from log10 of one learning rate to another; only marks can have one, so add two unseen ones."""
    ticks: list[float] = [*range(math.ceil(low), math.floor(high) + 1)] or [low, high]
    figure.add_scatter(
        x=[None, None],
        y=[None, None],
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        marker={"color": [low, high], "coloraxis": "coloraxis"},
    )
    colorbar = {
        "title": {"text": "learning rate", "side": "right"},
        "tickvals": ticks,
        "ticktext": [rate_text(10**tick) for tick in ticks],
    }
    figure.update_layout(coloraxis={"cmin": low, "cmax": high, "colorbar": colorbar})
