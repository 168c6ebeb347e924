"""The figures of the search: its history, what the parameters matter, how they act together, and who trained when."""

from __future__ import annotations

import plotly.graph_objects as go

from hpo.analysis.text import counts_text, value_text
from hpo.report.figures.data import FigureData, hover_settings, shown_bounds, value_axis
from hpo.report.figures.style import GREEN, STATE_STYLES, VERMILLION, lay_out, round_digits


def draw_history(findings: FigureData) -> go.Figure | None:
    """The value of each trial in the order of their numbers, and the best so far."""
    valued = [trial for trial in findings.trials if trial.value is not None]
    if not valued:
        return None
    figure = go.Figure()
    low, high = shown_bounds(findings, [trial.value for trial in valued if trial.value is not None])
    for state, look in STATE_STYLES.items():
        some = [trial for trial in valued if trial.state == state]
        if some:
            figure.add_scatter(
                x=[trial.number for trial in some],
                y=[round_digits(min(max(trial.value or 0.0, low), high)) for trial in some],
                mode="markers", name=state, **hover_settings(findings, some),
                marker={"symbol": look.symbol, "size": 8, "color": look.colour, "opacity": 0.85},
            )  # fmt: skip
    without = [trial for trial in findings.trials if trial.state == "diverged"]
    if without:
        end = high if findings.study.spec.direction == "minimize" else low
        figure.add_scatter(
            x=[trial.number for trial in without], y=[end] * len(without), mode="markers", name="diverged, no value",
            marker={"symbol": "x", "size": 8, "color": VERMILLION},
            **hover_settings(findings, without),
        )  # fmt: skip
    best = _best_so_far(findings)
    if best:
        figure.add_scatter(
            x=[number for number, _ in best], y=[round_digits(value) for _, value in best], mode="lines", name="best so far",
            line={"color": GREEN, "width": 2, "shape": "hv"}, hovertemplate="best so far %{y}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title={"text": "trial"}, rangemode="tozero")
    figure.update_yaxes(**value_axis(findings))
    return lay_out(figure, height=360)


def history_caption(findings: FigureData) -> str:
    told = f"{len(findings.trials)} trials: {counts_text(findings.trials)}"
    so_far = _best_so_far(findings)
    if so_far:
        best = so_far[-1][1]
        number = next(number for number, value in so_far if value == best)
        told += f"; the best value, {value_text(best, findings.study)}, came with trial {number}"
    return f"{told}."


def _best_so_far(findings: FigureData) -> list[tuple[int, float]]:
    """(number, the best value of complete trials up to it), from the first complete one on."""
    better = min if findings.study.spec.direction == "minimize" else max
    so_far: list[tuple[int, float]] = []
    for trial in findings.trials:
        if trial.state == "complete" and trial.value is not None:
            best = better(so_far[-1][1], trial.value) if so_far else trial.value
            so_far.append((trial.number, best))
    if so_far:
        so_far.append((max(trial.number for trial in findings.trials), so_far[-1][1]))
    return so_far
