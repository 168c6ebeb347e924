"""The learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.text import rate_text
from hpo.report.figures.data import FigureData, rate_of
from hpo.report.figures.style import (
    NUM_COLOURS,
    escape_plotly,
    lay_out,
    line_colours,
    round_digits,
)
from hpo.study.records import TrialRecord

MAX_CURVES = 200  # in the figure of learning curves; of more trials, as many are drawn, even in their learning rates
MAX_CURVE_MARKS = 600  # of more points, the lines alone are drawn


def draw_curves(findings: FigureData) -> go.Figure | None:
    """Training loss and what is searched for over epochs, one line a trial, coloured by its learning rate."""
    metrics, trials = _curve_metrics(findings), _with_curves(findings)
    if not metrics or not trials:
        return None
    drawn = _spread_over_rates(trials)
    figure = make_subplots(rows=len(metrics), shared_xaxes=True, vertical_spacing=0.07)
    rates = [math.log10(rate_of(trial) or 1) for trial in drawn]
    low, high = min(rates), max(rates)
    colours = line_colours("light")
    num_points = sum(len(trial.epochs) for trial in drawn)
    mode = "lines+markers" if num_points <= MAX_CURVE_MARKS else "lines"
    for row, metric in enumerate(metrics, start=1):
        for step in range(NUM_COLOURS):
            x: list[float | None] = []
            y: list[float | None] = []
            numbers: list[int | None] = []
            for trial, rate in zip(drawn, rates, strict=True):
                if round((rate - low) / ((high - low) or 1) * (NUM_COLOURS - 1)) == step and metric in trial.curves:
                    x += [*trial.epochs, None]
                    y += [*map(round_digits, trial.curves[metric]), None]
                    numbers += [trial.number] * (len(trial.epochs) + 1)
            if x:
                figure.add_scatter(
                    x=x, y=y, mode=mode,
                    line={"color": colours[step], "width": 1.6}, marker={"size": 4}, opacity=0.85, connectgaps=False,
                    customdata=numbers, meta={"colour": step}, showlegend=False,
                    hovertemplate=f"trial %{{customdata}}, epoch %{{x}}<br>{escape_plotly(metric)} %{{y}}<extra></extra>",
                    row=row, col=1,
                )  # fmt: skip
        figure.update_yaxes(**_curve_axis(findings, metric, drawn), row=row)
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title={"text": "epoch"}, row=len(metrics))
    if low < high:
        _add_rate_bar(figure, low, high)
    return lay_out(figure, height=60 + 250 * len(metrics), margin={"l": 8, "r": 8, "t": 12, "b": 8})


def curves_caption(findings: FigureData) -> str:
    trials, told = _with_curves(findings), []
    rates = [rate for trial in trials if (rate := rate_of(trial))]
    among = f", learning rates from {rate_text(min(rates))} to {rate_text(max(rates))}" if rates else ""
    told.append(f"Learning curves of {len(trials)} trials{among}")
    if len(trials) > MAX_CURVES:
        told.append(f"{MAX_CURVES} of them are drawn, even in their learning rates")
    best = next((trial for trial in trials if findings.best and trial.number == findings.best.trial), None)
    for metric in _curve_metrics(findings) if best else ():
        ends = [value for value in best.curves.get(metric, ()) if value is not None] if best else []
        if ends and best:
            told.append(f"the best trial's {metric} goes from {ends[0]:.4g} to {ends[-1]:.4g}")
    return "; ".join(told) + "."


def _curve_metrics(findings: FigureData) -> list[str]:
    wanted = dict.fromkeys(["train_loss", findings.study.spec.metric, "test_accuracy"])
    return [metric for metric in wanted if any(trial.curves.get(metric) for trial in findings.trials)]


def _with_curves(findings: FigureData) -> list[TrialRecord]:
    """In the order of their learning rates; those that have none are last of all, as one colour."""
    trials = [trial for trial in findings.trials if trial.epochs]
    rated = [trial for trial in trials if rate_of(trial) is not None]
    return sorted(rated or trials, key=lambda trial: rate_of(trial) or 0)


def _spread_over_rates(trials: list[TrialRecord]) -> list[TrialRecord]:
    if len(trials) <= MAX_CURVES:
        return trials
    return [trials[round(index * (len(trials) - 1) / (MAX_CURVES - 1))] for index in range(MAX_CURVES)]


def _curve_axis(findings: FigureData, metric: str, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    values = [value for trial in trials for value in trial.curves.get(metric, ()) if value is not None]
    if metric.endswith("accuracy") and all(0 <= value <= 1 for value in values):
        return {"title": {"text": escape_plotly(metric)}, "tickformat": ".0%"}
    axis: dict[str, Any] = {"title": {"text": escape_plotly(metric)}, "exponentformat": "e"}
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
            "ticktext": [rate_text(10**tick) for tick in ticks],
        }}
    )  # fmt: skip
