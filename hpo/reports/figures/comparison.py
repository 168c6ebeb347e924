"""Studies side by side: the best learning rate of each with its interval, and the rates that do equally well."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from hpo.analysis.comparison import ComparedStudy, Comparison
from hpo.analysis.text import metric_value_text
from hpo.reports.figures.style import BLUE, GREEN, STATE_STYLES, escape_plotly, lay_out, rate_axis, with_opacity

ROW_PIXELS = 52


def draw_comparison(found: Comparison) -> go.Figure:
    """Draw a row for each study: its best rate with its interval, its plateau, and where half of its trials diverge."""
    figure = go.Figure()
    rows = range(len(found.studies))
    known = [(row, study) for row, study in zip(rows, found.studies, strict=True) if study.interval and study.lr]
    for name, colour, width, ends in (
        ("do equally well", with_opacity(GREEN, 0.35), 18, "plateau"),
        ("90 % interval", BLUE, 4, "interval"),
    ):
        lines = [(row, getattr(study, ends)) for row, study in known if getattr(study, ends)]
        figure.add_scatter(
            x=[rate for _, pair in lines for rate in (*pair, None)],
            y=[place for row, _ in lines for place in (row, row, None)],
            mode="lines",
            name=name,
            line={"color": colour, "width": width},
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=[study.lr for _, study in known],
        y=[row for row, _ in known],
        mode="markers",
        name="best learning rate",
        text=[escape_plotly(_label(study)) for _, study in known],
        marker={"symbol": "diamond", "size": 13, "color": BLUE, "line": {"width": 1, "color": "white"}},
        hovertemplate="%{text}<extra></extra>",
    )
    if edges := [(study.divergence_lr, row) for row, study in known if study.divergence_lr is not None]:
        style = STATE_STYLES["diverged"]
        figure.add_scatter(
            x=[rate for rate, _ in edges],
            y=[row for _, row in edges],
            mode="markers",
            name="half diverge",
            marker={"symbol": style.symbol, "size": 10, "color": style.colour},
            hovertemplate="half diverge at %{x:.2g}<extra></extra>",
        )
    drawn = [math.log10(rate) for _, study in known for rate in _drawn_rates(study)] or [-4.0, -1.0]
    margin = 0.04 * (max(drawn) - min(drawn)) or 0.5
    figure.update_xaxes(**rate_axis(range=[min(drawn) - margin, max(drawn) + margin]))
    names = [_study_label(study) for study in found.studies]
    figure.update_yaxes(tickvals=list(rows), ticktext=names, range=[len(rows) - 0.5, -0.5], showgrid=False)
    return lay_out(figure, height=150 + ROW_PIXELS * len(rows), margin={"l": 8, "r": 8, "t": 70, "b": 8})


def _drawn_rates(study: ComparedStudy) -> list[float]:
    """Return the learning rates of a study that are drawn."""
    pairs = [pair for pair in (study.interval, study.plateau) if pair is not None]
    single = [rate for rate in (study.lr, study.divergence_lr) if rate is not None]
    return [*(rate for pair in pairs for rate in pair), *single]


def _study_label(study: ComparedStudy) -> str:
    """Return the study's name and, on a line of their own, the values of listed parameters."""
    listed = study.label.removeprefix(study.study).strip()
    return "<br>".join(escape_plotly(text) for text in (study.study, listed) if text)


def _label(study: ComparedStudy) -> str:
    value = "" if study.value is None else f", {study.metric} {metric_value_text(study.value, study.metric)}"
    return f"{study.label}: {study.lr:.2g}{value}"
