"""The history of a search: the value of each trial, and the best so far."""

from __future__ import annotations

import plotly.graph_objects as go

from hpo.analysis.text import counts_text, plural, value_text
from hpo.reports.figures.data import FigureData, hover_settings, room_beyond, shown_bounds, value_axis
from hpo.reports.figures.style import GREEN, STATE_STYLES, VERMILLION, count_axis, lay_out, round_digits


def draw_history(data: FigureData) -> go.Figure | None:
    """Draw the value of each trial in the order of their numbers, and the best so far."""
    valued = [trial for trial in data.trials if trial.value is not None]
    if not valued:
        return None
    figure = go.Figure()
    low, high = shown_bounds(data, [trial.value for trial in valued if trial.value is not None])
    for state, style in STATE_STYLES.items():
        in_state = [trial for trial in valued if trial.state == state]
        if in_state:
            figure.add_scatter(
                x=[trial.number for trial in in_state],
                y=[round_digits(min(max(trial.value or 0.0, low), high)) for trial in in_state],
                mode="markers",
                name=state,
                **hover_settings(data, in_state),
                marker={
                    "symbol": style.symbol,
                    "size": 9,
                    "color": style.colour,
                    "line": {"width": 1, "color": "white"},
                },
            )
    diverged = [trial for trial in data.trials if trial.state == "diverged"]
    if diverged:
        end = high if data.study.spec.direction == "minimize" else low
        figure.add_scatter(
            x=[trial.number for trial in diverged],
            y=[end] * len(diverged),
            mode="markers",
            name="diverged, no value",
            marker={"symbol": "x", "size": 9, "color": VERMILLION, "line": {"width": 1, "color": "white"}},
            **hover_settings(data, diverged),
        )
    best = _best_so_far(data)
    if best:
        figure.add_scatter(
            x=[number for number, _ in best],
            y=[round_digits(value) for _, value in best],
            mode="lines",
            name="best so far",
            line={"color": GREEN, "width": 2, "shape": "hv"},
            hovertemplate="best so far %{y}<extra></extra>",
        )
    figure.update_xaxes(title={"text": "trial"}, **count_axis(0, max(trial.number for trial in data.trials)))
    room = room_beyond(low, high)
    figure.update_yaxes(**value_axis(data, range=[low - room, high + room]))
    return lay_out(figure, height=360)


def history_caption(data: FigureData) -> str:
    """Return how many trials are drawn, which one was the best, and what is not drawn."""
    drawn = [trial for trial in data.trials if trial.value is not None or trial.state == "diverged"]
    others = [trial for trial in data.trials if trial not in drawn]
    caption = f"{plural(len(drawn), 'trial')}: {counts_text(drawn)}"
    so_far = _best_so_far(data)
    if so_far:
        best = so_far[-1][1]
        number = next(number for number, value in so_far if value == best)
        caption += f"; the best value, {value_text(best, data.study)}, came with trial {number}"
    if others:
        caption += f"; without a value, and not drawn: {counts_text(others)}"
    return f"{caption}."


def _best_so_far(data: FigureData) -> list[tuple[int, float]]:
    """Return (number, best value of complete trials up to it) from the first complete trial on."""
    better = min if data.study.spec.direction == "minimize" else max
    so_far: list[tuple[int, float]] = []
    for trial in data.trials:
        if trial.state == "complete" and trial.value is not None:
            best = better(so_far[-1][1], trial.value) if so_far else trial.value
            so_far.append((trial.number, best))
    if so_far:
        so_far.append((max(trial.number for trial in data.trials), so_far[-1][1]))
    return so_far
